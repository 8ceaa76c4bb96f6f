#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace modeltorch {

/// What kind of Python exception an error becomes at the door.
enum class ErrorKind {
  kValue,           ///< the caller passed something wrong: ValueError
  kNotImplemented,  ///< understood, but not built: NotImplementedError
  kRuntime,         ///< the object's state or the machine is at fault: RuntimeError
};

/// The only exception type of this library.
class Error : public std::runtime_error {
 public:
  Error(ErrorKind kind, const std::string& message) : std::runtime_error(message), kind_(kind) {}

  ErrorKind kind() const { return kind_; }

 private:
  ErrorKind kind_;
};

/// Streams every part into one string.
template <class... Parts>
std::string concat(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

/// Throws Error(kind) with the streamed parts as message.
template <class... Parts>
[[noreturn]] void fail(ErrorKind kind, const Parts&... parts) {
  throw Error(kind, concat(parts...));
}

/// Throws a value error with the streamed parts unless `condition` holds. Parts are only formatted on
/// failure.
template <class... Parts>
inline void check(bool condition, const Parts&... parts) {
  if (!condition) [[unlikely]] {
    fail(ErrorKind::kValue, parts...);
  }
}

}  // namespace modeltorch
