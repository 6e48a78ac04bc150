// w4a16: checks and times products without Python or JAX.
//
//   w4a16 M N K [--group-size G] [--dtype float16|bfloat16] [--zeros] [--bias] [--out-float32]
//               [--batch-invariant] [--config NAME|auto|all|cpu] [--repeats R] [--sweep] [--json]
//
// Prints the device, the chosen kernel, the largest error against a double-precision reference, the
// time of a call, TFLOP/s and GB/s. M may be several numbers joined by commas, --sweep means 1, 2,
// 4 ... up to M, and --config all every configuration that can serve: then there is a row for each.
// Exit status 0: all results were right; 1: one was not; 2: the call could not be made.
#include <algorithm>
#include <charconv>
#include <chrono>
#include <cmath>
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
    "usage: w4a16 M N K [--group-size G (-1: per column)] [--dtype float16|bfloat16] [--zeros]\n"
    "                   [--bias] [--out-float32] [--batch-invariant]\n"
    "                   [--config NAME|auto|all|cpu] [--repeats R (0: check only)] [--sweep]\n"
    "                   [--json]\n"
    "M may be several numbers, joined by commas.\n";

[[noreturn]] void Die(const std::string& message) {
  std::fprintf(stderr, "w4a16: %s\n", message.c_str());
  std::exit(2);
}

void Check(const w4a16_status& status) {
  if (status.code != W4A16_OK) Die(status.message);
}

constexpr int64_t kMostSize = int64_t{1} << 30, kMostRepeats = 1'000'000;

struct Options {
  std::vector<int64_t> m;
  int64_t n = 0, k = 0, group_size = 128;
  DType dtype = W4A16_F16;
  bool zeros = false, bias = false, out_float32 = false, batch_invariant = false, json = false;
  std::string config = "auto";
  int repeats = 50;
};

int64_t ParseInt(const std::string& name, const std::string& text, int64_t least, int64_t most) {
  int64_t value = 0;
  const char* const end = text.data() + text.size();
  const auto [stop, error] = std::from_chars(text.data(), end, value);
  if (error == std::errc() && stop == end && value >= least && value <= most) return value;
  Die(name + ": expected a number from " + std::to_string(least) + " to " + std::to_string(most) +
      ", got \"" + text + "\"");
}

std::vector<int64_t> ParseInts(const std::string& name, const std::string& text, int64_t least) {
  std::vector<int64_t> values;
  for (size_t begin = 0, end; begin <= text.size(); begin = end + 1) {
    end = std::min(text.find(',', begin), text.size());
    values.push_back(ParseInt(name, text.substr(begin, end - begin), least, kMostSize));
  }
  return values;
}

Options Parse(int argc, char** argv) {
  Options options;
  std::vector<std::string> sizes;
  bool sweep = false;
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
      options.group_size = ParseInt(arg, value(), -1, kMostSize);
    } else if (arg == "--dtype") {
      const std::string name = value();
      if (name != "float16" && name != "bfloat16")
        Die("--dtype: expected float16 or bfloat16, got " + name);
      options.dtype = name == "float16" ? W4A16_F16 : W4A16_BF16;
    } else if (arg == "--config") {
      options.config = value();
    } else if (arg == "--repeats") {
      options.repeats = static_cast<int>(ParseInt(arg, value(), 0, kMostRepeats));
    } else if (arg == "--zeros") {
      options.zeros = true;
    } else if (arg == "--bias") {
      options.bias = true;
    } else if (arg == "--out-float32") {
      options.out_float32 = true;
    } else if (arg == "--batch-invariant") {
      options.batch_invariant = true;
    } else if (arg == "--sweep") {
      sweep = true;
    } else if (arg == "--json") {
      options.json = true;
    } else if (sizes.size() < 3 && arg[0] != '-') {
      sizes.push_back(arg);
    } else {
      Die("unknown argument " + arg + "\n" + kUsage);
    }
  }
  if (sizes.size() != 3) Die(std::string("expected M N K\n") + kUsage);
  options.m = ParseInts("M", sizes[0], sweep ? 1 : 0);
  options.n = ParseInt("N", sizes[1], 0, kMostSize);
  options.k = ParseInt("K", sizes[2], 0, kMostSize);
  if (sweep) {
    const int64_t most = options.m.back();
    options.m.clear();
    for (int64_t m = 1; m <= most; m *= 2) options.m.push_back(m);
  }
  return options;
}

struct Outcome {
  std::string device, kernel;
  double us = 0;           // median time of a call; 0 if not timed
  double worst_error = 0;  // largest |error| / tolerance
};

