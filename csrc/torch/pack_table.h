#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <string>
#include <vector>

#include "graph/pack_store.h"
#include "graph/packing.h"
#include "graph/runner.h"

namespace modeltorch {

/// The packed form of this key: that which some living object holds already, or else what `make` gives. With
/// a null `make` a form that nobody holds is null. The table is one for the process and holds weak references
/// only.
PackedWeightPtr shared_packed_weight(const std::string& key, const std::function<PackedWeightPtr()>& make);

/// Packs what the runner's device wants packed of its bound weights; `store` makes what the table does not
/// know. Tensors that no node reads as they are
/// any more are dropped from `weights`, and the operating system is told that their pages are not needed.
/// `progress` is called with the part of the bytes that is done, 0 to 1.
void pack_weights(GraphRunner& runner, std::vector<at::Tensor>& weights, PackStore& store,
                  const std::function<void(double)>& progress);

}  // namespace modeltorch
