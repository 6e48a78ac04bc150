// Result of every call in the native library: ok, or a code with a message. Nothing is thrown.
#pragma once

#include <string>
#include <utility>

#include "w4a16.h"

namespace w4a16 {

class [[nodiscard]] Status {
 public:
  Status() = default;  // ok
  Status(w4a16_status_code code, std::string message) : code_(code), message_(std::move(message)) {}

  static Status Invalid(std::string message) {
    return {W4A16_INVALID_ARGUMENT, std::move(message)};
  }
  static Status Unsupported(std::string message) { return {W4A16_UNSUPPORTED, std::move(message)}; }
  static Status Internal(std::string message) { return {W4A16_INTERNAL, std::move(message)}; }

  bool ok() const { return code_ == W4A16_OK; }
  w4a16_status_code code() const { return code_; }
  const std::string& message() const { return message_; }

 private:
  w4a16_status_code code_ = W4A16_OK;
  std::string message_;
};

}  // namespace w4a16
