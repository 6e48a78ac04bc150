// The XLA FFI handlers, as they are registered: platform -> target -> handler.
#pragma once

#include "xla/ffi/api/c_api.h"

namespace w4a16::xla {

struct Registration {
  const char* platform;  // "cpu" or "CUDA"
  const char* target;
  XLA_FFI_Handler* handler;
};

struct Registrations {
  const Registration* begin;
  const Registration* end;
};

// The CUDA ones only where the library was built with CUDA.
Registrations AllRegistrations();

}  // namespace w4a16::xla
