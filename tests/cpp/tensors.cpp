#include "tensors.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <new>
#include <thread>

#include "core/half_floats.h"
#include "core/parallel.h"
#include "graph/kernel.h"
#include "graph/pack_store.h"

namespace test {

using namespace modeltorch;

constexpr std::align_val_t kAlignment{kArenaAlignment};

Tensor::Tensor(DType dtype, const Dims& dims) {
  const size_t bytes = TensorDesc{dtype, dims}.bytes();
  memory_ = std::make_unique<std::byte[]>(bytes + dtype_size(dtype));
  view_ = {memory_.get() + dtype_size(dtype), dtype, dims};
  std::memset(view_.data, 0xff, bytes);
}

Tensor Tensor::of(DType dtype, const Dims& dims, const std::vector<double>& values) {
  Tensor tensor(dtype, dims);
  expect(static_cast<int64_t>(values.size()) == tensor.count(), "values for ", tensor.view());
  for (int64_t index = 0; index < tensor.count(); ++index) tensor.set(index, values[index]);
  return tensor;
}

Tensor Tensor::random(Random& random, DType dtype, const Dims& dims, double low, double high) {
  Tensor tensor(dtype, dims);
  std::uniform_real_distribution<double> distribution(low, high);
  for (int64_t index = 0; index < tensor.count(); ++index) tensor.set(index, distribution(random));
  return tensor;
}

double Tensor::get(int64_t index) const {
  switch (view_.dtype) {
    case DType::kFloat32:
      return view_.as<float>()[index];
    case DType::kBFloat16:
      return static_cast<float>(view_.as<BFloat16>()[index]);
    case DType::kFloat16:
      return static_cast<float>(view_.as<Float16>()[index]);
    case DType::kInt32:
      return view_.as<int32_t>()[index];
    default:
      expect(view_.dtype == DType::kInt64, "no values of ", view_);
      return static_cast<double>(view_.as<int64_t>()[index]);
  }
}

void Tensor::set(int64_t index, double value) {
  switch (view_.dtype) {
    case DType::kFloat32:
      view_.as<float>()[index] = static_cast<float>(value);
      return;
    case DType::kBFloat16:
      view_.as<BFloat16>()[index] = BFloat16(static_cast<float>(value));
      return;
    case DType::kFloat16:
      view_.as<Float16>()[index] = Float16(static_cast<float>(value));
      return;
    case DType::kInt32:
      view_.as<int32_t>()[index] = static_cast<int32_t>(value);
      return;
    default:
      expect(view_.dtype == DType::kInt64, "no values of ", view_);
      view_.as<int64_t>()[index] = static_cast<int64_t>(value);
  }
}

std::vector<double> Tensor::values() const {
  std::vector<double> all(count());
  for (int64_t index = 0; index < count(); ++index) all[index] = get(index);
  return all;
}

std::vector<std::byte> Tensor::bits(int64_t index, int64_t count) const {
  const size_t size = dtype_size(view_.dtype);
  const std::byte* begin = static_cast<const std::byte*>(view_.data) + index * size;
  return {begin, begin + count * size};
}

PackedInputs pack_inputs(const Operation& operation, const std::vector<const Tensor*>& inputs) {
  const WeightPacker* packer = find_packer(operation.name(), DeviceType::kCpu);
  if (packer == nullptr || packer->pack == nullptr) return {};
  std::vector<TensorDesc> descs;
  for (const Tensor* input : inputs) descs.push_back(input->desc());
  PackedInputs result{nullptr, packer->replaces(operation, descs)};
  std::vector<TensorView> replaced;
  for (const size_t position : result.replaced) replaced.push_back(inputs[position]->view());
  if (!replaced.empty()) result.packed = PackStore("").get(*packer, operation, replaced);
  return result;
}

std::vector<Tensor> run_operation(const Operation& operation, const std::vector<const Tensor*>& inputs,
                                  const PackedInputs& packed) {
  std::vector<TensorDesc> input_descs;
  std::vector<TensorView> views;
  for (const Tensor* input : inputs) {
    input_descs.push_back(input->desc());
    views.push_back(input->view());
  }
  for (const size_t position : packed.replaced) views[position].data = nullptr;
  std::vector<const TensorView*> input_views, output_views;
  for (const TensorView& view : views) input_views.push_back(&view);
  const std::vector<TensorDesc> output_descs = operation.infer_shape(input_descs);
  std::vector<Tensor> outputs;
  for (const TensorDesc& desc : output_descs) outputs.emplace_back(desc.dtype, desc.dims);
  for (const Tensor& output : outputs) output_views.push_back(&output.view());

  const KernelFactory factory = find_kernel(operation.name(), DeviceType::kCpu);
  expect(factory != nullptr, operation.name(), " has no CPU kernel");
  const std::unique_ptr<Kernel> kernel =
      factory({operation, input_descs, output_descs, Device{}, packed.packed});
  const size_t bytes = kernel->workspace_bytes();
  void* workspace = ::operator new(bytes, kAlignment);
  std::memset(workspace, 0xff, bytes);
  const StepInfo step;
  kernel->run({input_views, output_views, workspace, nullptr, &step});
  ::operator delete(workspace, kAlignment);
  return outputs;
}

double worst_row_error(const Tensor& out, const std::vector<double>& expected, int64_t row_size) {
  expect(out.count() == static_cast<int64_t>(expected.size()), "expected ", expected.size(), " values, got ",
         out.view());
  const std::vector<double> given = out.values();
  double squares = 0.0;
  for (const double value : expected) squares += value * value;
  const double average = expected.empty() ? 0.0 : squares * row_size / static_cast<double>(expected.size());
  double worst = 0.0;
  for (size_t row = 0; row < expected.size(); row += row_size) {
    double difference = 0.0;
    double norm = 0.0;
    for (size_t index = row; index < row + row_size; ++index) {
      difference += (given[index] - expected[index]) * (given[index] - expected[index]);
      norm += expected[index] * expected[index];
    }
    const double error = difference == 0.0 ? 0.0 : std::sqrt(difference / std::max(norm, average));
    if (!std::isfinite(error)) return std::numeric_limits<double>::infinity();
    worst = std::max(worst, error);
  }
  return worst;
}

std::byte* HeapArena::reserve(size_t bytes) {
  if (memory_ == nullptr || bytes > bytes_) {
    drop();
    memory_ = static_cast<std::byte*>(::operator new(bytes, kAlignment));
    bytes_ = bytes;
    std::memset(memory_, 0xff, bytes);
  }
  return memory_;
}

void HeapArena::drop() {
  if (memory_ != nullptr) ::operator delete(memory_, kAlignment);
  memory_ = nullptr;
}

namespace {

ParallelBackend former_backend;

void run_on_three_threads(int64_t count, int64_t grain, ParallelBody body, void* context) {
  const int64_t part = std::max(grain, (count + 2) / 3);
  std::vector<std::thread> threads;
  for (int64_t begin = 0; begin < count; begin += part) {
    threads.emplace_back(body, context, begin, std::min(count, begin + part));
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace

ThreeThreads::ThreeThreads() {
  former_backend = parallel_backend();
  set_parallel_backend({.run = run_on_three_threads, .width = [] { return int64_t{3}; }});
}

ThreeThreads::~ThreeThreads() {
  set_parallel_backend(former_backend);
}

}  // namespace test
