#include "core/host_buffer.h"

#include <cstdint>
#include <cstdlib>

#include "core/check.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace modeltorch {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kPage = 4096;

}  // namespace

HostBuffer::HostBuffer(size_t bytes) : bytes_(bytes) {
  const size_t alignment = bytes >= kHugePage ? kHugePage : kPage;
  const size_t rounded = (bytes + alignment - 1) / alignment * alignment;
  data_ = std::aligned_alloc(alignment, rounded == 0 ? alignment : rounded);
  if (data_ == nullptr) fail(ErrorKind::kRuntime, "out of memory: ", bytes, " bytes of host memory were asked for");
#if defined(__linux__)
  madvise(data_, rounded, MADV_HUGEPAGE);
#endif
}

HostBuffer::~HostBuffer() {
  std::free(data_);
}

void advise_unused([[maybe_unused]] const void* data, [[maybe_unused]] size_t bytes) {
#if defined(MADV_PAGEOUT)
  const auto begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const auto end = (reinterpret_cast<uintptr_t>(data) + bytes) / kPage * kPage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_PAGEOUT);
#endif
}

}  // namespace modeltorch