// The outputs that kernels are compared with, computed once: all, or a sample with the corners
// where there are too many to compute.
class Expectation {
 public:
  Expectation(const HostCase& host, int64_t m) {
    const int64_t n = host.problem.n, total = m * n;
    const double work = static_cast<double>(total) * std::max<int64_t>(host.problem.k, 1);
    const bool all = work <= 3e8;
    std::mt19937_64 random(1);
    const int64_t count = all ? total : std::min<int64_t>(total, kMostSampled);
    const int64_t corners[] = {0, n - 1, total - n, total - 1};
    for (int64_t i = 0; i < count; ++i) {
      const int64_t at = all ? i : i < 4 ? corners[i] : static_cast<int64_t>(random() % total);
      const auto expected = host.Reference(at / n, at % n);
      outputs_.push_back({at, expected.value, host.Tolerance(expected)});
    }
  }

  int64_t size() const { return static_cast<int64_t>(outputs_.size()); }

  // The largest |error| / tolerance; a NaN if there is one.
  double WorstError(const HostArray& out) const {
    double worst = 0;
    for (const Output& o : outputs_) {
      const double error = std::abs(out[o.at] - o.value) / o.tolerance;
      if (std::isnan(error)) return error;
      worst = std::max(worst, error);
    }
    return worst;
  }

 private:
  static constexpr int64_t kMostSampled = 8192;
  struct Output {
    int64_t at;
    double value, tolerance;
  };
  std::vector<Output> outputs_;
};

double Median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + values.size() / 2, values.end());
  return values[values.size() / 2];
}

// One problem after another, on the operands of `host`; `p` may have fewer rows than host.problem.
class CpuRunner {
 public:
  explicit CpuRunner(const HostCase& host) : host_(host) {}

  std::vector<std::string> Configs(const Problem&, const std::string&) const { return {"cpu"}; }

  Outcome Run(const Problem& p, const std::string&, const Expectation& expected, int repeats) {
    // The interface wants addresses aligned to 16 bytes; malloc and so vector give that.
    HostArray out(p.out_dtype, p.m * p.n);
    const Operands operands = {.x = host_.x.bytes.data(),
                               .qweight = host_.qweight.data(),
                               .scales = host_.scales.bytes.data(),
                               .zeros = p.has_zeros ? host_.zeros.bytes.data() : nullptr,
                               .bias = p.has_bias ? host_.bias.bytes.data() : nullptr,
                               .out = out.bytes.data(),
                               .workspace = nullptr,
                               .workspace_bytes = 0,
                               .alpha = host_.alpha};
    std::fill(out.bytes.begin(), out.bytes.end(), 0xff);  // NaN
    Check(w4a16_run_cpu(&p, &operands, nullptr));
    Outcome outcome;
    outcome.device = "CPU, " + std::to_string(std::thread::hardware_concurrency()) + " threads";
    outcome.kernel = std::string("cpu_") + w4a16_cpu_instruction_set();
    outcome.worst_error = expected.WorstError(out);
    std::vector<double> times;
    for (int i = 0; i < std::min(repeats, kMostCalls); ++i) {
      const auto start = std::chrono::steady_clock::now();
      Check(w4a16_run_cpu(&p, &operands, nullptr));
      const std::chrono::duration<double, std::micro> elapsed =
          std::chrono::steady_clock::now() - start;
      times.push_back(elapsed.count());
    }
    if (!times.empty()) outcome.us = Median(times);
    return outcome;
  }

 private:
  static constexpr int kMostCalls = 20;
  const HostCase& host_;
};

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

