// The vendor's operations that the Qwen2 graph uses but attention: what each wants of its tensors, and its
// arithmetic, which is that of our CPU kernels.

#include <atb/atb_infer.h>

#include <cmath>
#include <cstring>
#include <numeric>

#include "core/half_floats.h"
#include "driver/host_driver.h"
#include "ops/add.h"
#include "ops/gather_rows.h"
#include "ops/linear.h"
#include "ops/rms_norm.h"
#include "ops/rope.h"
#include "ops/swiglu.h"
#include "vendor/host_operation.h"

namespace ascend_host {
namespace {

using modeltorch::Dims;
using modeltorch::DType;
using modeltorch::Format;
using modeltorch::TensorView;

bool is_half(const TensorView& view) {
  return view.dtype == DType::kFloat16 || view.dtype == DType::kBFloat16;
}

// All tensors plain, of one half type, with the rank of the first.
std::string check_halves(const KernelTensors& tensors) {
  const DType dtype = tensors.inputs[0].dtype;
  for (const auto* side : {&tensors.inputs, &tensors.outputs}) {
    for (const TensorView& view : *side) {
      if (!is_half(view) || view.dtype != dtype) return "tensors of different or wrong data types";
      if (view.format != Format::kPlain) return "a tensor in tiles";
    }
  }
  return "";
}

// Computes with an operation of ours whose shape rule is the check.
template <class Make>
Behaviour like_ours(const char* name, size_t inputs, size_t outputs, Make make) {
  const auto check = [make](const KernelTensors& tensors) -> std::string {
    std::vector<modeltorch::TensorDesc> descs;
    for (const TensorView& view : tensors.inputs) {
      if (view.format != Format::kPlain) return "a tensor in tiles";
      descs.push_back({view.dtype, view.dims});
    }
    if (!is_half(tensors.inputs[0])) return "a wrong data type";
    try {
      const auto expected = make().infer_shape(descs);
      for (size_t index = 0; index < expected.size(); ++index) {
        const TensorView& given = tensors.outputs[index];
        if (given.dims == expected[index].dims && given.dtype == expected[index].dtype) continue;
        return modeltorch::concat("output ", index, " is ", given, " instead of ", expected[index]);
      }
    } catch (const modeltorch::Error& error) {
      return error.what();
    }
    return "";
  };
  const auto compute = [make](const KernelTensors& tensors) -> std::string {
    run_on_cpu(make(), tensors.inputs, tensors.outputs);
    return "";
  };
  return {name, inputs, outputs, check, compute};
}

Behaviour linear(const atb::infer::LinearParam& param) {
  const auto ours = [param] { return modeltorch::Linear({{param.transposeB, param.hasBias}}); };
  Behaviour behaviour = like_ours("LinearOperation", param.hasBias ? 3 : 2, 1, ours);
  // Only the weight may lie in tiles.
  const auto as_plain = [](KernelTensors tensors) {
    tensors.inputs[1].format = Format::kPlain;
    return tensors;
  };
  behaviour.check = [as_plain, check = behaviour.check, param](const KernelTensors& tensors) -> std::string {
    if (param.transposeA) return "transposeA is not built";
    return check(as_plain(tensors));
  };
  behaviour.compute = [as_plain, compute = behaviour.compute](const KernelTensors& tensors) {
    const TensorView& weight = tensors.inputs[1];
    if (weight.format == Format::kPlain) return compute(tensors);
    std::vector<std::byte> plain = to_plain(weight, weight.dims[0], weight.dims[1]);
    KernelTensors untiled = as_plain(tensors);
    untiled.inputs[1].data = plain.data();
    return compute(untiled);
  };
  return behaviour;
}

Behaviour gather(const atb::infer::GatherParam& param) {
  Behaviour behaviour = like_ours("GatherOperation", 2, 1, [] { return modeltorch::GatherRows(); });
  behaviour.check = [check = behaviour.check, param](const KernelTensors& tensors) {
    return param.axis == 0 ? check(tensors) : std::string("only axis 0 is built");
  };
  behaviour.compute = [compute = behaviour.compute](const KernelTensors& tensors) -> std::string {
    const TensorView& indices = tensors.inputs[1];
    for (int64_t row = 0; row < indices.dims[0]; ++row) {
      const int64_t index = indices.as<int64_t>()[row];
      if (index < 0 || index >= tensors.inputs[0].dims[0]) return "an index outside the table";
    }
    return compute(tensors);
  };
  return behaviour;
}

TensorView with_heads(TensorView view, int64_t head_size) {
  view.dims = {view.dims[0], view.dims[1] / head_size, head_size};
  return view;
}

Behaviour rope(const atb::infer::RopeParam& param) {
  const auto check = [param](const KernelTensors& tensors) -> std::string {
    if (param.rotaryCoeff != 2) return "only rotaryCoeff 2 is built";
    const auto& in = tensors.inputs;
    for (const TensorView& view : in) {
      if (view.format != Format::kPlain) return "a tensor in tiles";
    }
    for (int index = 0; index < 4; ++index) {
      if (in[index].dims.rank() != 2 || !is_half(in[index]) || in[index].dims[0] != in[0].dims[0])
        return "a wrong input";
    }
    const int64_t head_size = in[2].dims[1];
    if (!(in[3].dims == in[2].dims) || in[0].dims[1] % head_size != 0 || in[1].dims[1] % head_size != 0) {
      return "heads unlike cos and sin";
    }
    if (in[4].dtype != DType::kInt32 || in[4].dims.rank() != 1) return "lengths that are not int32 [B]";
    const bool fits = tensors.outputs[0].dims == in[0].dims && tensors.outputs[1].dims == in[1].dims;
    return fits ? "" : "outputs unlike the inputs";
  };
  const auto compute = [](const KernelTensors& tensors) -> std::string {
    const int64_t size = tensors.inputs[2].dims[1];
    run_on_cpu(modeltorch::Rope(),
               {with_heads(tensors.inputs[0], size), with_heads(tensors.inputs[1], size), tensors.inputs[2],
                tensors.inputs[3]},
               {with_heads(tensors.outputs[0], size), with_heads(tensors.outputs[1], size)});
    return "";
  };
  return {"RopeOperation", 5, 2, check, compute};
}

// Copies the columns of `parts`, side by side, from or to a matrix.
void copy_columns(const TensorView& whole, const std::vector<TensorView>& parts, bool to_parts) {
  const size_t element = modeltorch::dtype_size(whole.dtype);
  const size_t whole_row = whole.dims[1] * element;
  for (int64_t row = 0; row < whole.dims[0]; ++row) {
    std::byte* at = whole.as<std::byte>() + row * whole_row;
    for (const TensorView& part : parts) {
      const size_t part_row = part.dims[1] * element;
      std::byte* piece = part.as<std::byte>() + row * part_row;
      std::memcpy(to_parts ? piece : at, to_parts ? at : piece, part_row);
      at += part_row;
    }
  }
}

std::string check_columns(const TensorView& whole, const std::vector<TensorView>& parts) {
  int64_t columns = 0;
  for (const TensorView& part : parts) {
    if (part.dims.rank() != 2 || part.dims[0] != whole.dims[0]) return "parts with other rows";
    columns += part.dims[1];
  }
  return whole.dims.rank() == 2 && columns == whole.dims[1] ? "" : "parts that do not add up";
}

Behaviour split(const atb::infer::SplitParam& param) {
  const auto check = [param](const KernelTensors& tensors) -> std::string {
    if (param.splitDim != 1 && param.splitDim != -1) return "only the last axis is built";
    for (size_t part = 0; part < tensors.outputs.size(); ++part) {
      const int64_t wanted = param.splitSizes.size() == 0 ? tensors.inputs[0].dims[1] / param.splitNum
                                                          : param.splitSizes.at(part);
      if (tensors.outputs[part].dims.rank() != 2 || tensors.outputs[part].dims[1] != wanted)
        return "a part of another size";
    }
    const std::string fault = check_halves(tensors);
    return fault.empty() ? check_columns(tensors.inputs[0], tensors.outputs) : fault;
  };
  const auto compute = [](const KernelTensors& tensors) -> std::string {
    copy_columns(tensors.inputs[0], tensors.outputs, true);
    return "";
  };
  return {"SplitOperation", 1, static_cast<size_t>(param.splitNum), check, compute};
}

Behaviour concat(const atb::infer::ConcatParam& param) {
  const auto check = [param](const KernelTensors& tensors) -> std::string {
    if (param.concatDim != 1 && param.concatDim != -1) return "only the last axis is built";
    const std::string fault = check_halves(tensors);
    return fault.empty() ? check_columns(tensors.outputs[0], tensors.inputs) : fault;
  };
  const auto compute = [](const KernelTensors& tensors) -> std::string {
    copy_columns(tensors.outputs[0], tensors.inputs, false);
    return "";
  };
  return {"ConcatOperation", 2, 1, check, compute};
}

template <class T, class Body>
void each_value(const TensorView& out, Body body) {
  T* values = out.as<T>();
  for (int64_t index = 0; index < out.dims.count(); ++index) values[index] = T(body(index));
}

// out[i] = body(value of in 0, value of in 1 or 0) in float32.
template <class Body>
Behaviour element_wise(const char* name, size_t inputs, Body body) {
  const auto check = [](const KernelTensors& tensors) -> std::string {
    for (const TensorView& view : tensors.inputs) {
      if (!(view.dims == tensors.outputs[0].dims)) return "tensors of different shapes";
    }
    return check_halves(tensors);
  };
  const auto compute = [body](const KernelTensors& tensors) -> std::string {
    const auto values = [&]<class T>(T) {
      const T* a = tensors.inputs[0].as<T>();
      const T* b = tensors.inputs.back().as<T>();
      each_value<T>(tensors.outputs[0],
                    [&](int64_t i) { return body(static_cast<float>(a[i]), static_cast<float>(b[i])); });
    };
    if (tensors.outputs[0].dtype == DType::kFloat16) {
      values(modeltorch::Float16());
    } else {
      values(modeltorch::BFloat16());
    }
    return "";
  };
  return {name, inputs, 1, check, compute};
}

Behaviour activation(const atb::infer::ActivationParam& param) {
  if (param.activationType == atb::infer::ACTIVATION_SWIGLU_FORWARD) {
    return like_ours("ActivationOperation", 1, 1, [] { return modeltorch::SwiGlu(); });
  }
  return element_wise("ActivationOperation", 1, [](float x, float) { return x / (1.0f + std::exp(-x)); });
}

atb::Status hand_over(Behaviour behaviour, atb::Operation** operation) {
  *operation = new HostOperation(std::move(behaviour));
  return atb::NO_ERROR;
}

}  // namespace
}  // namespace ascend_host

