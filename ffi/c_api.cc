// The C interface of w4a16.h: checks every call once, then hands it to the CPU or CUDA half.
#include <algorithm>
#include <cstring>
#include <exception>

#include "cpu/cpu.h"
#include "cpu/thread_executor.h"
#include "heuristics.h"
#include "w4a16.h"
#ifdef W4A16_WITH_CUDA
#include "cuda/dispatch.h"
#endif

namespace w4a16 {
namespace {

w4a16_status ToC(const Status& status) {
  w4a16_status result = {status.code(), {}};
  const size_t length = std::min(status.message().size(), sizeof(result.message) - 1);
  std::memcpy(result.message, status.message().data(), length);
  return result;
}

w4a16_status Failed(const char* what) {
  w4a16_status result = {W4A16_INTERNAL, {}};
  std::strncpy(result.message, what, sizeof(result.message) - 1);
  return result;
}

// Runs `body`, which returns a Status; an exception (out of memory, or of a caller's executor)
// becomes a status too.
template <typename Body>
w4a16_status Guard(Body&& body) noexcept {
  try {
    return ToC(body());
  } catch (const std::exception& error) {
    return Failed(error.what());
  } catch (...) {
    return Failed("an exception of unknown type");
  }
}

// Runs `body(Executor&)` on the caller's executor, or on threads of our own.
class CallbackExecutor final : public cpu::Executor {
 public:
  explicit CallbackExecutor(const w4a16_executor& callbacks) : callbacks_(callbacks) {}
  int num_threads() const override { return callbacks_.num_threads; }
  void ParallelFor(int64_t num_tasks, const std::function<void(int64_t)>& body) override {
    callbacks_.parallel_for(
        callbacks_.context, num_tasks,
        [](void* arg, int64_t index) {
          (*static_cast<const std::function<void(int64_t)>*>(arg))(index);
        },
        const_cast<std::function<void(int64_t)>*>(&body));
  }

 private:
  w4a16_executor callbacks_;
};

template <typename Body>
Status OnExecutor(const w4a16_executor* callbacks, Body&& body) {
  if (callbacks == nullptr) {
    cpu::ThreadExecutor executor(0);
    body(executor);
  } else if (callbacks->parallel_for != nullptr) {
    CallbackExecutor executor(*callbacks);
    body(executor);
  } else {
    return Status::Invalid("executor: expected a parallel_for, got null");
  }
  return {};
}

Status CheckPresent(const char* name, const void* pointer) {
  if (pointer == nullptr)
    return Status::Invalid(std::string(name) + ": expected a pointer, got null");
  return {};
}

Status LookUp(const char* name, const Config** config) {
  if (Status s = CheckPresent("config", name); !s.ok()) return s;
  *config = FindConfig(name);
  if (*config == nullptr)
    return Status::Invalid("config: expected a compiled configuration, got \"" + std::string(name) +
                           "\"");
  return {};
}

Status CheckCall(const w4a16_problem* problem, const void* other, const char* other_name) {
  if (Status s = CheckPresent("problem", problem); !s.ok()) return s;
  if (Status s = CheckPresent(other_name, other); !s.ok()) return s;
  return CheckProblem(*problem);
}

Status CheckCall(const w4a16_problem* problem, int64_t experts, const void* other,
                 const char* other_name) {
  if (Status s = CheckCall(problem, other, other_name); !s.ok()) return s;
  return CheckRaggedProblem(*problem, experts);
}

// An array that the caller gives by `name`.
struct Values {
  const char* name;
  const void* data;
  DType dtype;
};

Status CheckType(const char* name, DType dtype) {
  if (dtype >= W4A16_F16 && dtype <= W4A16_F32) return {};
  return Status::Invalid(std::string(name) + ": unknown type " +
                         std::to_string(static_cast<int>(dtype)));
}

// The checks that dequantise and quantise share. `values` are [K, N].
Status CheckWeight(int64_t k, int64_t n, int64_t group_size, const uint32_t* qweight,
                   const void* scales, const void* zeros, DType scale_dtype, const Values& values) {
  if (Status s = CheckType(values.name, values.dtype); !s.ok()) return s;
  if (Status s = CheckType("scales", scale_dtype); !s.ok()) return s;
  const Problem p = {.m = 0,
                     .n = n,
                     .k = k,
                     .group_size = group_size,
                     .x_dtype = scale_dtype,
                     .out_dtype = scale_dtype,
                     .has_zeros = zeros != nullptr,
                     .has_bias = 0,
                     .batch_invariant = 0,
                     .epilogue = W4A16_NO_EPILOGUE};
  if (Status s = CheckProblem(p); !s.ok()) return s;
  const int64_t elements = NumGroups(p) * n;
  for (const Status& s :
       {CheckPointer(values.name, values.data, k * n), CheckPointer("qweight", qweight, k * n),
        CheckPointer("scales", scales, elements),
        CheckPointer("zeros", zeros, zeros == nullptr ? 0 : elements)}) {
    if (!s.ok()) return s;
  }
  return {};
}

Status CheckCodes(int64_t k, int64_t n, const uint32_t* qweight, const uint8_t* codes) {
  static const float kNoScales alignas(16) = 0;
  return CheckWeight(k, n, k, qweight, &kNoScales, nullptr, W4A16_F16, {"codes", codes, W4A16_F16});
}

#ifdef W4A16_WITH_CUDA
Status LookUpUnlessAuto(const char* name, const Config** config) {
  return name == nullptr || std::strcmp(name, "auto") == 0 ? Status() : LookUp(name, config);
}
#else
Status NoCuda() { return Status::Unsupported("this build has no CUDA kernels"); }
#endif

}  // namespace
}  // namespace w4a16

