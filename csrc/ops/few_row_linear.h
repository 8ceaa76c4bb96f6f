#pragma once

#include <cstddef>
#include <cstdint>

#include "core/dtype.h"

namespace modeltorch {

/// A linear map of at most 128 rows on one CUDA device, with everything around it that a decode step needs:
/// y = [residual +] act(norm(x) . cat_i(W_i)^T + cat_i(bias_i)).
///
/// | tensor   | shape                          | dtype | note                                               |
/// |----------|--------------------------------|-------|----------------------------------------------------|
/// | x        | [rows, k]                      | T     |                                                    |
/// | W_i      | [n_i, k]                       | T     | up to three; N is the sum of n_i                   |
/// | bias_i   | [n_i] or null                  | T     |                                                    |
/// | gamma    | [k] or null                    | T     | norm(x) = x / sqrt(mean(x^2) + epsilon) * gamma    |
/// | residual | [rows, N] or null              | T     | may be y                                           |
/// | y        | [rows, N], swiglu: [rows, N/2] | T     | swiglu: silu(first half) * second half             |
///
/// T is bfloat16 or float16; sums are float32 and their order is fixed. On Hopper the kernel starts to load
/// its weights before the kernels in front of it are done (programmatic dependent launch): the producers of
/// weights, biases and gamma must be complete before the chain of such launches begins. Everything else may
/// come from the kernel right in front.
struct FewRowLinear {
  struct Part {
    const void* weight = nullptr;
    const void* bias = nullptr;
    int64_t n = 0;
  };

  DType dtype = DType::kBFloat16;
  int64_t rows = 0;
  int64_t k = 0;
  Part parts[3];
  int part_count = 0;
  const void* x = nullptr;
  const void* gamma = nullptr;
  float epsilon = 0;
  const void* residual = nullptr;
  bool swiglu = false;  ///< parts are {gate, up} or one packed {gate_up}
  void* y = nullptr;
  void* workspace = nullptr;  ///< few_row_linear_workspace() bytes, 16-byte aligned, of any content
};

/// False: a dtype, shape or alignment that only the plain kernels serve.
bool few_row_linear_fits(const FewRowLinear& linear);

/// Bytes of workspace that the launch needs; 0 mostly.
size_t few_row_linear_workspace(const FewRowLinear& linear);

/// Launches `linear` on `stream` (a cudaStream_t). Throws Error if CUDA refuses the launch.
void few_row_linear(const FewRowLinear& linear, void* stream);

}  // namespace modeltorch