namespace atb {

using namespace ascend_host;

template <>
Status CreateOperation(const infer::RmsNormParam& param, Operation** operation) {
  if (param.layerType != infer::RmsNormParam::RMS_NORM_NORM) return ERROR_INVALID_PARAM;
  const float epsilon = param.normParam.epsilon;
  return hand_over(like_ours("RmsNormOperation", 2, 1, [epsilon] { return modeltorch::RmsNorm(epsilon); }),
                   operation);
}

template <>
Status CreateOperation(const infer::LinearParam& param, Operation** operation) {
  return hand_over(linear(param), operation);
}

template <>
Status CreateOperation(const infer::GatherParam& param, Operation** operation) {
  return hand_over(gather(param), operation);
}

template <>
Status CreateOperation(const infer::RopeParam& param, Operation** operation) {
  return hand_over(rope(param), operation);
}

template <>
Status CreateOperation(const infer::SplitParam& param, Operation** operation) {
  return hand_over(split(param), operation);
}

template <>
Status CreateOperation(const infer::ConcatParam& param, Operation** operation) {
  return hand_over(concat(param), operation);
}

template <>
Status CreateOperation(const infer::ActivationParam& param, Operation** operation) {
  if (param.activationType == infer::ACTIVATION_UNDEFINED || param.dim != -1) return ERROR_INVALID_PARAM;
  return hand_over(activation(param), operation);
}

template <>
Status CreateOperation(const infer::ElewiseParam& param, Operation** operation) {
  if (param.elewiseType == infer::ElewiseParam::ELEWISE_ADD) {
    return hand_over(like_ours("ElewiseOperation", 2, 1, [] { return modeltorch::Add(); }), operation);
  }
  if (param.elewiseType != infer::ElewiseParam::ELEWISE_MUL) return ERROR_INVALID_PARAM;
  return hand_over(element_wise("ElewiseOperation", 2, [](float a, float b) { return a * b; }), operation);
}

}  // namespace atb
