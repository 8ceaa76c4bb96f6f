#pragma once

#include <string_view>

#include "core/device.h"
#include "graph/graph.h"

namespace modeltorch {

/// Replaces groups of nodes by a fused node. Returns true if it changed the graph.
///
/// A pass is registered under the name of the fused operation, and only runs for devices that have a kernel
/// of that name: a device that lacks it keeps the plain nodes. Passes run by descending rank, then by name:
/// one that takes whole groups of nodes comes before those that would take parts of them.
using FusionPass = bool (*)(Graph& graph);

bool register_fusion(std::string_view fused_operation, FusionPass pass, int rank = 0);

/// Applies every pass that `device` supports until none changes the graph.
void fuse(Graph& graph, DeviceType device);

}  // namespace modeltorch
