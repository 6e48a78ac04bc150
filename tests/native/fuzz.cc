// Seeded fuzz of every kernel through the C interface: independent sizes, about a fifth of them
// degenerate or unaligned; red zones of 512 bytes round every operand, result and workspace;
// results and workspace start as NaN. Each case runs twice and must give the same bits, within the
// tolerance of the double-precision reference.
//
//   fuzz [--device cpu|cuda] [--cases C] [--seed S] [--only I]
//        [--family
//        decode|wgmma|persistent|cutlass|ragged|ragged_decode|ragged_wgmma|ragged_persistent]
//        [--capability CC]
//
// --capability draws what a GPU of that compute capability (75: Turing) would be given, to run its
// code on a later one: in a library built with W4A16_CUDA_ARCHS=75 the driver compiles it from PTX.
// About a seventh of the cases, or all of the families "ragged...", are ragged products; half of
// those have sizes that no x has. On a GPU half of those that may have an epilogue do. A failure
// prints one line that reproduces it. The last line counts the cases of each kernel.
#include <algorithm>
#include <climits>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "reference.h"
#include "w4a16.h"
#ifdef W4A16_WITH_CUDA
#include <cuda_runtime_api.h>
#endif

namespace w4a16 {
namespace {

constexpr size_t kRedZone = 512;
constexpr uint8_t kRedByte = 0xA5;

struct Options {
  bool cuda = false;
  int64_t cases = 200, only = -1;
  uint64_t seed = 1;
  std::string family;
  int capability = 0;
};

[[noreturn]] void Die(const std::string& message) {
  std::fprintf(stderr, "fuzz: %s\n", message.c_str());
  std::exit(2);
}

#ifdef W4A16_WITH_CUDA
void CheckCuda(cudaError_t error) {
  if (error != cudaSuccess) Die(cudaGetErrorString(error));
}
#endif

// `size` bytes between two red zones, on the host or on the device.
class Guarded {
 public:
  Guarded(bool cuda, const void* init, size_t size)
      : cuda_(cuda), size_(size), image_(size + 2 * kRedZone, kRedByte) {
    if (init != nullptr && size > 0) std::memcpy(image_.data() + kRedZone, init, size);
    if (init == nullptr) std::memset(image_.data() + kRedZone, 0xff, size);
#ifdef W4A16_WITH_CUDA
    if (cuda_) {
      CheckCuda(cudaMalloc(reinterpret_cast<void**>(&device_), image_.size()));
      CheckCuda(cudaMemcpy(device_, image_.data(), image_.size(), cudaMemcpyHostToDevice));
    }
#endif
  }
  Guarded(const Guarded&) = delete;
  ~Guarded() {
#ifdef W4A16_WITH_CUDA
    if (cuda_) cudaFree(device_);
#endif
  }

  void* get() { return size_ == 0 ? nullptr : (cuda_ ? device_ : image_.data()) + kRedZone; }

  // The contents, once the work is done.
  std::vector<uint8_t> Read() {
#ifdef W4A16_WITH_CUDA
    if (cuda_) CheckCuda(cudaMemcpy(image_.data(), device_, image_.size(), cudaMemcpyDeviceToHost));
#endif
    return {image_.begin() + kRedZone, image_.end() - kRedZone};
  }

  bool RedZonesIntact() {
    Read();
    for (size_t i = 0; i < kRedZone; ++i) {
      if (image_[i] != kRedByte || image_[image_.size() - 1 - i] != kRedByte) return false;
    }
    return true;
  }

 private:
  bool cuda_;
  size_t size_;
  std::vector<uint8_t> image_;
  uint8_t* device_ = nullptr;
};

struct Case {
  Problem problem;
  float alpha;
  bool fractional_zeros;
  bool ragged;
  std::vector<int32_t> sizes;  // rows of each expert of a ragged product
  int64_t num_squares;         // of W4A16_SWIGLU; 0: none
  std::string config;          // "auto", "cpu", or a configuration's name

