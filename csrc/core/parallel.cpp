#include "core/parallel.h"

namespace modeltorch {
namespace {

ParallelBackend installed_backend{
    .run = [](int64_t count, int64_t, ParallelBody body, void* context) { body(context, 0, count); },
    .width = [] { return int64_t{1}; },
};

}  // namespace

void set_parallel_backend(const ParallelBackend& backend) {
  installed_backend = backend;
}

const ParallelBackend& parallel_backend() {
  return installed_backend;
}

}  // namespace modeltorch
