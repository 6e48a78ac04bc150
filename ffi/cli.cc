// w4a16: checks and times one product without Python or JAX.
//
//   w4a16 M N K [--group-size G] [--dtype float16|bfloat16] [--zeros] [--bias] [--config
//   NAME|auto|cpu]
//               [--repeats R] [--sweep] [--json]
//
// Prints the device, the chosen kernel, the largest error against a double-precision reference, the
// time of a call, TFLOP/s and GB/s. --sweep does so for M = 1, 2, 4 ... up to the given M, as a
// table. Exit status 0: all results were right; 1: one was not; 2: the call could not be made.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <string>
#include <thread>

#include "reference.h"
#include "w4a16.h"
#ifdef W4A16_WITH_CUDA
#include <cuda_runtime_api.h>
#endif

namespace w4a16 {
namespace {

constexpr const char* kUsage =
    "usage: w4a16 M N K [--group-size G (-1: per column)] [--dtype float16|bfloat16] [--zeros] "
    "[--bias]\n"
    "                   [--config NAME|auto|cpu] [--repeats R (0: check only)] [--sweep] "
    "[--json]\n";

[[noreturn]] void Die(const std::string& message) {
  std::fprintf(stderr, "w4a16: %s\n", message.c_str());
  std::exit(2);
}

void Check(const w4a16_status& status) {
  if (status.code != W4A16_OK) Die(status.message);
}

struct Options {
  int64_t m = 0, n = 0, k = 0, group_size = 128;
  DType dtype = W4A16_F16;
  bool zeros = false, bias = false, sweep = false, json = false;
  std::string config = "auto";
  int repeats = 50;
};

int64_t ParseInt(const char* text) {
  char* end = nullptr;
  const long long value = std::strtoll(text, &end, 10);
  if (*text == '\0' || *end != '\0') Die(std::string("expected a number, got \"") + text + "\"");
  return value;
}

Options Parse(int argc, char** argv) {
  Options options;
  int64_t* sizes[] = {&options.m, &options.n, &options.k};
  int num_sizes = 0;
  for (int i = 1; i < argc; ++i) {
    const std::string arg = argv[i];
    const auto value = [&]() -> const char* {
      if (i + 1 == argc) Die(arg + ": expected a value");
      return argv[++i];
    };
    if (arg == "--help" || arg == "-h") {
      std::fputs(kUsage, stdout);
      std::exit(0);
    } else if (arg == "--group-size") {
      options.group_size = ParseInt(value());
    } else if (arg == "--dtype") {
      const std::string name = value();
      if (name != "float16" && name != "bfloat16")
        Die("--dtype: expected float16 or bfloat16, got " + name);
      options.dtype = name == "float16" ? W4A16_F16 : W4A16_BF16;
    } else if (arg == "--config") {
      options.config = value();
    } else if (arg == "--repeats") {
      options.repeats = static_cast<int>(ParseInt(value()));
    } else if (arg == "--zeros") {
      options.zeros = true;
    } else if (arg == "--bias") {
      options.bias = true;
    } else if (arg == "--sweep") {
      options.sweep = true;
    } else if (arg == "--json") {
      options.json = true;
    } else if (num_sizes < 3 && arg[0] != '-') {
      *sizes[num_sizes++] = ParseInt(arg.c_str());
    } else {
      Die("unknown argument " + arg + "\n" + kUsage);
    }
  }
  if (num_sizes != 3) Die(std::string("expected M N K\n") + kUsage);
  return options;
}

struct Outcome {
  std::string device, kernel;
  double us = 0;            // median time of a call; 0 if not timed
  double worst_error = 0;   // largest |error| / tolerance
  int64_t num_checked = 0;  // outputs compared
};

// Compares every output, or a sample of 8,192 with all corners where there are too many to compute.
void Compare(const HostCase& host, const HostArray& out, Outcome* outcome) {
  const int64_t m = host.problem.m, n = host.problem.n, total = m * n;
  const double work = static_cast<double>(total) * std::max<int64_t>(host.problem.k, 1);
  const bool all = work <= 3e8;
  std::mt19937_64 random(1);
  const int64_t count = all ? total : std::min<int64_t>(total, 8192);
  const int64_t corners[] = {0, n - 1, total - n, total - 1};
  for (int64_t i = 0; i < count; ++i) {
    const int64_t at = all ? i : i < 4 ? corners[i] : static_cast<int64_t>(random() % total);
    const auto expected = host.Reference(at / n, at % n);
    const double error = std::abs(out[at] - expected.value) / host.Tolerance(expected);
    if (!(error <= outcome->worst_error)) outcome->worst_error = error;  // keeps a NaN too
  }
  outcome->num_checked = count;
}

double Median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + values.size() / 2, values.end());
  return values[values.size() / 2];
}

