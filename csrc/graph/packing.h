#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "core/device.h"
#include "core/host_buffer.h"
#include "core/tensor_view.h"
#include "graph/operation.h"

namespace modeltorch {

/// Weights of one node in the form that a device's kernel reads. Made once, shared by every object that was
/// given equal tensors.
class PackedWeight {
 public:
  virtual ~PackedWeight() = default;
  virtual size_t bytes() const = 0;
};

using PackedWeightPtr = std::shared_ptr<const PackedWeight>;

/// How a device packs the weights of an operation.
struct WeightPacker {
  /// The positions of the node's inputs that the packed form replaces; empty: the kernel reads them as they
  /// are.
  std::vector<size_t> (*replaces)(const Operation& operation, const std::vector<TensorDesc>& inputs);

  /// A name for the form: equal tensors and equal names give equal bytes.
  std::string (*format)(const Operation& operation);

  /// A name for how elements lie in the form, with a version: it changes whenever `pack` would write other
  /// bytes, so that bytes which were kept in a file are not taken for the new ones. Null: the node only
  /// shares a form that another node has made of the same tensors, and otherwise reads them as they are.
  const char* layout = nullptr;

  /// The size of the packed form of the replaced inputs.
  size_t (*bytes)(const Operation& operation, const std::vector<TensorView>& replaced) = nullptr;

  /// Packs the replaced inputs, in order, into so many bytes; writes each of them.
  void (*pack)(const Operation& operation, const std::vector<TensorView>& replaced, std::byte* out) = nullptr;

  /// The packed form in bytes that `pack` wrote; looks at nothing of `replaced` but shapes.
  PackedWeightPtr (*adopt)(const Operation& operation, const std::vector<TensorView>& replaced,
                           HostBytes packed) = nullptr;
};

/// Makes a device's packer for an operation known; called by static objects of the device's files.
bool register_packer(std::string_view operation, DeviceType device, const WeightPacker& packer);

/// The packer for (operation, device), or null.
const WeightPacker* find_packer(std::string_view operation, DeviceType device);

}  // namespace modeltorch
