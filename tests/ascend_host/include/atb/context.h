#pragma once

#include "atb/types.h"

namespace atb {

class Context {
 public:
  virtual ~Context() = default;
  virtual Status SetExecuteStream(aclrtStream stream) = 0;
  virtual aclrtStream GetExecuteStream() const = 0;
};

Status CreateContext(Context** context);
Status DestroyContext(Context* context);

}  // namespace atb
