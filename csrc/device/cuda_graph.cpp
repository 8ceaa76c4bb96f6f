#include "device/cuda_graph.h"

#include <cuda.h>
#include <cudaTypedefs.h>

#include "core/check.h"
#include "device/cuda_check.h"

namespace modeltorch {
namespace {

void check_driver(CUresult code, const char* call) {
  if (code != CUDA_SUCCESS) fail(ErrorKind::kRuntime, call, ": error ", static_cast<int>(code));
}

template <class Function>
Function driver_function(const char* name, unsigned version) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  check_cuda(cudaGetDriverEntryPointByVersion(name, &function, version, cudaEnableDefault, &found), name);
  if (found != cudaDriverEntryPointSuccess) fail(ErrorKind::kRuntime, "the driver has no ", name);
  return reinterpret_cast<Function>(function);
}

// What the runtime offers only for kernels of its own, or under other names in other versions.
struct Driver {
  PFN_cuStreamGetCaptureInfo_v12030 capture_info =
      driver_function<decltype(capture_info)>("cuStreamGetCaptureInfo", 12030);
  PFN_cuStreamUpdateCaptureDependencies_v12030 set_dependencies =
      driver_function<decltype(set_dependencies)>("cuStreamUpdateCaptureDependencies", 12030);
  PFN_cuGraphNodeGetDependencies_v12030 dependencies =
      driver_function<decltype(dependencies)>("cuGraphNodeGetDependencies", 12030);
  PFN_cuGraphKernelNodeGetParams_v12000 kernel_params =
      driver_function<decltype(kernel_params)>("cuGraphKernelNodeGetParams", 12000);
  PFN_cuGraphExecKernelNodeSetParams_v12000 set_kernel_params =
      driver_function<decltype(set_kernel_params)>("cuGraphExecKernelNodeSetParams", 12000);
};

const Driver& driver() {
  static const Driver instance;
  return instance;
}

// What a stream that captures would put the next launch behind: the graph so far, and its last node.
struct Front {
  cudaGraph_t graph = nullptr;
  cudaGraphNode_t last = nullptr;
};

Front front_of(cudaStream_t stream) {
  Front front;
  CUstreamCaptureStatus status;
  const CUgraphNode* nodes = nullptr;
  const CUgraphEdgeData* edges = nullptr;
  size_t count = 0;
  check_driver(driver().capture_info(stream, &status, nullptr, &front.graph, &nodes, &edges, &count),
               "cuStreamGetCaptureInfo");
  if (count == 1) front.last = nodes[0];
  return front;
}

// The nodes from `last` back to the one behind `end`; none if they are not in a row or are not all kernels.
std::vector<cudaGraphNode_t> kernels_between(cudaGraphNode_t end, cudaGraphNode_t last) {
  std::vector<cudaGraphNode_t> nodes;
  while (last != end) {
    cudaGraphNodeType type;
    check_cuda(cudaGraphNodeGetType(last, &type), "cudaGraphNodeGetType");
    if (type != cudaGraphNodeTypeKernel) return {};
    nodes.push_back(last);
    CUgraphNode before = nullptr;
    CUgraphEdgeData edge{};
    size_t count = 1;
    check_driver(driver().dependencies(last, &before, &edge, &count), "cuGraphNodeGetDependencies");
    last = before;
    if (last == nullptr && end != nullptr) return {};
  }
  return nodes;
}

// What is launched on a stream while this lives becomes a graph.
class Capture {
 public:
  explicit Capture(cudaStream_t stream) : stream_(stream) {
    // Relaxed: other threads may allocate meanwhile.
    check_cuda(cudaStreamBeginCapture(stream, cudaStreamCaptureModeRelaxed), "cudaStreamBeginCapture");
  }
  ~Capture() {
    if (ended_) return;
    cudaGraph_t graph = nullptr;
    cudaStreamEndCapture(stream_, &graph);
    if (graph != nullptr) cudaGraphDestroy(graph);
    cudaGetLastError();
  }
  Capture(const Capture&) = delete;
  Capture& operator=(const Capture&) = delete;

  // A node that does nothing: a launch behind it waits for all in front of it, whatever it could overlap.
  void wait() {
    const Front front = front_of(stream_);
    if (front.last == nullptr) return;
    CUgraphNode node = nullptr;
    check_cuda(cudaGraphAddEmptyNode(&node, front.graph, &front.last, 1), "cudaGraphAddEmptyNode");
    check_driver(driver().set_dependencies(stream_, &node, nullptr, 1, CU_STREAM_SET_CAPTURE_DEPENDENCIES),
                 "cuStreamUpdateCaptureDependencies");
  }

  cudaGraph_t end() {
    ended_ = true;
    cudaGraph_t graph = nullptr;
    check_cuda(cudaStreamEndCapture(stream_, &graph), "cudaStreamEndCapture");
    return graph;
  }

 private:
  cudaStream_t stream_;
  bool ended_ = false;
};

}  // namespace

CudaGraph::CudaGraph(std::span<const Part> parts, cudaStream_t stream) {
  Capture capture(stream);
  for (const Part& part : parts) {
    if (part.waits) capture.wait();
    const cudaGraphNode_t before = front_of(stream).last;
    part.launch(stream);
    nodes_.push_back(kernels_between(before, front_of(stream).last));
  }
  graph_ = capture.end();
  const cudaError_t code = cudaGraphInstantiate(&exec_, graph_, 0);
  if (code != cudaSuccess) cudaGraphDestroy(graph_);
  check_cuda(code, "cudaGraphInstantiate");
}

// The driver frees what launches under way still need when these have ended.
CudaGraph::~CudaGraph() {
  cudaGraphExecDestroy(exec_);
  cudaGraphDestroy(graph_);
}

bool CudaGraph::update(size_t part, const Part& launch, cudaStream_t stream) {
  Capture capture(stream);
  launch.launch(stream);
  const std::vector<cudaGraphNode_t> nodes = kernels_between(nullptr, front_of(stream).last);
  bool fits = !nodes.empty() && nodes.size() == nodes_[part].size();
  for (size_t index = 0; fits && index < nodes.size(); ++index) {
    CUDA_KERNEL_NODE_PARAMS params{};
    check_driver(driver().kernel_params(nodes[index], &params), "cuGraphKernelNodeGetParams");
    fits = driver().set_kernel_params(exec_, nodes_[part][index], &params) == CUDA_SUCCESS;
  }
  cudaGraphDestroy(capture.end());
  return fits;
}

void CudaGraph::replay(cudaStream_t stream) {
  check_cuda(cudaGraphLaunch(exec_, stream), "cudaGraphLaunch");
}

void CudaGraph::upload(cudaStream_t stream) {
  check_cuda(cudaGraphUpload(exec_, stream), "cudaGraphUpload");
}

}  // namespace modeltorch
