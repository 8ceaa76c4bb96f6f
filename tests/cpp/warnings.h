#pragma once

#include <cstdio>
#include <string>
#include <vector>

#include "core/warn.h"

namespace test {

/// While it lives, warnings are kept instead of shown.
class CapturedWarnings {
 public:
  CapturedWarnings() {
    messages.clear();
    modeltorch::set_warning_handler([](const std::string& message) { messages.push_back(message); });
  }
  ~CapturedWarnings() {
    modeltorch::set_warning_handler(
        [](const std::string& message) { std::fprintf(stderr, "%s\n", message.c_str()); });
  }
  CapturedWarnings(const CapturedWarnings&) = delete;
  CapturedWarnings& operator=(const CapturedWarnings&) = delete;

  static inline std::vector<std::string> messages;
};

}  // namespace test
