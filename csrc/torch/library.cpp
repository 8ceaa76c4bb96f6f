// The door: torch.classes.ModelTorch.ModelTorch.

#include <torch/custom_class.h>
#include <torch/library.h>

#include "ops/rows.h"
#include "torch/model_object.h"

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
  library.def("cpu_level() -> str", []() { return std::string(cpu_level()); });
}

}  // namespace
}  // namespace modeltorch
