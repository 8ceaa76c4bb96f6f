#include "core/parallel.h"

#include <algorithm>
#include <atomic>

namespace modeltorch {
namespace {

ParallelBackend installed_backend{
    .run = [](int64_t count, int64_t, ParallelBody body, void* context) { body(context, 0, count); },
    .width = [] { return int64_t{1}; },
    .set_width = [](int64_t) {},
};

std::atomic<int64_t> running_steps{0};
thread_local int64_t width_outside_share = 0;  // of this thread, while it has a share; else 0

}  // namespace

void set_parallel_backend(const ParallelBackend& backend) {
  installed_backend = backend;
}

const ParallelBackend& parallel_backend() {
  return installed_backend;
}

int64_t pool_width() {
  return width_outside_share > 0 ? width_outside_share : installed_backend.width();
}

ThreadShare::ThreadShare() : width_(installed_backend.width()) {
  const int64_t steps = running_steps.fetch_add(1) + 1;
  width_outside_share = width_;
  if (steps > 1) installed_backend.set_width(std::max<int64_t>(1, width_ / steps));
}

ThreadShare::~ThreadShare() {
  running_steps.fetch_sub(1);
  width_outside_share = 0;
  if (installed_backend.width() != width_) installed_backend.set_width(width_);
}

}  // namespace modeltorch
