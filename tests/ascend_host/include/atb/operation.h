#pragma once

#include <string>

#include "atb/context.h"
#include "atb/types.h"

namespace atb {

class Operation {
 public:
  virtual ~Operation() = default;
  virtual std::string GetName() const = 0;
  virtual Status Setup(const VariantPack& tensors, uint64_t& workspaceSize, Context* context) = 0;
  virtual Status Execute(const VariantPack& tensors, uint8_t* workspace, uint64_t workspaceSize,
                         Context* context) = 0;
};

template <class Param>
Status CreateOperation(const Param& param, Operation** operation);

Status DestroyOperation(Operation* operation);

}  // namespace atb
