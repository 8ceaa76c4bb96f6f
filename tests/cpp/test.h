#pragma once

#include <chrono>
#include <cstdio>
#include <cstring>
#include <source_location>
#include <string>
#include <string_view>
#include <vector>

#include "core/check.h"

/// A test harness in a page. TEST(name) {...} registers a test; the first expectation that fails ends it.
namespace test {

using modeltorch::concat;
using modeltorch::Error;
using modeltorch::ErrorKind;

struct Case {
  std::string name;  ///< "planner_test.reuses_memory"
  void (*body)();
};

inline std::vector<Case>& cases() {
  static std::vector<Case> all;
  return all;
}

inline bool add_case(const char* file, const char* name, void (*body)()) {
  const char* slash = std::strrchr(file, '/');
  const std::string stem = slash == nullptr ? file : slash + 1;
  cases().push_back({stem.substr(0, stem.find('.')) + "." + name, body});
  return true;
}

struct Failure {
  std::string text;
};

inline int64_t expectations = 0;  ///< counted, so that a test which expects nothing can be told

/// A value that remembers the line it was written on.
template <class T>
struct Located {
  T value;
  std::source_location where;
  Located(T value, std::source_location where = std::source_location::current())
      : value(value), where(where) {}
};

/// Ends the test unless `condition` holds; the parts say what was tried.
template <class... Parts>
void expect(Located<bool> condition, const Parts&... parts) {
  ++expectations;
  if (!condition.value) throw Failure{concat("line ", condition.where.line(), ": ", parts...)};
}

/// Ends the test unless `call` throws an Error of this kind whose message holds every one of `texts`.
template <class Call, class... Texts>
void expect_throws(Call&& call, Located<ErrorKind> kind, const Texts&... texts) {
  constexpr const char* kKinds[] = {"value error", "not-implemented error", "runtime error"};
  const auto holds = [&](bool condition, const auto&... parts) { expect({condition, kind.where}, parts...); };
  try {
    call();
  } catch (const Error& error) {
    holds(error.kind() == kind.value, "expected a ", kKinds[static_cast<int>(kind.value)], ", got a ",
          kKinds[static_cast<int>(error.kind())], ": ", error.what());
    const std::string_view message = error.what();
    (holds(message.find(texts) != message.npos, "\"", texts, "\" is not in the message: ", message), ...);
    return;
  }
  holds(false, "nothing was thrown");
}

/// Runs the tests whose name holds `filter`. Returns the exit code.
inline int run_all(std::string_view filter) {
  const auto start = std::chrono::steady_clock::now();
  int ran = 0, failed = 0;
  for (const Case& test : cases()) {
    if (test.name.find(filter) == std::string::npos) continue;
    ++ran;
    std::string problem;
    const int64_t before = expectations;
    try {
      test.body();
      if (expectations == before) problem = "expects nothing";
    } catch (const Failure& failure) {
      problem = failure.text;
    } catch (const std::exception& error) {
      problem = concat("threw: ", error.what());
    }
    if (!problem.empty()) ++failed, std::printf("FAILED %s: %s\n", test.name.c_str(), problem.c_str());
  }
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  std::printf("%d tests, %lld expectations, %d failed, %.1f s\n", ran, static_cast<long long>(expectations),
              failed, seconds.count());
  return ran == 0 || failed > 0 ? 1 : 0;
}

}  // namespace test

#define TEST(name)                                                                                \
  static void name();                                                                             \
  [[maybe_unused]] static const bool registered_##name = ::test::add_case(__FILE__, #name, name); \
  static void name()
