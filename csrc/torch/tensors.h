#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "core/device.h"
#include "models/model.h"

namespace modeltorch {

at::Device torch_device_of(Device device);

/// The device that must be torch's current one while something runs on `device`: none for those without
/// streams.
std::optional<at::Device> current_device_for(Device device);

/// The description of a caller's tensor. The tensor keeps owning its memory.
GivenTensor describe(const at::Tensor& tensor);
std::vector<GivenTensor> describe(const std::vector<at::Tensor>& tensors);

/// What kernels see of described tensors.
std::vector<TensorView> views_of(const std::vector<GivenTensor>& given);

/// Installs what tells how a tensor on Ascend lies in memory. Called once, at load, by builds that know
/// Ascend.
void set_format_reader(Format (*reader)(const at::Tensor& tensor));

/// A fresh tensor, uninitialised.
at::Tensor make_tensor(const TensorDesc& desc, Device device);

}  // namespace modeltorch
