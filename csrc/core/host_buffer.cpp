#include "core/host_buffer.h"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <vector>

#include "core/check.h"

#if defined(__linux__)
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace modeltorch {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kPage = 4096;

}  // namespace

// Whole huge pages only: what is left over takes small ones, or many small weights would waste a huge page
// each.
HostBuffer::HostBuffer(size_t bytes) : bytes_(bytes) {
  const size_t alignment = bytes >= kHugePage ? kHugePage : kPage;
  if (posix_memalign(&data_, alignment, std::max(bytes, kPage)) != 0) {
    fail(ErrorKind::kRuntime, "out of memory: ", bytes, " bytes of host memory were asked for");
  }
#if defined(__linux__)
  madvise(data_, bytes / kHugePage * kHugePage, MADV_HUGEPAGE);
#endif
}

HostBuffer::~HostBuffer() {
  std::free(data_);
}

#if defined(__linux__)

namespace {

// Lets go of the pages of [begin, end) that a file backs, which stay in the system's cache of the file. Pages
// of our own, and those of a private mapping that were written to, hold the only copy and stay. False if the
// system does not say which is which. (Documentation/admin-guide/mm/pagemap.rst)
bool drop_file_pages(uintptr_t begin, uintptr_t end, uintptr_t page) {
  constexpr uint64_t kPresent = uint64_t{1} << 63, kOfFile = uint64_t{1} << 61;
  constexpr uintptr_t kAtATime = 4096;
  const int pagemap = ::open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
  if (pagemap < 0) return false;
  std::vector<uint64_t> states(kAtATime);
  bool is_known = true;
  while (begin < end && is_known) {
    const size_t count = std::min(kAtATime, (end - begin) / page);
    const auto wanted = static_cast<ssize_t>(count * sizeof(uint64_t));
    const auto offset = static_cast<off_t>(begin / page * sizeof(uint64_t));
    is_known = ::pread(pagemap, states.data(), static_cast<size_t>(wanted), offset) == wanted;
    size_t first = 0;  // of a run of pages to drop
    for (size_t at = 0; at <= count && is_known; ++at) {
      const uint64_t state = at < count ? states[at] : 0;
      if ((state & kPresent) != 0 && (state & kOfFile) != 0) continue;
      if (first < at)
        madvise(reinterpret_cast<void*>(begin + first * page), (at - first) * page, MADV_DONTNEED);
      first = at + 1;
    }
    begin += count * page;
  }
  ::close(pagemap);
  return is_known;
}

}  // namespace

void advise_unused(const void* data, size_t bytes) {
  const auto page = static_cast<uintptr_t>(::sysconf(_SC_PAGESIZE));
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / page * page;
  if (begin >= end || drop_file_pages(begin, end, page)) return;
#if defined(MADV_PAGEOUT)
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_PAGEOUT);
#endif
}

#else

void advise_unused(const void*, size_t) {}

#endif

}  // namespace modeltorch