  std::string Text() const {
    const Problem& p = problem;
    char text[256];
    std::snprintf(
        text, sizeof(text),
        "M=%lld N=%lld K=%lld group_size=%lld %s->%s zeros=%d%s bias=%d alpha=%g config=%s",
        static_cast<long long>(p.m), static_cast<long long>(p.n), static_cast<long long>(p.k),
        static_cast<long long>(p.group_size), DTypeName(p.x_dtype), DTypeName(p.out_dtype),
        p.has_zeros, fractional_zeros ? " (fractional)" : "", p.has_bias, alpha, config.c_str());
    std::string all = text;
    if (p.epilogue == W4A16_ADD_NORM) all += " add_norm";
    if (p.epilogue == W4A16_SWIGLU) all += " swiglu squares=" + std::to_string(num_squares);
    if (ragged) all += " group_sizes=";
    for (const int32_t size : sizes) all += std::to_string(size) + ",";
    return all;
  }
};

class Draw {
 public:
  explicit Draw(uint64_t seed) : random_(seed) {}
  int64_t Between(int64_t lo, int64_t hi) {
    return lo + static_cast<int64_t>(random_() % static_cast<uint64_t>(hi - lo + 1));
  }
  bool Chance(int percent) { return Between(1, 100) <= percent; }
  template <typename T>
  T OneOf(std::initializer_list<T> values) {
    return values.begin()[Between(0, static_cast<int64_t>(values.size()) - 1)];
  }

 private:
  std::mt19937_64 random_;
};

Case DrawCase(Draw& draw, const Options& options, const w4a16_device& device) {
  Case c = {};
  Problem& p = c.problem;
  p.m = draw.Chance(50) ? draw.Between(1, 16) : draw.Between(1, 300);
  p.n = 16 * draw.Between(1, 40);
  p.k = 64 * draw.Between(1, 24);
  if (draw.Chance(15)) p.n = draw.Between(1, 300);
  if (draw.Chance(15)) p.k = draw.Between(1, 700);
  if (draw.Chance(20)) p.n = 8 * draw.Between(1, 90);
  if (draw.Chance(20)) p.k = 8 * draw.Between(1, 130);
  if (draw.Chance(2)) p.m = 0;
  if (draw.Chance(2)) p.n = 0;
  if (draw.Chance(2)) p.k = 0;
  p.group_size = draw.OneOf<int64_t>({32, 64, 128, 128, 256, 96, 384, 1024, 1 << 30});
  p.x_dtype = options.cuda ? draw.OneOf({W4A16_F16, W4A16_BF16})
                           : draw.OneOf({W4A16_F16, W4A16_BF16, W4A16_F32});
  if (options.cuda && device.compute_capability < 80) p.x_dtype = W4A16_F16;
  p.out_dtype = draw.Chance(25) ? W4A16_F32 : p.x_dtype;
  p.has_zeros = draw.Chance(40);
  p.has_bias = draw.Chance(40);
  c.ragged = options.family.rfind("ragged", 0) == 0 || (options.family.empty() && draw.Chance(15));
  if (c.ragged) {
    p.has_bias = false;
    const int64_t experts = draw.Chance(3) ? 0 : draw.Between(1, draw.Chance(20) ? 150 : 12);
    const bool lies = draw.Chance(50);
    for (int64_t i = 0, left = p.m; i < experts; ++i) {
      const int64_t size = draw.Chance(30) ? 0 : draw.Between(0, 2 * (left / (experts - i)) + 1);
      c.sizes.push_back(static_cast<int32_t>(std::min(size, left)));
      left -= c.sizes.back();
      if (lies && draw.Chance(20))
        c.sizes.back() = draw.OneOf({-1, INT_MIN, INT_MAX, static_cast<int>(p.m) + 1});
    }
  }
  c.alpha = draw.Chance(30) ? 0.375f : 1.0f;
  c.fractional_zeros = draw.Chance(30);
  const bool decode = options.family.empty() || options.family == "decode";
  if (options.cuda && decode && !c.ragged && !p.has_bias && p.out_dtype == p.x_dtype &&
      p.n % 16 == 0 && p.k % 8 == 0 && (p.group_size >= p.k || p.group_size % 64 == 0) &&
      device.compute_capability >= 80 && draw.Chance(50)) {
    p.epilogue = draw.OneOf({W4A16_ADD_NORM, W4A16_SWIGLU});
    if (p.epilogue == W4A16_SWIGLU && draw.Chance(80)) c.num_squares = 4 * draw.Between(1, 75);
  }
  c.config = options.cuda ? "auto" : "cpu";
  if (options.cuda && (draw.Chance(85) || !options.family.empty())) {
    std::vector<std::string> able;
    for (int i = 0; i < w4a16_config_count(); ++i) {
      const std::string name = w4a16_config_name(i);
      if (name.rfind(options.family, 0) == 0 &&
          (c.ragged ? w4a16_ragged_can_implement(&p, c.sizes.size(), &device, name.c_str())
                    : w4a16_can_implement(&p, &device, name.c_str()))
                  .code == W4A16_OK)
        able.push_back(name);
    }
    if (!able.empty()) c.config = able[draw.Between(0, static_cast<int64_t>(able.size()) - 1)];
  }
  return c;
}

// What an epilogue reads and writes beside a product's operands.
struct Neighbours {
  static constexpr float kEpsilon = 0.01f;