using namespace w4a16;

const char* w4a16_version(void) { return W4A16_VERSION; }

int w4a16_has_cuda(void) {
#ifdef W4A16_WITH_CUDA
  return 1;
#else
  return 0;
#endif
}

const char* w4a16_cuda_architectures(void) {
#ifdef W4A16_WITH_CUDA
  return W4A16_CUDA_ARCHITECTURES;
#else
  return "";
#endif
}

const char* w4a16_cpu_instruction_set(void) { return cpu::InstructionSet(); }

int w4a16_config_count(void) { return NumConfigs(); }

const char* w4a16_config_name(int index) {
  return index >= 0 && index < NumConfigs() ? ConfigAt(index).name : nullptr;
}

w4a16_status w4a16_select(const w4a16_problem* problem, const w4a16_device* device,
                          int64_t workspace_limit_bytes, const char** config) {
  return Guard([&]() -> Status {
    if (Status s = CheckCall(problem, device, "device"); !s.ok()) return s;
    if (Status s = CheckPresent("config", config); !s.ok()) return s;
    const Config* chosen = nullptr;
    if (Status s = Select(*problem, *device, workspace_limit_bytes, &chosen); !s.ok()) return s;
    *config = chosen->name;
    return {};
  });
}

w4a16_status w4a16_can_implement(const w4a16_problem* problem, const w4a16_device* device,
                                 const char* config) {
  return Guard([&]() -> Status {
    if (Status s = CheckCall(problem, device, "device"); !s.ok()) return s;
    const Config* found = nullptr;
    if (Status s = LookUp(config, &found); !s.ok()) return s;
    return CanImplement(*problem, *device, *found);
  });
}

w4a16_status w4a16_workspace_bytes(const w4a16_problem* problem, const w4a16_device* device,
                                   const char* config, int64_t* bytes) {
  return Guard([&]() -> Status {
    if (Status s = CheckCall(problem, device, "device"); !s.ok()) return s;
    if (Status s = CheckPresent("bytes", bytes); !s.ok()) return s;
    const Config* found = nullptr;
    if (Status s = LookUp(config, &found); !s.ok()) return s;
    *bytes = WorkspaceBytes(*problem, *device, *found);
    return {};
  });
}

w4a16_status w4a16_run_cpu(const w4a16_problem* problem, const w4a16_operands* operands,
                           const w4a16_executor* executor) {
  return Guard([&]() -> Status {
    if (Status s = CheckCall(problem, operands, "operands"); !s.ok()) return s;
    if (Status s = CheckOperands(*problem, *operands); !s.ok()) return s;
    if (problem->epilogue != W4A16_NO_EPILOGUE)
      return Status::Unsupported("epilogue: the CPU kernels have none");
    return OnExecutor(executor, [&](cpu::Executor& e) { cpu::Dot(*problem, *operands, e); });
  });
}

