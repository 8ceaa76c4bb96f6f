#include "ops/linear.h"
#include "ops/vendor_npu.h"

namespace modeltorch {
namespace {

/// Linear as one vendor Linear a part, joined by vendor Concats (of two tensors each) if there are several
/// parts.
///
/// | vendor            | ours   | shape                | dtype      | note                           |
/// |-------------------|--------|----------------------|------------|--------------------------------|
/// | Linear in 0       | x      | [rows, k]            | fp16, bf16 |                                |
/// | Linear in 1       | w_i    | [n_i, k] or [k, n_i] | as x       | ND or NZ; transposeB: [n_i, k] |
/// | Linear in 2       | bias_i | [n_i]                | as x       | with hasBias alone             |
/// | Linear out 0      |        | [rows, n_i]          | as x       | y itself if there is one part  |
/// | Concat in 0, in 1 |        | [rows, ..]           | as x       | parts so far, next part        |
/// | Concat out 0      |        | [rows, ..]           | as x       | y for the last one             |
class LinearNpu final : public NpuKernel {
 public:
  LinearNpu(const KernelSetup& setup, const Linear& op) : NpuKernel(setup), parts_(op.parts) {
    for (const LinearPart& part : parts_) {
      atb::infer::LinearParam param;
      param.transposeA = false;
      param.transposeB = part.transposed;
      param.hasBias = part.has_bias;
      add(param);
    }
    atb::infer::ConcatParam param;
    param.concatDim = 1;
    for (size_t joined = 1; joined < parts_.size(); ++joined) add(param);
    plan_scratch(setup);
  }

  size_t workspace_bytes() const override { return scratch_bytes_; }

 protected:
  void bind(const KernelArgs& args) override {
    const int64_t rows = args.in(0).dims[0];
    const auto scratch = [&](size_t piece) {
      std::byte* memory = static_cast<std::byte*>(args.workspace) + pieces_[piece].offset;
      return vendor_tensor({memory, dtype(), {rows, pieces_[piece].columns}});
    };
    const size_t parts = parts_.size();
    const atb::Tensor y = vendor_tensor(args.out(0));
    size_t input = 1;
    for (size_t part = 0; part < parts; ++part) {
      const atb::Tensor weight = vendor_tensor(args.in(input++));
      const atb::Tensor out = parts == 1 ? y : scratch(part);
      if (parts_[part].has_bias) {
        set(part, {vendor_tensor(args.in(0)), weight, vendor_tensor(args.in(input++))}, {out});
      } else {
        set(part, {vendor_tensor(args.in(0)), weight}, {out});
      }
    }
    for (size_t part = 1; part < parts; ++part) {
      const atb::Tensor before = part == 1 ? scratch(0) : scratch(parts + part - 2);
      set(parts + part - 1, {before, scratch(part)}, {part + 1 == parts ? y : scratch(parts + part - 1)});
    }
  }

 private:
  struct Piece {
    size_t offset;
    int64_t columns;
  };

  // Pieces: the output of every part, then what every Concat but the last writes.
  void plan_scratch(const KernelSetup& setup) {
    if (parts_.size() == 1) return;
    const int64_t rows = setup.inputs[0].dims[0];
    const auto place = [&](int64_t columns) {
      pieces_.push_back({scratch_bytes_, columns});
      const size_t bytes = static_cast<size_t>(rows * columns) * dtype_size(dtype());
      const size_t alignment = session().alignment();
      scratch_bytes_ += (bytes + alignment - 1) / alignment * alignment;
    };
    size_t input = 1;
    for (const LinearPart& part : parts_) {
      place(setup.inputs[input].dims[part.transposed ? 0 : 1]);
      input += part.has_bias ? 2 : 1;
    }
    int64_t joined = pieces_[0].columns;
    for (size_t part = 1; part + 1 < parts_.size(); ++part) place(joined += pieces_[part].columns);
  }

  std::vector<LinearPart> parts_;
  std::vector<Piece> pieces_;
  size_t scratch_bytes_ = 0;
};

const bool registered = register_npu<Linear, LinearNpu>();

}  // namespace
}  // namespace modeltorch