  HostArray residual, norm_scale, scaled, squares;

  Neighbours(const Case& c, uint64_t seed)
      : residual(c.problem.x_dtype, IsAddNorm(c) ? c.problem.m * c.problem.n : 0),
        norm_scale(c.problem.x_dtype, IsAddNorm(c) ? c.problem.n : 0),
        scaled(c.problem.x_dtype, residual.size()),
        squares(W4A16_F32, c.problem.m * NumSquares(c)) {
    std::mt19937_64 random(seed ^ 0x5eed);
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < residual.size(); ++i) residual.Set(i, normal(random));
    for (int64_t i = 0; i < norm_scale.size(); ++i) norm_scale.Set(i, normal(random));
    // Factors about 1, so that no product leaves float16.
    for (int64_t i = 0; i < squares.size(); ++i)
      squares.Set(i, std::abs(normal(random)) * static_cast<float>(c.problem.k));
  }

  static bool IsAddNorm(const Case& c) { return c.problem.epilogue == W4A16_ADD_NORM; }
  static int64_t NumSquares(const Case& c) {
    return IsAddNorm(c) ? c.problem.n / kBlockN : c.num_squares;
  }

  // Whether the result of row m for columns from 16 b on is right; `out` as it came.
  std::string CheckBlock(const Case& c, const HostCase& host, const HostArray& out, int64_t m,
                         int64_t b) const {
    const Problem& p = c.problem;
    const auto wrong = [&](const char* what, int64_t n, double got, double expected) {
      return std::string(what) + "[" + std::to_string(m) + ", " + std::to_string(n) +
             "] = " + std::to_string(got) + ", expected " + std::to_string(expected);
    };
    if (IsAddNorm(c)) {
      double sum = 0;
      for (int64_t n = kBlockN * b; n < kBlockN * (b + 1); ++n) {
        const int64_t i = m * p.n + n;
        auto expected = host.Reference(m, n);
        expected.value += residual[i];
        if (!(std::abs(out[i] - expected.value) <= host.Tolerance(expected)))
          return wrong("out", n, out[i], expected.value);
        HostArray exact(p.x_dtype, 1);
        exact.Set(0, static_cast<float>(out[i]) * static_cast<float>(norm_scale[n]));
        if (scaled[i] != exact[0]) return wrong("scaled", n, scaled[i], exact[0]);
        sum += out[i] * out[i];
      }
      const double got = squares[m * NumSquares(c) + b];
      return std::abs(got - sum) <= 1e-5 * sum ? "" : wrong("squares", b, got, sum);
    }
    double factor = 1, sum = 0;
    for (int64_t i = 0; i < c.num_squares; ++i) sum += squares[m * c.num_squares + i];
    if (c.num_squares > 0) factor = 1 / std::sqrt(sum / static_cast<double>(p.k) + kEpsilon);
    for (int64_t n = kBlockN * b; n < kBlockN * b + kBlockN / 2; ++n) {
      const auto gate = host.Reference(m, n), up = host.Reference(m, n + kBlockN / 2);
      const double g = factor * gate.value, u = factor * up.value;
      const double silu = g / (1 + std::exp(-g)), expected = silu * u;
      const double g_error = factor * host.Tolerance(gate), u_error = factor * host.Tolerance(up);
      // The slope of silu is below 1.1.
      const double tolerance = 1.1 * g_error * (std::abs(u) + u_error) + std::abs(silu) * u_error +
                               0x1p-7 * std::abs(expected) + 1e-6;
      const double got = out[m * p.n / 2 + b * kBlockN / 2 + n % kBlockN];
      // Of no numbers (K = 0) there is no mean.
      const bool right =
          std::isnan(factor) ? std::isnan(got) : std::abs(got - expected) <= tolerance;
      if (!right) return wrong("out", n, got, expected);
    }
    return "";
  }
};

// Empty if right, else what is wrong.
std::string RunCase(const Case& c, uint64_t seed, const Options& options,
                    const w4a16_device& device, std::map<std::string, int>* counts) {
  const Problem& p = c.problem;
  const HostCase host(p, seed, c.alpha, c.fractional_zeros);
  const auto guarded = [&](const auto& bytes) {
    return std::make_unique<Guarded>(options.cuda, bytes.data(),
                                     bytes.size() * sizeof(*bytes.data()));
  };
  int64_t workspace_bytes = 0;
  std::string config = c.config;
  if (options.cuda) {
    if (config == "auto" && p.m > 0 && p.n > 0) {
      const char* chosen = nullptr;
      const w4a16_status status = w4a16_select(&p, &device, -1, &chosen);
      if (status.code != W4A16_OK) return status.message;
      config = chosen;
    }
    if (config != "auto") {
      const w4a16_status status =
          w4a16_workspace_bytes(&p, &device, config.c_str(), &workspace_bytes);
      if (status.code != W4A16_OK) return status.message;
    }
  }
  ++(*counts)[config];
  const bool add_norm = Neighbours::IsAddNorm(c);
  HostArray out(p.out_dtype, p.m * p.n / (p.epilogue == W4A16_SWIGLU ? 2 : 1));
  Neighbours beside(c, seed);
  auto residual = guarded(beside.residual.bytes), norm_scale = guarded(beside.norm_scale.bytes);
  auto x = guarded(host.x.bytes), qweight = guarded(host.qweight),
       scales = guarded(host.scales.bytes), zeros = guarded(host.zeros.bytes),
       bias = guarded(host.bias.bytes);
  std::vector<uint8_t> first, first_scaled, first_squares;
  for (int run = 0; run < 2; ++run) {
    Guarded result(options.cuda, nullptr, out.bytes.size());
    Guarded scaled(options.cuda, nullptr, beside.scaled.bytes.size());
    Guarded squares(options.cuda, add_norm ? nullptr : beside.squares.bytes.data(),
                    beside.squares.bytes.size());
    Guarded workspace(options.cuda, nullptr, static_cast<size_t>(workspace_bytes));
    const Operands o = {.x = x->get(),
                        .qweight = static_cast<const uint32_t*>(qweight->get()),
                        .scales = scales->get(),
                        .zeros = p.has_zeros ? zeros->get() : nullptr,
                        .bias = p.has_bias ? bias->get() : nullptr,
                        .out = result.get(),
                        .workspace = workspace.get(),
                        .workspace_bytes = workspace_bytes,
                        .alpha = c.alpha,
                        .residual = residual->get(),
                        .norm_scale = norm_scale->get(),
                        .scaled = scaled.get(),
                        .squares = static_cast<float*>(squares.get()),
                        .num_squares = Neighbours::NumSquares(c),
                        .epsilon = Neighbours::kEpsilon};
    const w4a16_status status = options.cuda ? w4a16_run_cuda(&p, &o, config.c_str(), nullptr)
                                             : w4a16_run_cpu(&p, &o, nullptr);
    if (status.code != W4A16_OK) return status.message;
#ifdef W4A16_WITH_CUDA
    if (options.cuda) CheckCuda(cudaDeviceSynchronize());
#endif
    out.bytes = result.Read();
    beside.scaled.bytes = scaled.Read();
    beside.squares.bytes = squares.Read();
    if (run == 0) {
      first = out.bytes;
      first_scaled = beside.scaled.bytes, first_squares = beside.squares.bytes;
    }
    if (out.bytes != first || beside.scaled.bytes != first_scaled ||
        beside.squares.bytes != first_squares)
      return "the second run gave other bits";
    for (Guarded* buffer :
         {x.get(), qweight.get(), scales.get(), zeros.get(), bias.get(), residual.get(),
          norm_scale.get(), &result, &scaled, &squares, &workspace}) {
      if (!buffer->RedZonesIntact()) return "a red zone was written";
    }
  }
  for (int64_t m = 0; p.epilogue != W4A16_NO_EPILOGUE && m < p.m; ++m) {
    for (int64_t b = 0; b < p.n / kBlockN; ++b) {
      if (const auto wrong = beside.CheckBlock(c, host, out, m, b); !wrong.empty()) return wrong;
    }
  }
  if (p.epilogue != W4A16_NO_EPILOGUE) return "";
  for (int64_t m = 0; m < p.m; ++m) {
    for (int64_t n = 0; n < p.n; ++n) {
      const auto expected = host.Reference(m, n);
      const double got = out[m * p.n + n];
      if (!(std::abs(got - expected.value) <= host.Tolerance(expected)))
        return "out[" + std::to_string(m) + ", " + std::to_string(n) +
               "] = " + std::to_string(got) + ", expected " + std::to_string(expected.value) +
               " +- " + std::to_string(host.Tolerance(expected));
    }
  }
  return "";
}

// The same for a ragged product: every expert's rows are a case of their own.
std::string RunRaggedCase(const Case& c, uint64_t seed, const Options& options,
                          std::map<std::string, int>* counts) {
  const Problem& p = c.problem;
  ++(*counts)[c.config == "auto" || c.config == "cpu" ? c.config + " (ragged)" : c.config];
  std::vector<HostCase> hosts;  // the last one's rows are none's
  std::vector<uint8_t> x, scales, zeros;
  std::vector<uint32_t> qweight;
  const auto append = [](auto& to, const auto& from) {
    to.insert(to.end(), from.begin(), from.end());
  };
  int64_t left = p.m;
  for (size_t i = 0; i <= c.sizes.size(); ++i) {
    Problem part = p;
    part.m = i < c.sizes.size() ? std::clamp<int64_t>(c.sizes[i], 0, left) : left;
    left -= part.m;
    const HostCase& host = hosts.emplace_back(part, seed + i, c.alpha, c.fractional_zeros);
    append(x, host.x.bytes);
    if (i == c.sizes.size()) break;
    append(qweight, host.qweight);
    append(scales, host.scales.bytes);
    append(zeros, host.zeros.bytes);
  }
  Guarded on_x(options.cuda, x.data(), x.size());
  Guarded on_qweight(options.cuda, qweight.data(), 4 * qweight.size());
  Guarded on_scales(options.cuda, scales.data(), scales.size());
  Guarded on_zeros(options.cuda, zeros.data(), zeros.size());
  Guarded on_sizes(options.cuda, c.sizes.data(), 4 * c.sizes.size());
  HostArray out(p.out_dtype, p.m * p.n);
  std::vector<uint8_t> first;
  for (int run = 0; run < 2; ++run) {
    Guarded result(options.cuda, nullptr, out.bytes.size());
    const Operands o = {.x = on_x.get(),
                        .qweight = static_cast<const uint32_t*>(on_qweight.get()),
                        .scales = on_scales.get(),
                        .zeros = p.has_zeros ? on_zeros.get() : nullptr,
                        .bias = nullptr,
                        .out = result.get(),
                        .workspace = nullptr,
                        .workspace_bytes = 0,
                        .alpha = c.alpha};
    const int64_t experts = static_cast<int64_t>(c.sizes.size());
    const auto* sizes = static_cast<const int32_t*>(on_sizes.get());
    const w4a16_status status =
        options.cuda ? w4a16_ragged_run_cuda(&p, experts, &o, sizes, c.config.c_str(), nullptr)
                     : w4a16_ragged_run_cpu(&p, experts, &o, sizes, nullptr);
    if (status.code != W4A16_OK) return status.message;
#ifdef W4A16_WITH_CUDA
    if (options.cuda) CheckCuda(cudaDeviceSynchronize());
#endif
    out.bytes = result.Read();
    if (run == 0) first = out.bytes;
    if (out.bytes != first) return "the second run gave other bits";
    for (Guarded* buffer : {&on_x, &on_qweight, &on_scales, &on_zeros, &on_sizes, &result}) {
      if (!buffer->RedZonesIntact()) return "a red zone was written";
    }
  }
  int64_t row = 0;
  for (const HostCase& host : hosts) {
    const bool nones = &host == &hosts.back();
    for (int64_t m = 0; m < host.problem.m; ++m, ++row) {
      for (int64_t n = 0; n < p.n; ++n) {
        const auto expected = nones ? HostCase::Expected{0, 0} : host.Reference(m, n);
        const double got = out[row * p.n + n];
        if (!(std::abs(got - expected.value) <= (nones ? 0 : host.Tolerance(expected))))
          return "out[" + std::to_string(row) + ", " + std::to_string(n) +
                 "] = " + std::to_string(got) + ", expected " + std::to_string(expected.value);
      }
    }
  }
  return "";
}

Options Parse(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string arg = argv[i];
    if (i + 1 == argc) Die(arg + ": expected a value");
    const std::string value = argv[++i];
    if (arg == "--device")
      options.cuda = value == "cuda";
    else if (arg == "--cases")
      options.cases = std::atoll(value.c_str());
    else if (arg == "--seed")
      options.seed = std::strtoull(value.c_str(), nullptr, 10);
    else if (arg == "--only")
      options.only = std::atoll(value.c_str());
    else if (arg == "--family")
      options.family = value;
    else if (arg == "--capability")
      options.capability = std::atoi(value.c_str());
    else
      Die("unknown argument " + arg);
  }
  return options;
}

