#include "device/cuda_gemm.h"

#include <cublasLt.h>

#include <array>
#include <map>
#include <optional>

#include "core/check.h"

namespace modeltorch {
namespace {

void check_cublas(cublasStatus_t status, const char* call) {
  if (status != CUBLAS_STATUS_SUCCESS)
    fail(ErrorKind::kRuntime, call, " returned ", cublasLtGetStatusName(status));
}

cudaDataType_t data_type(DType dtype) {
  if (dtype == DType::kFloat32) return CUDA_R_32F;
  if (dtype == DType::kBFloat16) return CUDA_R_16BF;
  if (dtype == DType::kFloat16) return CUDA_R_16F;
  fail(ErrorKind::kNotImplemented, "gemm: no kernel for ", dtype);
}

// The largest power of two up to 16 that divides an address.
uint32_t alignment_of(const void* pointer) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  uint32_t alignment = 16;
  while (address % alignment != 0) alignment /= 2;
  return alignment;
}

// What the choice of an algorithm depends on.
using Shape = std::array<int64_t, 13>;

Shape shape_of(const CudaGemmArgs& args) {
  return {static_cast<int64_t>(args.dtype),
          args.bucket_m,
          args.n,
          args.k,
          args.a_stride,
          args.c_stride,
          args.residual == nullptr ? -1 : args.residual_stride,
          args.b_transposed,
          args.bias != nullptr,
          alignment_of(args.a),
          alignment_of(args.b),
          alignment_of(args.c),
          alignment_of(args.residual)};
}

// cuBLASLt's matrices are column-major: our row-major C [m, n] is its [n, m], and the weight comes first.
class Problem {
 public:
  explicit Problem(const CudaGemmArgs& args) {
    const cudaDataType_t type = data_type(args.dtype);
    check_cublas(cublasLtMatmulDescInit(&operation, CUBLAS_COMPUTE_32F, CUDA_R_32F),
                 "cublasLtMatmulDescInit");
    const cublasOperation_t transpose = args.b_transposed ? CUBLAS_OP_T : CUBLAS_OP_N;
    set(CUBLASLT_MATMUL_DESC_TRANSA, transpose);
    if (args.bias != nullptr) {
      set(CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_EPILOGUE_BIAS);
      set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, args.bias);
    }
    const auto layout = [&](cublasLtMatrixLayoutOpaque_t& made, int64_t rows, int64_t columns,
                            int64_t stride) {
      check_cublas(cublasLtMatrixLayoutInit(&made, type, rows, columns, stride), "cublasLtMatrixLayoutInit");
    };
    if (args.b_transposed) {
      layout(weight, args.k, args.n, args.k);
    } else {
      layout(weight, args.n, args.k, args.n);
    }
    layout(x, args.k, args.m, args.a_stride);
    layout(y, args.n, args.m, args.c_stride);
    layout(residual, args.n, args.m, args.residual == nullptr ? args.c_stride : args.residual_stride);
  }

  cublasLtMatmulDescOpaque_t operation;
  cublasLtMatrixLayoutOpaque_t weight;
  cublasLtMatrixLayoutOpaque_t x;
  cublasLtMatrixLayoutOpaque_t y;
  cublasLtMatrixLayoutOpaque_t residual;

 private:
  template <class V>
  void set(cublasLtMatmulDescAttributes_t attribute, const V& value) {
    check_cublas(cublasLtMatmulDescSetAttribute(&operation, attribute, &value, sizeof(value)),
                 "cublasLtMatmulDescSetAttribute");
  }
};

std::optional<cublasLtMatmulAlgo_t> choose(cublasLtHandle_t handle, const CudaGemmArgs& args) {
  Problem problem(args);
  cublasLtMatmulPreferenceOpaque_t preference;
  check_cublas(cublasLtMatmulPreferenceInit(&preference), "cublasLtMatmulPreferenceInit");
  const auto prefer = [&](cublasLtMatmulPreferenceAttributes_t attribute, const auto& value) {
    check_cublas(cublasLtMatmulPreferenceSetAttribute(&preference, attribute, &value, sizeof(value)),
                 "cublasLtMatmulPreferenceSetAttribute");
  };
  const uint64_t workspace = kCudaGemmWorkspace;
  prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, workspace);
  // Partial sums stay in float32.
  const uint32_t reductions = CUBLASLT_REDUCTION_SCHEME_NONE | CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
  prefer(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, reductions);
  prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, alignment_of(args.b));
  prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, alignment_of(args.a));
  prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
         alignment_of(args.residual == nullptr ? args.c : args.residual));
  prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, alignment_of(args.c));
  cublasLtMatmulHeuristicResult_t found{};
  int count = 0;
  const cublasStatus_t status =
      cublasLtMatmulAlgoGetHeuristic(handle, &problem.operation, &problem.weight, &problem.x,
                                     &problem.residual, &problem.y, &preference, 1, &found, &count);
  if (status != CUBLAS_STATUS_SUCCESS || count == 0 || found.state != CUBLAS_STATUS_SUCCESS)
    return std::nullopt;
  return found.algo;
}

}  // namespace

struct CudaGemm::Library {
  cublasLtHandle_t handle = nullptr;
  std::map<Shape, std::optional<cublasLtMatmulAlgo_t>> algorithms;

  ~Library() {
    if (handle != nullptr) cublasLtDestroy(handle);
  }

  const std::optional<cublasLtMatmulAlgo_t>& algorithm(const CudaGemmArgs& args) {
    const Shape shape = shape_of(args);
    const auto found = algorithms.find(shape);
    if (found != algorithms.end()) return found->second;
    CudaGemmArgs largest = args;
    largest.m = args.bucket_m;
    return algorithms[shape] = choose(handle, largest);
  }
};

CudaGemm::CudaGemm() : library_(std::make_unique<Library>()) {}
CudaGemm::~CudaGemm() = default;

bool CudaGemm::run(const CudaGemmArgs& args, void* stream) {
  Library& library = *library_;
  if (library.handle == nullptr) check_cublas(cublasLtCreate(&library.handle), "cublasLtCreate");
  const std::optional<cublasLtMatmulAlgo_t>& algorithm = library.algorithm(args);
  if (!algorithm) return false;
  Problem problem(args);
  const float one = 1.0f;
  const float beta = args.residual == nullptr ? 0.0f : 1.0f;
  const void* c = args.residual == nullptr ? args.c : args.residual;
  const cublasStatus_t status =
      cublasLtMatmul(library.handle, &problem.operation, &one, args.b, &problem.weight, args.a, &problem.x,
                     &beta, c, &problem.residual, args.c, &problem.y, &*algorithm, args.workspace,
                     kCudaGemmWorkspace, static_cast<cudaStream_t>(stream));
  if (status == CUBLAS_STATUS_NOT_SUPPORTED || status == CUBLAS_STATUS_INVALID_VALUE) return false;
  check_cublas(status, "cublasLtMatmul");
  return true;
}

}  // namespace modeltorch
