#pragma once

#include <c10/util/Exception.h>

#include <string>

#include "core/check.h"

namespace modeltorch {

/// Throws the torch exception that becomes the right Python one; the message begins with `where`.
[[noreturn]] inline void throw_torch_error(const Error& error, const std::string& where) {
  const std::string message = where + ": " + error.what();
  if (error.kind() == ErrorKind::kValue) TORCH_CHECK_VALUE(false, message);
  if (error.kind() == ErrorKind::kNotImplemented) TORCH_CHECK_NOT_IMPLEMENTED(false, message);
  TORCH_CHECK(false, message);
}

/// Runs `body`; an Error that it throws leaves as a torch exception.
template <class Body>
auto translate_errors(const std::string& where, Body&& body) {
  try {
    return body();
  } catch (const Error& error) {
    throw_torch_error(error, where);
  }
}

}  // namespace modeltorch