int Main(int argc, char** argv) {
  const Options options = Parse(argc, argv);
  w4a16_device device = {};
  if (options.cuda) {
    const w4a16_status status = w4a16_current_device(&device);
    if (status.code != W4A16_OK) Die(status.message);
    if (options.capability > 0) device.compute_capability = options.capability;
  }
  std::map<std::string, int> counts;
  int64_t failures = 0, run = 0;
  for (int64_t i = 0; i < options.cases; ++i) {
    if (options.only >= 0 && i != options.only) continue;
    const uint64_t seed = options.seed * 1000003 + static_cast<uint64_t>(i);
    Draw draw(seed);
    const Case c = DrawCase(draw, options, device);
    const std::string wrong = c.ragged ? RunRaggedCase(c, seed, options, &counts)
                                       : RunCase(c, seed, options, device, &counts);
    ++run;
    if (wrong.empty()) continue;
    ++failures;
    std::printf("FAILED fuzz --device %s --cases %lld --seed %llu --only %lld%s%s: %s: %s\n",
                options.cuda ? "cuda" : "cpu", static_cast<long long>(options.cases),
                static_cast<unsigned long long>(options.seed), static_cast<long long>(i),
                options.family.empty() ? "" : (" --family " + options.family).c_str(),
                options.capability == 0
                    ? ""
                    : (" --capability " + std::to_string(options.capability)).c_str(),
                c.Text().c_str(), wrong.c_str());
    std::fflush(stdout);
  }
  for (const auto& [name, count] : counts) std::printf("%6d  %s\n", count, name.c_str());
  std::printf("fuzz: %lld cases, %lld failures\n", static_cast<long long>(run),
              static_cast<long long>(failures));
  return failures == 0 ? 0 : 1;
}

}  // namespace
}  // namespace w4a16

int main(int argc, char** argv) { return w4a16::Main(argc, argv); }