class GpuRunner {
 public:
  GpuRunner(const HostCase& host, bool cold)
      : host_(host),
        x_(host.x.bytes),
        scales_(host.scales.bytes),
        zeros_(host.zeros.bytes),
        bias_(host.bias.bytes) {
    int ordinal = 0;
    CHECK_CUDA(cudaGetDevice(&ordinal));
    CHECK_CUDA(cudaGetDeviceProperties(&properties_, ordinal));
    Check(w4a16_current_device(&device_));
    CHECK_CUDA(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
    // Enough copies of the weight that a call never finds its own in the L2 cache.
    const int64_t weight_bytes = static_cast<int64_t>(host.qweight.size()) * 4;
    const int64_t cold_bytes = 5 * static_cast<int64_t>(properties_.l2CacheSize) / 2;
    const int64_t copies = std::clamp<int64_t>(
        cold ? CeilDiv(cold_bytes, std::max<int64_t>(weight_bytes, 1)) : 1, 1, 256);
    for (int64_t i = 0; i < copies; ++i) qweights_.emplace_back(host.qweight);
  }
  GpuRunner(GpuRunner&&) = delete;
  ~GpuRunner() { cudaStreamDestroy(stream_); }

  // The configurations that `wanted` stands for. Of "all", those that can serve, the chosen first.
  std::vector<std::string> Configs(const Problem& p, const std::string& wanted) const {
    if (wanted != "auto" && wanted != "all") return {wanted};
    const char* chosen = nullptr;
    Check(w4a16_select(&p, &device_, -1, &chosen));
    std::vector<std::string> configs = {chosen};
    for (int i = 0; wanted == "all" && i < w4a16_config_count(); ++i) {
      const char* name = w4a16_config_name(i);
      if (name != configs[0] && w4a16_can_implement(&p, &device_, name).code == W4A16_OK)
        configs.push_back(name);
    }
    return configs;
  }

  Outcome Run(const Problem& p, const std::string& config, const Expectation& expected,
              int repeats) {
    int64_t workspace_bytes = 0;
    Check(w4a16_workspace_bytes(&p, &device_, config.c_str(), &workspace_bytes));
    DeviceBytes workspace(workspace_bytes);
    HostArray out(p.out_dtype, p.m * p.n);
    DeviceBytes device_out(out.bytes.size());
    CHECK_CUDA(cudaMemsetAsync(device_out.get(), 0xff, device_out.size(), stream_));  // NaN
    if (workspace_bytes > 0)
      CHECK_CUDA(cudaMemsetAsync(workspace.get(), 0xff, workspace.size(), stream_));

    const auto call = [&](int64_t copy) {
      const Operands operands = {.x = x_.get(),
                                 .qweight = static_cast<const uint32_t*>(qweights_[copy].get()),
                                 .scales = scales_.get(),
                                 .zeros = zeros_.get(),
                                 .bias = bias_.get(),
                                 .out = device_out.get(),
                                 .workspace = workspace.get(),
                                 .workspace_bytes = workspace_bytes,
                                 .alpha = host_.alpha};
      Check(w4a16_run_cuda(&p, &operands, config.c_str(), stream_));
    };
    call(0);
    if (!out.bytes.empty())
      CHECK_CUDA(cudaMemcpyAsync(out.bytes.data(), device_out.get(), out.bytes.size(),
                                 cudaMemcpyDeviceToHost, stream_));
    CHECK_CUDA(cudaStreamSynchronize(stream_));
    Outcome outcome;
    outcome.device = properties_.name;
    outcome.kernel = config;
    outcome.worst_error = expected.WorstError(out);
    if (repeats > 0) outcome.us = Time(call, repeats);
    return outcome;
  }

 private:
  // Median time in microseconds of calls over the copies of the weight, in a CUDA graph.
  template <typename Call>
  double Time(Call&& call, int repeats) {
    const int64_t copies = static_cast<int64_t>(qweights_.size());
    const int64_t calls = std::max<int64_t>(copies, 8);
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    CHECK_CUDA(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal));
    for (int64_t i = 0; i < calls; ++i) call(i % copies);
    CHECK_CUDA(cudaStreamEndCapture(stream_, &graph));
    CHECK_CUDA(cudaGraphInstantiate(&exec, graph, 0));
    cudaEvent_t start, stop;
    CHECK_CUDA(cudaEventCreate(&start));
    CHECK_CUDA(cudaEventCreate(&stop));
    constexpr int kWarmUp = 2;
    std::vector<double> times;
    double spent_ms = 0;
    for (int i = 0; i < kWarmUp + repeats; ++i) {
      CHECK_CUDA(cudaEventRecord(start, stream_));
      CHECK_CUDA(cudaGraphLaunch(exec, stream_));
      CHECK_CUDA(cudaEventRecord(stop, stream_));
      CHECK_CUDA(cudaEventSynchronize(stop));
      float ms = 0;
      CHECK_CUDA(cudaEventElapsedTime(&ms, start, stop));
      spent_ms += ms;
      if (i >= kWarmUp) times.push_back(1e3 * ms / static_cast<double>(calls));
      if (i >= kWarmUp && spent_ms > kMostMs) break;
    }
    CHECK_CUDA(cudaEventDestroy(start));
    CHECK_CUDA(cudaEventDestroy(stop));
    CHECK_CUDA(cudaGraphExecDestroy(exec));
    CHECK_CUDA(cudaGraphDestroy(graph));
    return Median(times);
  }

  static constexpr double kMostMs = 500;  // a kernel too slow for this is repeated less
  const HostCase& host_;
  cudaDeviceProp properties_ = {};
  w4a16_device device_ = {};
  cudaStream_t stream_ = nullptr;
  std::vector<DeviceBytes> qweights_;
  DeviceBytes x_, scales_, zeros_, bias_;
};

bool HaveGpu() {
  int count = 0;
  return w4a16_has_cuda() && cudaGetDeviceCount(&count) == cudaSuccess && count > 0;
}

