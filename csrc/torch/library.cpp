// The door: torch.classes.ModelTorch.ModelTorch and torch.classes.ModelTorch.Operation.

#include <torch/custom_class.h>
#include <torch/library.h>

#include "core/check.h"
#include "core/cpu_level.h"
#include "ops/read_rate.h"
#include "torch/errors.h"
#include "torch/model_object.h"
#include "torch/operation_object.h"

namespace modeltorch {
namespace {

TORCH_LIBRARY(ModelTorch, library) {
  library.class_<ModelObject>("ModelTorch")
      .def(torch::init<std::string>())
      .def("set_param", &ModelObject::set_param)
      .def("set_weight", &ModelObject::set_weight)
      .def("set_kv_cache", &ModelObject::set_kv_cache)
      .def("execute", &ModelObject::execute)
      .def("execute_out", &ModelObject::execute_out)
      .def("graph", &ModelObject::graph)
      .def("counters", &ModelObject::counters)
      .def("weight_spec", &ModelObject::weight_spec)
      .def("progress", &ModelObject::progress);
  library.class_<OperationObject>("Operation")
      .def(torch::init<std::string, c10::Dict<std::string, double>>())
      .def("run", &OperationObject::run);
  library.def("read_all(Tensor data) -> int", [](const at::Tensor& data) {
    return translate_errors("read_all", [&] {
      check(data.is_cpu() && data.is_contiguous(), "data must be a contiguous tensor on the cpu");
      return static_cast<int64_t>(read_all(data.const_data_ptr(), data.nbytes()));
    });
  });
  library.def("cpu_level() -> str", []() {
    return translate_errors("cpu_level", [] { return std::string(cpu_level_name(cpu_level())); });
  });
}

}  // namespace
}  // namespace modeltorch
