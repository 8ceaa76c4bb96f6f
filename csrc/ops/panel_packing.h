#pragma once

#include <string>
#include <vector>

#include "ops/linear.h"
#include "ops/panel_weight.h"

namespace modeltorch {

/// Whether a matrix that is a gate and, below it, what the gate lets through is packed as a gated
/// PanelWeight.
enum class PanelOrder : uint8_t {
  kPlain,
  kGated,  ///< where both halves are whole panels and there is no bias; else plain
};

/// See WeightPacker: `replaced` are the weights and biases of the parts in order.
std::vector<size_t> replaced_by_panels(const std::vector<TensorDesc>& inputs);
std::string panel_format(const std::vector<LinearPart>& parts, PanelOrder order);
size_t panel_bytes(const std::vector<LinearPart>& parts, const std::vector<TensorView>& replaced);
void pack_panels(const std::vector<LinearPart>& parts, PanelOrder order,
                 const std::vector<TensorView>& replaced, std::byte* out);
PackedWeightPtr adopt_panels(const std::vector<LinearPart>& parts, PanelOrder order,
                             const std::vector<TensorView>& replaced, HostBytes packed);

/// The packer of an operation whose inputs are x and then the tensors of `Op::parts`.
template <class Op, PanelOrder order>
WeightPacker panel_packer() {
  using Tensors = std::vector<TensorView>;
  return {
      .replaces = [](const Operation&,
                     const std::vector<TensorDesc>& inputs) { return replaced_by_panels(inputs); },
      .format = [](const Operation& op) { return panel_format(dynamic_cast<const Op&>(op).parts, order); },
      .layout = kPanelLayout,
      .bytes =
          [](const Operation& op, const Tensors& replaced) {
            return panel_bytes(dynamic_cast<const Op&>(op).parts, replaced);
          },
      .pack = [](const Operation& op, const Tensors& replaced,
                 std::byte* out) { pack_panels(dynamic_cast<const Op&>(op).parts, order, replaced, out); },
      .adopt =
          [](const Operation& op, const Tensors& replaced, HostBytes packed) {
            return adopt_panels(dynamic_cast<const Op&>(op).parts, order, replaced, std::move(packed));
          }};
}

}  // namespace modeltorch