Outcome RunOnCpu(const HostCase& host, int repeats) {
  const Problem& p = host.problem;
  // The interface wants addresses aligned to 16 bytes; malloc and so vector give that.
  HostArray out(p.out_dtype, p.m * p.n);
  const Operands operands = {.x = host.x.bytes.data(),
                             .qweight = host.qweight.data(),
                             .scales = host.scales.bytes.data(),
                             .zeros = p.has_zeros ? host.zeros.bytes.data() : nullptr,
                             .bias = p.has_bias ? host.bias.bytes.data() : nullptr,
                             .out = out.bytes.data(),
                             .workspace = nullptr,
                             .workspace_bytes = 0,
                             .alpha = host.alpha};
  std::fill(out.bytes.begin(), out.bytes.end(), 0xff);  // NaN
  Check(w4a16_run_cpu(&p, &operands, nullptr));
  Outcome outcome;
  outcome.device = "CPU, " + std::to_string(std::thread::hardware_concurrency()) + " threads";
  outcome.kernel = std::string("cpu_") + w4a16_cpu_instruction_set();
  Compare(host, out, &outcome);
  std::vector<double> times;
  for (int i = 0; i < repeats; ++i) {
    const auto start = std::chrono::steady_clock::now();
    Check(w4a16_run_cpu(&p, &operands, nullptr));
    const std::chrono::duration<double, std::micro> elapsed =
        std::chrono::steady_clock::now() - start;
    times.push_back(elapsed.count());
  }
  if (!times.empty()) outcome.us = Median(times);
  return outcome;
}

#ifdef W4A16_WITH_CUDA

void Check(cudaError_t error, const char* call) {
  if (error != cudaSuccess) Die(std::string(call) + ": " + cudaGetErrorString(error));
}
#define CHECK_CUDA(call) Check((call), #call)