#else

bool HaveGpu() { return false; }
class GpuRunner : public CpuRunner {
 public:
  GpuRunner(const HostCase& host, bool) : CpuRunner(host) { Die("this build has no CUDA kernels"); }
};

#endif

void Print(const Options& options, const HostCase& host, const Problem& p, const Outcome& outcome,
           bool selected, int64_t num_checked, bool as_row) {
  const bool right = outcome.worst_error <= 1;
  const double flop = 2.0 * static_cast<double>(p.m) * p.n * p.k;
  const double bytes = static_cast<double>(host.qweight.size()) * 4 + host.scales.bytes.size() +
                       host.zeros.bytes.size() +
                       static_cast<double>(p.m) * p.k * DTypeBytes(p.x_dtype) +
                       static_cast<double>(p.m) * p.n * DTypeBytes(p.out_dtype);
  const double tflops = outcome.us > 0 ? flop / outcome.us * 1e-6 : 0;
  const double gbs = outcome.us > 0 ? bytes / outcome.us * 1e-3 : 0;
  if (options.json) {
    std::printf(
        "{\"device\": \"%s\", \"M\": %lld, \"N\": %lld, \"K\": %lld, \"group_size\": %lld, "
        "\"dtype\": \"%s\", \"zeros\": %s, \"bias\": %s, \"kernel\": \"%s\", \"selected\": %s, "
        "\"us\": %.3f, \"tflops\": %.2f, \"gbs\": %.1f, \"error\": %.4f, \"right\": %s}\n",
        outcome.device.c_str(), static_cast<long long>(p.m), static_cast<long long>(p.n),
        static_cast<long long>(p.k), static_cast<long long>(p.group_size), DTypeName(p.x_dtype),
        p.has_zeros ? "true" : "false", p.has_bias ? "true" : "false", outcome.kernel.c_str(),
        selected ? "true" : "false", outcome.us, tflops, gbs,
        std::isfinite(outcome.worst_error) ? outcome.worst_error : -1.0, right ? "true" : "false");
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
                right ? "ok" : "WRONG", outcome.worst_error, static_cast<long long>(num_checked));
    if (outcome.us > 0)
      std::printf("time        %.2f us, %.2f TFLOP/s, %.1f GB/s\n", outcome.us, tflops, gbs);
  }
  std::fflush(stdout);
}

// Every M with every configuration, on one set of operands; whether all results were right.
template <typename Runner>
bool RunAll(const Options& options, const HostCase& host, Runner&& runner) {
  const bool as_rows = options.m.size() > 1 || options.config == "all";
  if (as_rows && !options.json)
    std::printf("%7s  N=%lld K=%lld group_size=%lld %s\n", "M", static_cast<long long>(options.n),
                static_cast<long long>(options.k), static_cast<long long>(options.group_size),
                DTypeName(options.dtype));
  bool right = true;
  for (const int64_t m : options.m) {
    Problem p = host.problem;
    p.m = m;
    const Expectation expected(host, m);
    bool selected = options.config == "auto" || options.config == "all";
    for (const std::string& config : runner.Configs(p, options.config)) {
      const Outcome outcome = runner.Run(p, config, expected, options.repeats);
      Print(options, host, p, outcome, selected, expected.size(), as_rows);
      right = right && outcome.worst_error <= 1;
      selected = false;
    }
  }
  return right;
}

int Main(int argc, char** argv) {
  const Options options = Parse(argc, argv);
  const Problem p = {.m = *std::max_element(options.m.begin(), options.m.end()),
                     .n = options.n,
                     .k = options.k,
                     .group_size = options.group_size < 0 ? options.k : options.group_size,
                     .x_dtype = options.dtype,
                     .out_dtype = options.out_float32 ? W4A16_F32 : options.dtype,
                     .has_zeros = options.zeros,
                     .has_bias = options.bias,
                     .batch_invariant = options.batch_invariant};
  for (const int64_t m : options.m) {
    Problem each = p;
    each.m = m;
    if (Status s = CheckProblem(each); !s.ok()) Die(s.message());
  }
  const HostCase host(p, 42);
  const bool any = options.config == "auto" || options.config == "all";
  const bool on_cpu = options.config == "cpu" || (any && !HaveGpu());
  const bool right = on_cpu ? RunAll(options, host, CpuRunner(host))
                            : RunAll(options, host, GpuRunner(host, options.repeats > 0));
  return right ? 0 : 1;
}

}  // namespace
}  // namespace w4a16

int main(int argc, char** argv) {
  try {
    return w4a16::Main(argc, argv);
  } catch (const std::exception& error) {  // out of memory
    w4a16::Die(error.what());
  }
}
