#include "ops/read_rate.h"

#include <atomic>
#include <cstring>

#include "core/check.h"
#include "core/parallel.h"

namespace modeltorch {
namespace {

typedef uint64_t Line __attribute__((vector_size(64), aligned(8), may_alias));
constexpr int64_t kStreams = 4;
constexpr int64_t kAhead = 32;  // lines that are asked for before they are read

uint64_t read_part(const Line* lines, int64_t count) {
  Line sums[kStreams] = {};
  const int64_t each = count / kStreams;
  for (int64_t index = 0; index < each; ++index) {
    for (int64_t stream = 0; stream < kStreams; ++stream) {
      const Line* line = lines + stream * each + index;
      __builtin_prefetch(line + kAhead);
      sums[stream] += *line;
    }
  }
  for (int64_t index = each * kStreams; index < count; ++index) sums[0] += lines[index];
  uint64_t total = 0;
  for (const Line& sum : sums) {
    for (int lane = 0; lane < 8; ++lane) total += sum[lane];
  }
  return total;
}

size_t whole_lines(int64_t bytes) {
  constexpr int64_t kMost = int64_t{1} << 40;
  check(bytes >= 1 && bytes <= kMost, "a read probe must have 1 to ", kMost, " bytes, got ", bytes);
  return (static_cast<size_t>(bytes) + sizeof(Line) - 1) / sizeof(Line) * sizeof(Line);
}

}  // namespace

ReadProbe::ReadProbe(int64_t bytes) : buffer_(whole_lines(bytes)) {
  std::memset(buffer_.data(), 1, buffer_.bytes());
}

uint64_t ReadProbe::read() const {
  std::atomic<uint64_t> total{0};
  const auto* lines = static_cast<const Line*>(buffer_.data());
  parallel_for(static_cast<int64_t>(bytes() / sizeof(Line)), 1,
               [&](int64_t begin, int64_t end) { total += read_part(lines + begin, end - begin); });
  return total.load();
}

}  // namespace modeltorch
