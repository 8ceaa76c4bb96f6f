#include <algorithm>
#include <random>

#include "graph/memory_planner.h"
#include "test.h"

using namespace modeltorch;
using test::expect;

namespace {

using Random = std::mt19937_64;

size_t aligned(size_t bytes) {
  return (bytes + kArenaAlignment - 1) / kArenaAlignment * kArenaAlignment;
}

bool meet(const Lifetime& a, const Lifetime& b) {
  return std::max(a.first, b.first) <= std::min(a.last, b.last);
}

int64_t pick(Random& random, int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(random);
}

// Few sizes make ties, small spans make everything meet, and one tensor in eight is empty.
std::vector<Lifetime> random_lifetimes(Random& random) {
  const int64_t count = pick(random, 0, 32);
  const int64_t nodes = pick(random, 1, 40);
  const int64_t longest = pick(random, 0, nodes);
  const size_t largest = size_t{1} << pick(random, 0, 20);
  std::vector<Lifetime> lifetimes;
  for (int64_t index = 0; index < count; ++index) {
    const int64_t first = pick(random, 0, nodes - 1);
    const size_t bytes = pick(random, 0, 7) == 0 ? 0 : pick(random, 1, largest);
    lifetimes.push_back({bytes, first, std::min(nodes - 1, first + pick(random, 0, longest))});
  }
  return lifetimes;
}

// The most bytes alive at one node: no plan can do with less.
size_t most_alive(const std::vector<Lifetime>& lifetimes) {
  size_t most = 0;
  for (const Lifetime& at : lifetimes) {
    size_t alive = 0;
    for (const Lifetime& other : lifetimes) {
      if (other.first <= at.first && at.first <= other.last) alive += aligned(other.bytes);
    }
    most = std::max(most, alive);
  }
  return most;
}

void check_no_overlap(const std::vector<Lifetime>& lifetimes, const MemoryPlan& plan) {
  for (size_t a = 0; a < lifetimes.size(); ++a) {
    expect(plan.offsets[a] % kArenaAlignment == 0, "offset ", plan.offsets[a], " is not aligned");
    expect(plan.offsets[a] + lifetimes[a].bytes <= plan.arena_bytes, "tensor ", a, " leaves the arena");
    for (size_t b = a + 1; b < lifetimes.size(); ++b) {
      if (lifetimes[a].bytes == 0 || lifetimes[b].bytes == 0 || !meet(lifetimes[a], lifetimes[b])) continue;
      const bool apart = plan.offsets[a] + lifetimes[a].bytes <= plan.offsets[b] ||
                         plan.offsets[b] + lifetimes[b].bytes <= plan.offsets[a];
      expect(apart, "tensors ", a, " and ", b, " overlap");
    }
  }
}

// Every tensor is read by the next node only.
std::vector<Lifetime> chain(const std::vector<size_t>& sizes) {
  std::vector<Lifetime> lifetimes;
  for (size_t node = 0; node < sizes.size(); ++node) {
    lifetimes.push_back({sizes[node], static_cast<int64_t>(node), static_cast<int64_t>(node) + 1});
  }
  return lifetimes;
}

}  // namespace

TEST(random_lifetimes_never_overlap) {
  Random random(1);
  for (int trial = 0; trial < 5000; ++trial) {
    const std::vector<Lifetime> lifetimes = random_lifetimes(random);
    const MemoryPlan plan = plan_memory(lifetimes);
    expect(plan.offsets.size() == lifetimes.size(), "an offset for every tensor");
    check_no_overlap(lifetimes, plan);
    expect(plan.arena_bytes >= most_alive(lifetimes), "an arena below what is alive at once");
  }
}

// Largest first, lowest free offset: a tensor that misses another in time always fits into its place, so the
// arena is as large as all tensors together only if they all meet.
TEST(random_lifetimes_share_memory) {
  Random random(2);
  int shared = 0;
  for (int trial = 0; trial < 5000; ++trial) {
    std::vector<Lifetime> lifetimes = random_lifetimes(random);
    const size_t arena = plan_memory(lifetimes).arena_bytes;
    std::erase_if(lifetimes, [](const Lifetime& lifetime) { return lifetime.bytes == 0; });
    size_t sum = 0;
    bool all_meet = true;
    for (const Lifetime& a : lifetimes) {
      sum += aligned(a.bytes);
      for (const Lifetime& b : lifetimes) all_meet = all_meet && meet(a, b);
    }
    shared += !all_meet;
    expect(all_meet ? arena == sum : arena < sum, "arena ", arena, " for ", sum,
           " bytes, all meet: ", all_meet);
  }
  expect(shared > 1000, "only ", shared, " of the trials could share memory");
}

TEST(same_lifetimes_give_the_same_plan) {
  Random random(3);
  for (int trial = 0; trial < 500; ++trial) {
    const std::vector<Lifetime> lifetimes = random_lifetimes(random);
    const MemoryPlan first = plan_memory(lifetimes);
    const MemoryPlan second = plan_memory(std::vector<Lifetime>(lifetimes));
    expect(first.offsets == second.offsets && first.arena_bytes == second.arena_bytes, "plans differ");
  }
}

TEST(chains_take_what_two_neighbours_take) {
  const std::vector<std::vector<size_t>> chains = {
      {640},
      {640, 640, 640, 640, 640},
      {4096, 1024, 4096, 1024, 4096, 1024},
      {64, 128, 256, 512, 1024},
      {1000, 900, 800, 700, 10, 1},
      {1, 1, 1, 1},
  };
  for (const std::vector<size_t>& sizes : chains) {
    const std::vector<Lifetime> lifetimes = chain(sizes);
    const MemoryPlan plan = plan_memory(lifetimes);
    check_no_overlap(lifetimes, plan);
    expect(plan.arena_bytes == most_alive(lifetimes), "chain of ", sizes.size(), ": arena ", plan.arena_bytes,
           ", alive ", most_alive(lifetimes));
  }
}

// The reader of a tensor still reads while it writes its own output: lifetimes that share one node meet.
TEST(input_and_output_of_a_node_are_apart) {
  const MemoryPlan plan = plan_memory(chain({64, 64}));
  expect(plan.offsets[0] != plan.offsets[1] && plan.arena_bytes == 128, "arena ", plan.arena_bytes);
  const std::vector<Lifetime> later = {{64, 0, 1}, {64, 2, 3}};
  expect(plan_memory(later).arena_bytes == 64, "tensors that miss each other share their place");
}

// A small tensor goes into the lowest gap between tensors that are alive, not on top of them.
TEST(gaps_are_filled) {
  const std::vector<Lifetime> lifetimes = {{1024, 0, 1}, {640, 4, 9}, {512, 0, 9}, {384, 4, 9}};
  const MemoryPlan plan = plan_memory(lifetimes);
  check_no_overlap(lifetimes, plan);
  expect(plan.offsets == std::vector<size_t>{0, 0, 1024, 640} && plan.arena_bytes == 1536, "arena ",
         plan.arena_bytes);
}

TEST(empty_tensors_take_no_room) {
  const std::vector<Lifetime> lifetimes = {{0, 0, 5}, {100, 0, 5}, {0, 2, 3}};
  const MemoryPlan plan = plan_memory(lifetimes);
  expect(plan.arena_bytes == 128, "arena ", plan.arena_bytes);
  check_no_overlap(lifetimes, plan);
  expect(plan_memory(std::vector<Lifetime>{{0, 0, 0}}).arena_bytes == 0, "one empty tensor");
  const MemoryPlan nothing = plan_memory({});
  expect(nothing.arena_bytes == 0 && nothing.offsets.empty(), "no tensors at all");
}
