#include "graph/trace.h"

#include <chrono>
#include <cstdio>

#include "core/check.h"
#include "core/environment.h"

namespace modeltorch {
namespace {

NodeObserver installed_observer;

int64_t now_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

std::string shapes(const std::vector<const TensorView*>& views) {
  std::string text;
  for (const TensorView* view : views) text += (text.empty() ? "" : " ") + concat(*view);
  return text;
}

bool observed() {
  return installed_observer.active != nullptr && installed_observer.active();
}

}  // namespace

void set_node_observer(const NodeObserver& observer) {
  installed_observer = observer;
}

bool tracing() {
  return environment().trace || observed();
}

NodeSpan::NodeSpan(const NodeEvent& event) : event_(event) {
  if (observed()) token_ = installed_observer.begin(event_);
  start_ns_ = now_ns();
}

NodeSpan::~NodeSpan() {
  const double microseconds = static_cast<double>(now_ns() - start_ns_) / 1e3;
  if (token_ != nullptr) installed_observer.end(token_);
  if (environment().trace) {
    std::fprintf(stderr, "%-40s %10.1f us  %s -> %s\n", event_.name.c_str(), microseconds,
                 shapes(event_.inputs).c_str(), shapes(event_.outputs).c_str());
  }
}

}  // namespace modeltorch
