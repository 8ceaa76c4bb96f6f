#pragma once

#include <cuda_runtime_api.h>

#include <functional>
#include <span>
#include <vector>

namespace modeltorch {

/// Launches that were captured, to be made again in one go.
///
/// They come in parts. A part can be updated: its kernels then run with other arguments, from the next replay
/// on. Everything else stays as it was captured.
class CudaGraph {
 public:
  struct Part {
    std::function<void(cudaStream_t stream)> launch;
    bool waits = false;  ///< not even what overlaps the launch in front of it begins before that is complete
  };

  /// Captures the parts, each after the one before it, on a stream that nobody else uses.
  CudaGraph(std::span<const Part> parts, cudaStream_t stream);
  ~CudaGraph();
  CudaGraph(const CudaGraph&) = delete;
  CudaGraph& operator=(const CudaGraph&) = delete;

  /// Gives the kernels of a part the arguments that `launch` launches them with now, on a stream that nobody
  /// else uses; nothing runs there. Returns false, and then must not be replayed again, if it launches other
  /// kernels than before, or anything but kernels.
  bool update(size_t part, const Part& launch, cudaStream_t stream);

  void replay(cudaStream_t stream);

  /// Uploads the graph, so that the first replay does not.
  void upload(cudaStream_t stream);

 private:
  cudaGraph_t graph_ = nullptr;  // names the kernels of exec_
  cudaGraphExec_t exec_ = nullptr;
  std::vector<std::vector<cudaGraphNode_t>> nodes_;  // by part, the last launch first
};

}  // namespace modeltorch
