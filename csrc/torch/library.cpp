// The door: torch.classes.ModelTorch.ModelTorch and torch.classes.ModelTorch.Operation.

#include <torch/custom_class.h>
#include <torch/library.h>

#include <atomic>
#include <chrono>
#include <optional>

#include "core/cpu_level.h"
#include "graph/kernel.h"
#include "ops/read_rate.h"
#include "torch/errors.h"
#include "torch/model_object.h"
#include "torch/operation_object.h"

namespace modeltorch {
namespace {

/// torch.classes.ModelTorch.ReadProbe(bytes): seconds() reads so much memory once, with every thread.
class ReadProbeObject final : public torch::CustomClassHolder {
 public:
  explicit ReadProbeObject(int64_t bytes) {
    translate_errors("ReadProbe", [&] { probe_.emplace(bytes); });
  }

  double seconds() {
    const auto start = std::chrono::steady_clock::now();
    checksum_.fetch_add(probe_->read(), std::memory_order_relaxed);
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  }

 private:
  std::optional<ReadProbe> probe_;
  std::atomic<uint64_t> checksum_{0};
};

TORCH_LIBRARY(ModelTorch, library) {
  library.class_<ModelObject>("ModelTorch")
      .def(torch::init<std::string>())
      .def("set_param", &ModelObject::set_param)
      .def("set_weight", &ModelObject::set_weight)
      .def("set_kv_cache", &ModelObject::set_kv_cache)
      .def("set_format_to_nz", &ModelObject::set_format_to_nz)
      .def("execute", &ModelObject::execute)
      .def("execute_out", &ModelObject::execute_out)
      .def("settle", &ModelObject::settle)
      .def("graph", &ModelObject::graph)
      .def("counters", &ModelObject::counters)
      .def("weight_spec", &ModelObject::weight_spec)
      .def("progress", &ModelObject::progress);
  library.class_<OperationObject>("Operation")
      .def(torch::init<std::string, c10::Dict<std::string, double>>())
      .def("run", &OperationObject::run);
  library.class_<ReadProbeObject>("ReadProbe")
      .def(torch::init<int64_t>())
      .def("seconds", &ReadProbeObject::seconds);
  library.def("devices() -> str[]", []() {
    std::vector<std::string> devices{"cpu"};
    if (find_kernel("Linear", DeviceType::kCuda) != nullptr) devices.emplace_back("cuda");
    if (find_kernel("Linear", DeviceType::kNpu) != nullptr) devices.emplace_back("npu");
    return devices;
  });
  library.def("cpu_level() -> str", []() {
    return translate_errors("cpu_level", [] { return std::string(cpu_level_name(cpu_level())); });
  });
}

}  // namespace
}  // namespace modeltorch