class DeviceBytes {
 public:
  explicit DeviceBytes(size_t size) : size_(size) {
    if (size > 0) CHECK_CUDA(cudaMalloc(&data_, size));
  }
  template <typename T>
  explicit DeviceBytes(const std::vector<T>& host) : DeviceBytes(host.size() * sizeof(T)) {
    if (size_ > 0) CHECK_CUDA(cudaMemcpy(data_, host.data(), size_, cudaMemcpyHostToDevice));
  }
  DeviceBytes(DeviceBytes&& other) noexcept : data_(other.data_), size_(other.size_) {
    other.data_ = nullptr;
  }
  DeviceBytes& operator=(DeviceBytes&&) = delete;
  ~DeviceBytes() { cudaFree(data_); }
  void* get() const { return data_; }
  size_t size() const { return size_; }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

Outcome RunOnGpu(const HostCase& host, std::string config, int repeats) {
  const Problem& p = host.problem;
  Outcome outcome;
  int ordinal = 0;
  cudaDeviceProp properties;
  CHECK_CUDA(cudaGetDevice(&ordinal));
  CHECK_CUDA(cudaGetDeviceProperties(&properties, ordinal));
  outcome.device = properties.name;
  w4a16_device device;
  Check(w4a16_current_device(&device));
  if (config == "auto") {
    const char* chosen = nullptr;
    Check(w4a16_select(&p, &device, -1, &chosen));
    config = chosen;
  }
  outcome.kernel = config;
  int64_t workspace_bytes = 0;
  Check(w4a16_workspace_bytes(&p, &device, config.c_str(), &workspace_bytes));

  // Enough copies of the weight that a call never finds its own in the L2 cache.
  const int64_t weight_bytes = static_cast<int64_t>(host.qweight.size()) * 4;
  const int64_t cold_bytes = 5 * static_cast<int64_t>(properties.l2CacheSize) / 2;
  const int64_t copies = std::clamp<int64_t>(
      repeats == 0 ? 1 : CeilDiv(cold_bytes, std::max<int64_t>(weight_bytes, 1)), 1, 256);
  std::vector<DeviceBytes> qweights;
  for (int64_t i = 0; i < copies; ++i) qweights.emplace_back(host.qweight);
  DeviceBytes x(host.x.bytes), scales(host.scales.bytes), zeros(host.zeros.bytes),
      bias(host.bias.bytes), workspace(workspace_bytes);
  HostArray out(p.out_dtype, p.m * p.n);
  DeviceBytes device_out(out.bytes.size());
  cudaStream_t stream;
  CHECK_CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  CHECK_CUDA(cudaMemsetAsync(device_out.get(), 0xff, device_out.size(), stream));  // NaN
  if (workspace_bytes > 0)
    CHECK_CUDA(cudaMemsetAsync(workspace.get(), 0xff, workspace.size(), stream));

  const auto call = [&](int64_t copy) {
    const Operands operands = {.x = x.get(),
                               .qweight = static_cast<const uint32_t*>(qweights[copy].get()),
                               .scales = scales.get(),
                               .zeros = zeros.get(),
                               .bias = bias.get(),
                               .out = device_out.get(),
                               .workspace = workspace.get(),
                               .workspace_bytes = workspace_bytes,
                               .alpha = host.alpha};
    Check(w4a16_run_cuda(&p, &operands, config.c_str(), stream));
  };
  call(0);
  if (!out.bytes.empty())
    CHECK_CUDA(cudaMemcpyAsync(out.bytes.data(), device_out.get(), out.bytes.size(),
                               cudaMemcpyDeviceToHost, stream));
  CHECK_CUDA(cudaStreamSynchronize(stream));
  Compare(host, out, &outcome);
  if (repeats == 0) return outcome;

  const int64_t calls = std::max<int64_t>(copies, 8);
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  CHECK_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  for (int64_t i = 0; i < calls; ++i) call(i % copies);
  CHECK_CUDA(cudaStreamEndCapture(stream, &graph));
  CHECK_CUDA(cudaGraphInstantiate(&exec, graph, 0));
  cudaEvent_t start, stop;
  CHECK_CUDA(cudaEventCreate(&start));
  CHECK_CUDA(cudaEventCreate(&stop));
  std::vector<double> times;
  for (int i = 0; i < repeats + 2; ++i) {
    CHECK_CUDA(cudaEventRecord(start, stream));
    CHECK_CUDA(cudaGraphLaunch(exec, stream));
    CHECK_CUDA(cudaEventRecord(stop, stream));
    CHECK_CUDA(cudaEventSynchronize(stop));
    float ms = 0;
    CHECK_CUDA(cudaEventElapsedTime(&ms, start, stop));
    if (i >= 2) times.push_back(1e3 * ms / static_cast<double>(calls));
  }
  outcome.us = Median(times);
  CHECK_CUDA(cudaEventDestroy(start));
  CHECK_CUDA(cudaEventDestroy(stop));
  CHECK_CUDA(cudaGraphExecDestroy(exec));
  CHECK_CUDA(cudaGraphDestroy(graph));
  CHECK_CUDA(cudaStreamDestroy(stream));
  return outcome;
}

bool HaveGpu() {
  int count = 0;
  return w4a16_has_cuda() && cudaGetDeviceCount(&count) == cudaSuccess && count > 0;
}

#else

bool HaveGpu() { return false; }
Outcome RunOnGpu(const HostCase&, const std::string&, int) {
  Die("this build has no CUDA kernels");
}

#endif

bool RunOne(const Options& options, int64_t m, bool as_row) {
  const Problem p = {.m = m,
                     .n = options.n,
                     .k = options.k,
                     .group_size = options.group_size < 0 ? options.k : options.group_size,
                     .x_dtype = options.dtype,
                     .out_dtype = options.dtype,
                     .has_zeros = options.zeros,
                     .has_bias = options.bias};
  if (Status s = CheckProblem(p); !s.ok()) Die(s.message());
  const HostCase host(p, 42);
  const bool on_cpu = options.config == "cpu" || (options.config == "auto" && !HaveGpu());
  const Outcome outcome = on_cpu ? RunOnCpu(host, std::min(options.repeats, 20))
                                 : RunOnGpu(host, options.config, options.repeats);
  const bool right = outcome.worst_error <= 1;
  const double flop = 2.0 * static_cast<double>(p.m) * p.n * p.k;
  const double bytes = static_cast<double>(host.qweight.size()) * 4 + host.scales.bytes.size() +
                       host.zeros.bytes.size() + host.x.bytes.size() +
                       static_cast<double>(p.m) * p.n * DTypeBytes(p.out_dtype);
  const double tflops = outcome.us > 0 ? flop / outcome.us * 1e-6 : 0;
  const double gbs = outcome.us > 0 ? bytes / outcome.us * 1e-3 : 0;
  if (options.json) {
    std::printf(
        "{\"device\": \"%s\", \"M\": %lld, \"N\": %lld, \"K\": %lld, \"group_size\": %lld, "
        "\"dtype\": \"%s\", \"zeros\": %s, \"bias\": %s, \"kernel\": \"%s\", \"us\": %.3f, "
        "\"tflops\": %.2f, \"gbs\": %.1f, \"error\": %.4f, \"right\": %s}\n",
        outcome.device.c_str(), static_cast<long long>(p.m), static_cast<long long>(p.n),
        static_cast<long long>(p.k), static_cast<long long>(p.group_size), DTypeName(p.x_dtype),
        p.has_zeros ? "true" : "false", p.has_bias ? "true" : "false", outcome.kernel.c_str(),
        outcome.us, tflops, gbs, outcome.worst_error, right ? "true" : "false");
  } else if (as_row) {
    std::printf("%7lld  %-44s %10.2f us %8.2f TFLOP/s %8.1f GB/s  error %.2f of tolerance  %s\n",
                static_cast<long long>(p.m), outcome.kernel.c_str(), outcome.us, tflops, gbs,
                outcome.worst_error, right ? "ok" : "WRONG");
  } else {
    std::printf("device      %s\n", outcome.device.c_str());
    std::printf("problem     M=%lld N=%lld K=%lld group_size=%lld %s%s%s\n",
                static_cast<long long>(p.m), static_cast<long long>(p.n),
                static_cast<long long>(p.k), static_cast<long long>(p.group_size),
                DTypeName(p.x_dtype), p.has_zeros ? " zeros" : "", p.has_bias ? " bias" : "");
    std::printf("kernel      %s\n", outcome.kernel.c_str());
    std::printf("check       %s: largest error %.3f of the tolerance over %lld outputs\n",
                right ? "ok" : "WRONG", outcome.worst_error,
                static_cast<long long>(outcome.num_checked));
    if (outcome.us > 0)
      std::printf("time        %.2f us, %.2f TFLOP/s, %.1f GB/s\n", outcome.us, tflops, gbs);
  }
  std::fflush(stdout);
  return right;
}

int Main(int argc, char** argv) {
  const Options options = Parse(argc, argv);
  if (!options.sweep) return RunOne(options, options.m, false) ? 0 : 1;
  if (!options.json)
    std::printf("%7s  N=%lld K=%lld group_size=%lld %s\n", "M", static_cast<long long>(options.n),
                static_cast<long long>(options.k), static_cast<long long>(options.group_size),
                DTypeName(options.dtype));
  bool right = true;
  for (int64_t m = 1; m <= options.m; m *= 2) right = RunOne(options, m, true) && right;
  return right ? 0 : 1;
}

}  // namespace
}  // namespace w4a16

int main(int argc, char** argv) { return w4a16::Main(argc, argv); }
