#pragma once

#include <cstdint>

namespace test {

/// Calls of any operator new of this program so far, on every thread.
int64_t allocation_count();

}  // namespace test
