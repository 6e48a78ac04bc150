// Seeded fuzz of every kernel through the C interface: independent sizes, about a fifth of them
// degenerate or unaligned; red zones of 512 bytes round every operand, result and workspace;
// results and workspace start as NaN. Each case runs twice and must give the same bits, within the
// tolerance of the double-precision reference.
//
//   fuzz [--device cpu|cuda] [--cases C] [--seed S] [--only I]
//        [--family decode|wgmma|persistent|cutlass]
//
// A failure prints one line that reproduces it. The last line counts the cases of each kernel.
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
  std::string config;  // "auto", "cpu", or a configuration's name

  std::string Text() const {
    const Problem& p = problem;
    char text[256];
    std::snprintf(
        text, sizeof(text),
        "M=%lld N=%lld K=%lld group_size=%lld %s->%s zeros=%d%s bias=%d alpha=%g config=%s",
        static_cast<long long>(p.m), static_cast<long long>(p.n), static_cast<long long>(p.k),
        static_cast<long long>(p.group_size), DTypeName(p.x_dtype), DTypeName(p.out_dtype),
        p.has_zeros, fractional_zeros ? " (fractional)" : "", p.has_bias, alpha, config.c_str());
    return text;
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
  p.group_size = draw.OneOf<int64_t>({32, 64, 128, 128, 256, 96, 1 << 30});
  p.x_dtype = options.cuda ? draw.OneOf({W4A16_F16, W4A16_BF16})
                           : draw.OneOf({W4A16_F16, W4A16_BF16, W4A16_F32});
  p.out_dtype = draw.Chance(25) ? W4A16_F32 : p.x_dtype;
  p.has_zeros = draw.Chance(40);
  p.has_bias = draw.Chance(40);
  c.alpha = draw.Chance(30) ? 0.375f : 1.0f;
  c.fractional_zeros = draw.Chance(30);
  c.config = options.cuda ? "auto" : "cpu";
  if (options.cuda && (draw.Chance(85) || !options.family.empty())) {
    std::vector<std::string> able;
    for (int i = 0; i < w4a16_config_count(); ++i) {
      const std::string name = w4a16_config_name(i);
      if (name.rfind(options.family, 0) == 0 &&
          w4a16_can_implement(&p, &device, name.c_str()).code == W4A16_OK)
        able.push_back(name);
    }
    if (!able.empty()) c.config = able[draw.Between(0, static_cast<int64_t>(able.size()) - 1)];
  }
  return c;
}

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
  HostArray out(p.out_dtype, p.m * p.n);
  auto x = guarded(host.x.bytes), qweight = guarded(host.qweight),
       scales = guarded(host.scales.bytes), zeros = guarded(host.zeros.bytes),
       bias = guarded(host.bias.bytes);
  std::vector<uint8_t> first;
  for (int run = 0; run < 2; ++run) {
    Guarded result(options.cuda, nullptr, out.bytes.size());
    Guarded workspace(options.cuda, nullptr, static_cast<size_t>(workspace_bytes));
    const Operands o = {.x = x->get(),
                        .qweight = static_cast<const uint32_t*>(qweight->get()),
                        .scales = scales->get(),
                        .zeros = p.has_zeros ? zeros->get() : nullptr,
                        .bias = p.has_bias ? bias->get() : nullptr,
                        .out = result.get(),
                        .workspace = workspace.get(),
                        .workspace_bytes = workspace_bytes,
                        .alpha = c.alpha};
    const w4a16_status status = options.cuda ? w4a16_run_cuda(&p, &o, config.c_str(), nullptr)
                                             : w4a16_run_cpu(&p, &o, nullptr);
    if (status.code != W4A16_OK) return status.message;
#ifdef W4A16_WITH_CUDA
    if (options.cuda) CheckCuda(cudaDeviceSynchronize());
#endif
    out.bytes = result.Read();
    if (run == 0) first = out.bytes;
    if (out.bytes != first) return "the second run gave other bits";
    for (Guarded* buffer :
         {x.get(), qweight.get(), scales.get(), zeros.get(), bias.get(), &result, &workspace}) {
      if (!buffer->RedZonesIntact()) return "a red zone was written";
    }
  }
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
  }
  std::map<std::string, int> counts;
  int64_t failures = 0, run = 0;
  for (int64_t i = 0; i < options.cases; ++i) {
    if (options.only >= 0 && i != options.only) continue;
    const uint64_t seed = options.seed * 1000003 + static_cast<uint64_t>(i);
    Draw draw(seed);
    const Case c = DrawCase(draw, options, device);
    const std::string wrong = RunCase(c, seed, options, device, &counts);
    ++run;
    if (wrong.empty()) continue;
    ++failures;
    std::printf("FAILED fuzz --device %s --cases %lld --seed %llu --only %lld%s: %s: %s\n",
                options.cuda ? "cuda" : "cpu", static_cast<long long>(options.cases),
                static_cast<unsigned long long>(options.seed), static_cast<long long>(i),
                options.family.empty() ? "" : (" --family " + options.family).c_str(),
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