w4a16_status w4a16_ragged_select(const w4a16_problem* problem, int64_t experts,
                                 const w4a16_device* device, const char** config) {
  return Guard([&]() -> Status {
    if (Status s = CheckCall(problem, experts, device, "device"); !s.ok()) return s;
    if (Status s = CheckPresent("config", config); !s.ok()) return s;
    const Config* chosen = nullptr;
    if (Status s = SelectRagged(*problem, experts, *device, &chosen); !s.ok()) return s;
    *config = chosen->name;
    return {};
  });
}

w4a16_status w4a16_ragged_can_implement(const w4a16_problem* problem, int64_t experts,
                                        const w4a16_device* device, const char* config) {
  return Guard([&]() -> Status {
    if (Status s = CheckCall(problem, experts, device, "device"); !s.ok()) return s;
    const Config* found = nullptr;
    if (Status s = LookUp(config, &found); !s.ok()) return s;
    return CanImplementRagged(*problem, experts, *device, *found);
  });
}

w4a16_status w4a16_ragged_run_cpu(const w4a16_problem* problem, int64_t experts,
                                  const w4a16_operands* operands, const int32_t* group_sizes,
                                  const w4a16_executor* executor) {
  return Guard([&]() -> Status {
    if (Status s = CheckCall(problem, experts, operands, "operands"); !s.ok()) return s;
    const Experts e = {experts, group_sizes};
    if (Status s = CheckRaggedOperands(*problem, e, *operands); !s.ok()) return s;
    return OnExecutor(
        executor, [&](cpu::Executor& threads) { cpu::RaggedDot(*problem, e, *operands, threads); });
  });
}

w4a16_status w4a16_pack_cpu(const uint8_t* codes, int64_t k, int64_t n, uint32_t* qweight,
                            const w4a16_executor* executor) {
  return Guard([&]() -> Status {
    if (Status s = CheckCodes(k, n, qweight, codes); !s.ok()) return s;
    return OnExecutor(executor, [&](cpu::Executor& e) { cpu::Pack(codes, k, n, qweight, e); });
  });
}

w4a16_status w4a16_dequantize_cpu(const uint32_t* qweight, const void* scales, const void* zeros,
                                  w4a16_dtype scale_dtype, int64_t k, int64_t n, int64_t group_size,
                                  w4a16_dtype out_dtype, void* out,
                                  const w4a16_executor* executor) {
  return Guard([&]() -> Status {
    if (Status s = CheckWeight(k, n, group_size, qweight, scales, zeros, scale_dtype,
                               {"out", out, out_dtype});
        !s.ok())
      return s;
    return OnExecutor(executor, [&](cpu::Executor& e) {
      cpu::Dequantize(qweight, scales, zeros, scale_dtype, k, n, group_size, out_dtype, out, e);
    });
  });
}

w4a16_status w4a16_quantize_cpu(const void* w, w4a16_dtype w_dtype, int64_t k, int64_t n,
                                int64_t group_size, w4a16_dtype scale_dtype, uint32_t* qweight,
                                void* scales, void* zeros, const w4a16_executor* executor) {
  return Guard([&]() -> Status {
    if (Status s =
            CheckWeight(k, n, group_size, qweight, scales, zeros, scale_dtype, {"w", w, w_dtype});
        !s.ok())
      return s;
    return OnExecutor(executor, [&](cpu::Executor& e) {
      cpu::Quantize(w, w_dtype, k, n, group_size, scale_dtype, qweight, scales, zeros, e);
    });
  });
}

#ifdef W4A16_WITH_CUDA

w4a16_status w4a16_current_device(w4a16_device* device) {
  return Guard([&]() -> Status {
    if (Status s = CheckPresent("device", device); !s.ok()) return s;
    return CurrentDevice(device);
  });
}

w4a16_status w4a16_run_cuda(const w4a16_problem* problem, const w4a16_operands* operands,
                            const char* config, void* stream) {
  return Guard([&]() -> Status {
    if (Status s = CheckCall(problem, operands, "operands"); !s.ok()) return s;
    if (Status s = CheckOperands(*problem, *operands); !s.ok()) return s;
    const Config* found = nullptr;
    if (Status s = LookUpUnlessAuto(config, &found); !s.ok()) return s;
    return RunCuda(*problem, *operands, found, static_cast<cudaStream_t>(stream));
  });
}

