#pragma once

#include <cstdint>
#include <memory>
#include <type_traits>

namespace modeltorch {

/// Runs `body(context, begin, end)` over disjoint parts of [0, count), on several threads where that pays.
using ParallelBody = void (*)(void* context, int64_t begin, int64_t end);

/// A thread pool.
struct ParallelBackend {
  void (*run)(int64_t count, int64_t grain, ParallelBody body, void* context) = nullptr;
  int64_t (*width)() = nullptr;          ///< threads that a run of the calling thread may use
  void (*set_width)(int64_t) = nullptr;  ///< changes that for the calling thread alone
};

/// Installs the thread pool. Called once, at load; until then everything runs on the calling thread.
void set_parallel_backend(const ParallelBackend& backend);
const ParallelBackend& parallel_backend();

/// Threads that a run may use when no other step shares the pool: what a plan makes room for.
int64_t pool_width();

/// The calling thread's share of the pool for as long as it lives: steps that run at the same time divide the
/// threads between them instead of each waking all of them.
class ThreadShare {
 public:
  ThreadShare();
  ~ThreadShare();
  ThreadShare(const ThreadShare&) = delete;
  ThreadShare& operator=(const ThreadShare&) = delete;

 private:
  int64_t width_;
};

/// Calls `body(begin, end)` over disjoint parts of [0, count). A part has at least `grain` items unless it is
/// the last one; a range no longer than `grain` runs on the calling thread.
template <class Body>
void parallel_for(int64_t count, int64_t grain, Body&& body) {
  if (count <= 0) return;
  if (count <= grain) return body(int64_t{0}, count);
  using Plain = std::remove_reference_t<Body>;
  const ParallelBody call = [](void* context, int64_t begin, int64_t end) {
    (*static_cast<Plain*>(context))(begin, end);
  };
  parallel_backend().run(count, grain, call,
                         const_cast<void*>(static_cast<const void*>(std::addressof(body))));
}

}  // namespace modeltorch
