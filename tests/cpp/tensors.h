#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <random>
#include <vector>

#include "core/tensor_view.h"
#include "graph/operation.h"
#include "graph/packing.h"
#include "graph/runner.h"
#include "test.h"

namespace test {

using modeltorch::Dims;
using modeltorch::DType;
using modeltorch::Operation;
using modeltorch::Rows;
using modeltorch::TensorDesc;
using modeltorch::TensorView;

using Random = std::mt19937_64;

inline constexpr DType kFloats[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};

/// A tensor that owns its memory: exactly its elements, one element off the allocator's alignment, so that a
/// sanitizer sees every step beyond it and kernels cannot count on aligned rows.
class Tensor {
 public:
  /// Poisoned: every float is NaN, every integer -1.
  Tensor(DType dtype, const Dims& dims);

  static Tensor of(DType dtype, const Dims& dims, const std::vector<double>& values);
  static Tensor random(Random& random, DType dtype, const Dims& dims, double low = -1.0, double high = 1.0);

  const TensorView& view() const { return view_; }
  const Dims& dims() const { return view_.dims; }
  int64_t count() const { return view_.dims.count(); }
  TensorDesc desc(Rows rows = Rows::kFixed) const { return {view_.dtype, view_.dims, rows}; }

  double get(int64_t index) const;
  void set(int64_t index, double value);
  std::vector<double> values() const;

  /// The bytes of `count` elements from `index`, to compare bit for bit.
  std::vector<std::byte> bits(int64_t index, int64_t count) const;
  std::vector<std::byte> bits() const { return bits(0, count()); }

 private:
  std::unique_ptr<std::byte[]> memory_;
  TensorView view_;
};

/// Weights of an operation in packed form, and the positions of the inputs that it replaces.
struct PackedInputs {
  modeltorch::PackedWeightPtr packed;
  std::vector<size_t> replaced;
};

/// Packs what the CPU wants packed of these inputs. Null where it takes them as they are.
PackedInputs pack_inputs(const Operation& operation, const std::vector<const Tensor*>& inputs);

/// Infers the shapes, sets the CPU kernel up and runs it once, with exactly the scratch that it asked for.
/// Outputs and scratch are poisoned before; inputs that a packed form replaces come without data.
std::vector<Tensor> run_operation(const Operation& operation, const std::vector<const Tensor*>& inputs,
                                  const PackedInputs& packed = {});

/// The largest ||row of out - row of expected|| of all rows, relative to the norm of that row or, where that
/// is larger, of the average row. Infinite if anything is not a number.
double worst_row_error(const Tensor& out, const std::vector<double>& expected, int64_t row_size);

/// How far a row may be off after one rounding to this type.
constexpr double tolerance(DType dtype) {
  return dtype == DType::kFloat32 ? 1e-5 : dtype == DType::kBFloat16 ? 1e-2 : 2e-3;
}

/// Expects every row to be right to the tolerance of its type.
template <class... Parts>
void expect_close(const Tensor& out, const std::vector<double>& expected, int64_t row_size,
                  const Parts&... parts) {
  const double error = worst_row_error(out, expected, row_size);
  expect(error < tolerance(out.view().dtype), parts..., " ", out.view(), ": error ", error);
}

/// Poisoned memory for a runner, exactly as large as the largest request.
class HeapArena final : public modeltorch::Arena {
 public:
  ~HeapArena() override { drop(); }
  std::byte* reserve(size_t bytes) override;
  size_t bytes() const { return bytes_; }

 private:
  void drop();

  std::byte* memory_ = nullptr;
  size_t bytes_ = 0;
};

/// While it lives, parallel_for runs on three threads of its own.
class ThreeThreads {
 public:
  ThreeThreads();
  ~ThreeThreads();
  ThreeThreads(const ThreeThreads&) = delete;
  ThreeThreads& operator=(const ThreeThreads&) = delete;
};

/// Calls `body` on one thread, then on three.
template <class Body>
void on_one_and_three_threads(Body&& body) {
  body();
  const ThreeThreads threads;
  body();
}

}  // namespace test