w4a16_status w4a16_ragged_run_cuda(const w4a16_problem* problem, int64_t experts,
                                   const w4a16_operands* operands, const int32_t* group_sizes,
                                   const char* config, void* stream) {
  return Guard([&]() -> Status {
    if (Status s = CheckCall(problem, experts, operands, "operands"); !s.ok()) return s;
    const Experts e = {experts, group_sizes};
    if (Status s = CheckRaggedOperands(*problem, e, *operands); !s.ok()) return s;
    const Config* found = nullptr;
    if (Status s = LookUpUnlessAuto(config, &found); !s.ok()) return s;
    return RunRaggedCuda(*problem, e, *operands, found, static_cast<cudaStream_t>(stream));
  });
}

w4a16_status w4a16_pack_cuda(const uint8_t* codes, int64_t k, int64_t n, uint32_t* qweight,
                             void* stream) {
  return Guard([&]() -> Status {
    if (Status s = CheckCodes(k, n, qweight, codes); !s.ok()) return s;
    return PackCuda(codes, k, n, qweight, static_cast<cudaStream_t>(stream));
  });
}

w4a16_status w4a16_dequantize_cuda(const uint32_t* qweight, const void* scales, const void* zeros,
                                   w4a16_dtype scale_dtype, int64_t k, int64_t n,
                                   int64_t group_size, w4a16_dtype out_dtype, void* out,
                                   void* stream) {
  return Guard([&]() -> Status {
    if (Status s = CheckWeight(k, n, group_size, qweight, scales, zeros, scale_dtype,
                               {"out", out, out_dtype});
        !s.ok())
      return s;
    return DequantizeCuda(qweight, scales, zeros, scale_dtype, k, n, group_size, out_dtype, out,
                          static_cast<cudaStream_t>(stream));
  });
}

w4a16_status w4a16_quantize_cuda(const void* w, w4a16_dtype w_dtype, int64_t k, int64_t n,
                                 int64_t group_size, w4a16_dtype scale_dtype, uint32_t* qweight,
                                 void* scales, void* zeros, void* stream) {
  return Guard([&]() -> Status {
    if (Status s =
            CheckWeight(k, n, group_size, qweight, scales, zeros, scale_dtype, {"w", w, w_dtype});
        !s.ok())
      return s;
    return QuantizeCuda(w, w_dtype, k, n, group_size, scale_dtype, qweight, scales, zeros,
                        static_cast<cudaStream_t>(stream));
  });
}

w4a16_status w4a16_read_floor_cuda(const void* data, int64_t bytes, void* sink, void* stream) {
  return Guard([&]() -> Status {
    if (bytes < 0 || bytes % 16 != 0)
      return Status::Invalid("bytes: expected a multiple of 16, got " + std::to_string(bytes));
    if (Status s = CheckPointer("data", data, bytes); !s.ok()) return s;
    if (Status s = CheckPointer("sink", sink, bytes); !s.ok()) return s;
    return ReadFloorCuda(data, bytes, sink, static_cast<cudaStream_t>(stream));
  });
}

#else  // the same functions in a build without nvcc

w4a16_status w4a16_current_device(w4a16_device*) { return Guard(NoCuda); }
w4a16_status w4a16_run_cuda(const w4a16_problem*, const w4a16_operands*, const char*, void*) {
  return Guard(NoCuda);
}
w4a16_status w4a16_ragged_run_cuda(const w4a16_problem*, int64_t, const w4a16_operands*,
                                   const int32_t*, const char*, void*) {
  return Guard(NoCuda);
}
w4a16_status w4a16_pack_cuda(const uint8_t*, int64_t, int64_t, uint32_t*, void*) {
  return Guard(NoCuda);
}
w4a16_status w4a16_dequantize_cuda(const uint32_t*, const void*, const void*, w4a16_dtype, int64_t,
                                   int64_t, int64_t, w4a16_dtype, void*, void*) {
  return Guard(NoCuda);
}
w4a16_status w4a16_quantize_cuda(const void*, w4a16_dtype, int64_t, int64_t, int64_t, w4a16_dtype,
                                 uint32_t*, void*, void*, void*) {
  return Guard(NoCuda);
}
w4a16_status w4a16_read_floor_cuda(const void*, int64_t, void*, void*) { return Guard(NoCuda); }

#endif
