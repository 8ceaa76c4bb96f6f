// Device memory on the host. Fresh memory and freed memory are full of 0xff: NaN as a float, -1 as an
// integer.

#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>

#include "host_driver.h"

namespace {

constexpr size_t kAlignment = 512;
constexpr size_t kTotalBytes = size_t{1} << 30;
constexpr size_t kQuarantineBytes = size_t{128} << 20;
constexpr int kPoison = 0xff;

struct Memory {
  std::mutex mutex;
  std::map<uintptr_t, size_t> live;                 // start -> bytes
  std::deque<std::pair<void*, size_t>> quarantine;  // freed, poisoned, not yet given back to the system
  size_t live_bytes = 0;
  size_t quarantine_bytes = 0;
};

Memory& memory() {
  static Memory& instance = *new Memory;
  return instance;
}

aclError allocate(void** data, size_t bytes) {
  if (const aclError code = ascend_host::take_fault("malloc", ACL_ERROR_RT_MEMORY_ALLOCATION)) return code;
  Memory& all = memory();
  const std::lock_guard lock(all.mutex);
  if (all.live_bytes + bytes > kTotalBytes) return ACL_ERROR_RT_MEMORY_ALLOCATION;
  const size_t rounded = (bytes + kAlignment - 1) / kAlignment * kAlignment;
  void* fresh = std::aligned_alloc(kAlignment, rounded == 0 ? kAlignment : rounded);
  if (fresh == nullptr) return ACL_ERROR_RT_MEMORY_ALLOCATION;
  std::memset(fresh, kPoison, rounded);
  all.live[reinterpret_cast<uintptr_t>(fresh)] = bytes;
  all.live_bytes += bytes;
  *data = fresh;
  ascend_host::count("allocations");
  return ACL_SUCCESS;
}

}  // namespace

bool ascend_host::is_device_memory(const void* data, size_t bytes) {
  Memory& all = memory();
  const std::lock_guard lock(all.mutex);
  const auto start = reinterpret_cast<uintptr_t>(data);
  auto after = all.live.upper_bound(start);
  if (after == all.live.begin()) return false;
  const auto& [base, size] = *--after;
  return start + bytes <= base + size;
}

extern "C" {

aclError aclrtMalloc(void** data, size_t bytes, aclrtMemMallocPolicy) {
  return allocate(data, bytes);
}

aclError aclrtMallocAlign32(void** data, size_t bytes, aclrtMemMallocPolicy) {
  return allocate(data, bytes);
}

aclError aclrtFree(void* data) {
  Memory& all = memory();
  const std::lock_guard lock(all.mutex);
  const auto found = all.live.find(reinterpret_cast<uintptr_t>(data));
  if (found == all.live.end()) return ACL_ERROR_RT_PARAM_INVALID;
  const size_t bytes = found->second;
  all.live.erase(found);
  all.live_bytes -= bytes;
  std::memset(data, kPoison, bytes);
  all.quarantine.emplace_back(data, bytes);
  all.quarantine_bytes += bytes;
  while (all.quarantine_bytes > kQuarantineBytes) {
    std::free(all.quarantine.front().first);
    all.quarantine_bytes -= all.quarantine.front().second;
    all.quarantine.pop_front();
  }
  return ACL_SUCCESS;
}

aclError aclrtMallocHost(void** data, size_t bytes) {
  *data = std::malloc(bytes == 0 ? 1 : bytes);
  return *data == nullptr ? ACL_ERROR_BAD_ALLOC : ACL_SUCCESS;
}

aclError aclrtFreeHost(void* data) {
  std::free(data);
  return ACL_SUCCESS;
}

// As the real one, it does not wait for any stream.
aclError aclrtMemcpy(void* to, size_t capacity, const void* from, size_t bytes, aclrtMemcpyKind) {
  if (bytes > capacity) return ACL_ERROR_RT_PARAM_INVALID;
  std::memcpy(to, from, bytes);
  return ACL_SUCCESS;
}

aclError aclrtMemcpyAsync(void* to, size_t capacity, const void* from, size_t bytes, aclrtMemcpyKind,
                          aclrtStream stream) {
  if (bytes > capacity) return ACL_ERROR_RT_PARAM_INVALID;
  ascend_host::enqueue(stream, [=]() -> aclError {
    std::memcpy(to, from, bytes);
    return ACL_SUCCESS;
  });
  return ACL_SUCCESS;
}

aclError aclrtMemset(void* data, size_t capacity, int32_t value, size_t bytes) {
  if (bytes > capacity) return ACL_ERROR_RT_PARAM_INVALID;
  std::memset(data, value, bytes);
  return ACL_SUCCESS;
}

aclError aclrtMemsetAsync(void* data, size_t capacity, int32_t value, size_t bytes, aclrtStream stream) {
  if (bytes > capacity) return ACL_ERROR_RT_PARAM_INVALID;
  ascend_host::enqueue(stream, [=]() -> aclError {
    std::memset(data, value, bytes);
    return ACL_SUCCESS;
  });
  return ACL_SUCCESS;
}

aclError aclrtGetMemInfo(aclrtMemAttr, size_t* free, size_t* total) {
  const std::lock_guard lock(memory().mutex);
  *total = kTotalBytes;
  *free = kTotalBytes - memory().live_bytes;
  return ACL_SUCCESS;
}

}  // extern "C"
