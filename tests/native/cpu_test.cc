// Checks the CPU half, on every instruction set that this machine runs. A failure prints one line
// that says how to repeat it: `cpu_test SEED` runs one random problem of Dot alone. `cpu_test
// --time` times each instruction set instead.
#include <algorithm>
#include <bit>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>
#include <random>
#include <string>
#include <vector>

#include "cpu/dot.h"
#include "cpu/float16.h"
#include "cpu/thread_executor.h"
#include "quantize.h"
#include "reference.h"

namespace w4a16 {
namespace {

using cpu::Isa;

constexpr int kDotCases = 400;
constexpr DType kDTypes[] = {W4A16_F16, W4A16_BF16, W4A16_F32};

template <class... Args>
[[noreturn]] void Fail(const char* format, Args... args) {
  std::printf("FAIL ");
  std::printf(format, args...);
  std::printf("\n");
  std::exit(1);
}

std::string Describe(const HostCase& c) {
  const Problem& p = c.problem;
  return "m=" + std::to_string(p.m) + " n=" + std::to_string(p.n) + " k=" + std::to_string(p.k) +
         " group_size=" + std::to_string(p.group_size) + " x=" + DTypeName(p.x_dtype) +
         " out=" + DTypeName(p.out_dtype) + " zeros=" + std::to_string(p.has_zeros) +
         " bias=" + std::to_string(p.has_bias) + " alpha=" + std::to_string(c.alpha);
}

// Results are followed by bytes that must stay as they are.
HostArray RunDot(Isa isa, const HostCase& c, int threads) {
  constexpr int kGuard = 64;
  const Problem& p = c.problem;
  HostArray out(p.out_dtype, p.m * p.n + kGuard);
  std::memset(out.bytes.data(), 0xa5, out.bytes.size());
  Operands o = {};
  o.x = c.x.bytes.data();
  o.qweight = c.qweight.data();
  o.scales = c.scales.bytes.data();
  o.zeros = p.has_zeros ? c.zeros.bytes.data() : nullptr;
  o.bias = p.has_bias ? c.bias.bytes.data() : nullptr;
  o.out = out.bytes.data();
  o.alpha = c.alpha;
  cpu::ThreadExecutor executor(threads);
  cpu::DotWith(isa, p, o, executor);
  const size_t size = static_cast<size_t>(p.m * p.n) * DTypeBytes(p.out_dtype);
  for (size_t i = size; i < out.bytes.size(); ++i) {
    if (out.bytes[i] != 0xa5)
      Fail("dot wrote past its result: isa=%s %s", cpu::IsaName(isa), Describe(c).c_str());
  }
  out.bytes.resize(size);
  return out;
}

HostCase RandomCase(int seed) {
  std::mt19937 random(seed);
  const auto pick = [&](auto... values) {
    const int64_t all[] = {values...};
    return all[random() % std::size(all)];
  };
  const DType x_dtype = kDTypes[random() % 3];
  const Problem p = {
      .m = pick(0, 1, 1, 1, 2, 3, 4, 5, 7, 8, 9, 12, 16, 17, 31, 32, 33),
      .n = pick(0, 1, 7, 8, 15, 16, 17, 33, 48, 100, 256, 257, 300),
      .k = pick(0, 1, 15, 31, 32, 33, 63, 64, 65, 96, 127, 128, 160, 200, 256, 500, 512, 513, 640,
                1000, 1100),
      .group_size = pick(32, 64, 96, 128, 160, 256, 1 << 20),
      .x_dtype = x_dtype,
      .out_dtype = random() % 2 ? x_dtype : W4A16_F32,
      .has_zeros = static_cast<int32_t>(random() % 2),
      .has_bias = static_cast<int32_t>(random() % 2),
      .batch_invariant = 0,
  };
  const float alpha = random() % 3 == 0 ? -0.75f : 1.0f;
  return HostCase(p, seed, alpha, random() % 2);
}

void TestDot(Isa isa, int seed) {
  const HostCase c = RandomCase(seed);
  const HostArray out = RunDot(isa, c, 1);
  for (int64_t m = 0; m < c.problem.m; ++m) {
    for (int64_t n = 0; n < c.problem.n; ++n) {
      const HostCase::Expected want = c.Reference(m, n);
      const double got = out[m * c.problem.n + n];
      if (!(std::abs(got - want.value) <= c.Tolerance(want)))
        Fail("cpu_test %d: isa=%s %s: out[%d, %d] = %.9g, expected %.9g within %.3g", seed,
             cpu::IsaName(isa), Describe(c).c_str(), static_cast<int>(m), static_cast<int>(n), got,
             want.value, c.Tolerance(want));
    }
  }
  for (int threads : {2, 3, 7}) {
    if (RunDot(isa, c, threads).bytes != out.bytes)
      Fail("cpu_test %d: isa=%s %s: %d threads differ from 1", seed, cpu::IsaName(isa),
           Describe(c).c_str(), threads);
  }
}

// A row's result does not depend on the rows beside it.
void TestRowsAreIndependent(Isa isa) {
  const HostCase all({33, 40, 700, 128, W4A16_BF16, W4A16_F32, 1, 1}, 1, 1.0f, true);
  const HostArray want = RunDot(isa, all, 2);
  for (int rows : {1, 2, 3, 5, 6, 7, 8, 11}) {
    HostCase some = all;
    some.problem.m = rows;
    const HostArray got = RunDot(isa, some, 2);
    if (std::memcmp(got.bytes.data(), want.bytes.data(), got.bytes.size()) != 0)
      Fail("rows depend on M: isa=%s m=%d", cpu::IsaName(isa), rows);
  }
}

// Row m of x picks k = m: out is the dequantised weight, rounded once.
void TestOneHot(Isa isa, DType dtype, int64_t group_size) {
  HostCase c({96 + 5, 40, 96 + 5, group_size, dtype, dtype, 1, 0}, 2, 1.0f, true);
  const Problem& p = c.problem;
  for (int64_t i = 0; i < c.x.size(); ++i) c.x.Set(i, i / p.k == i % p.k);
  const HostArray out = RunDot(isa, c, 2);
  HostArray want(dtype, out.size());
  for (int64_t k = 0; k < p.k; ++k) {
    for (int64_t n = 0; n < p.n; ++n) {
      const int64_t g = (group_size >= p.k ? 0 : k / group_size) * p.n + n;
      const float difference = c.codes[k * p.n + n] - static_cast<float>(c.zeros[g]);
      want.Set(k * p.n + n, difference * static_cast<float>(c.scales[g]));
      if (out[k * p.n + n] != want[k * p.n + n])
        Fail("one-hot: isa=%s %s: w[%d, %d] = %.9g, expected %.9g", cpu::IsaName(isa),
             Describe(c).c_str(), static_cast<int>(k), static_cast<int>(n), out[k * p.n + n],
             want[k * p.n + n]);
    }
  }
}

// Every finite 16-bit scale, so that every kind of rounding to 16 bits occurs.
void TestEveryScale(Isa isa, DType dtype) {
  HostCase c({1, 65536, 1, 32, dtype, dtype, 0, 0}, 3);
  c.x.Set(0, 1.0f);
  for (int i = 0; i < 65536; ++i) {
    const uint16_t bits = static_cast<uint16_t>(i);
    std::memcpy(c.scales.bytes.data() + 2 * i, &bits, 2);
  }
  const HostArray out = RunDot(isa, c, 2);
  HostArray want(dtype, 1);
  for (int i = 0; i < 65536; ++i) {
    want.Set(0, (c.codes[i] - 8.0f) * static_cast<float>(c.scales[i]));
    if (out[i] != want[0] && !(std::isnan(out[i]) && std::isnan(want[0])))
      Fail("scale %04x, code %d: isa=%s %s: %.9g, expected %.9g", i, c.codes[i], cpu::IsaName(isa),
           DTypeName(dtype), out[i], want[0]);
  }
}

// Sums of small integers times powers of two have no rounding at all.
void TestExactIntegers(Isa isa, DType dtype) {
  HostCase c({9, 70, 900, 32, dtype, W4A16_F32, 1, 0}, 4);
  std::mt19937 random(4);
  for (int64_t i = 0; i < c.x.size(); ++i) c.x.Set(i, static_cast<int>(random() % 9) - 4.0f);
  for (int64_t i = 0; i < c.scales.size(); ++i)
    c.scales.Set(i, std::ldexp(1.0f, static_cast<int>(random() % 4) - 2));
  const HostArray out = RunDot(isa, c, 2);
  for (int64_t i = 0; i < out.size(); ++i) {
    const double want = c.Reference(i / c.problem.n, i % c.problem.n).value;
    if (out[i] != want)
      Fail("integers: isa=%s %s: out[%d] = %.9g, expected %.9g", cpu::IsaName(isa),
           DTypeName(dtype), static_cast<int>(i), out[i], want);
  }
}

// A NaN in x stays in its row, one in a scale in its column; an infinity gives what its formula
// says, without a NaN from padding.
void TestNotFinite(Isa isa, DType dtype) {
  HostCase c({9, 21, 101, 32, dtype, dtype, 0, 0, 0}, 5);
  const Problem& p = c.problem;
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const float infinity = std::numeric_limits<float>::infinity();
  c.x.Set(2 * p.k + 70, nan);
  for (int64_t k = 0; k < p.k; ++k) c.x.Set(4 * p.k + k, k == p.k - 1 ? infinity : 0.0f);
  for (int64_t k = 0; k < p.k; ++k) c.x.Set(5 * p.k + k, k == p.k - 1 ? 1.0f : 0.0f);
  c.scales.Set(1 * p.n + 6, nan);
  c.scales.Set(3 * p.n + 20, infinity);
  const HostArray out = RunDot(isa, c, 2);
  for (int64_t m = 0; m < p.m; ++m) {
    for (int64_t n = 0; n < p.n; ++n) {
      const double want = c.Reference(m, n).value, got = out[m * p.n + n];
      if (std::isnan(want)   ? !std::isnan(got)
          : std::isinf(want) ? got != want
                             : !std::isfinite(got))
        Fail("not finite: isa=%s %s: out[%d, %d] = %g, expected %g", cpu::IsaName(isa),
             DTypeName(dtype), static_cast<int>(m), static_cast<int>(n), got, want);
    }
  }
}

void TestPack() {
  cpu::ThreadExecutor executor(2);
  for (auto [k, n] :
       {std::pair<int64_t, int64_t>{0, 5}, {5, 0}, {1, 1}, {64, 16}, {65, 17}, {200, 300}}) {
    std::vector<uint8_t> codes(k * n);
    std::mt19937 random(6);
    for (uint8_t& code : codes) code = static_cast<uint8_t>(random());
    std::vector<uint32_t> want(BlocksK(k) * BlocksN(n) * kBlockWords), got(want.size(), ~0u);
    for (int64_t i = 0; i < k * n; ++i) {
      const CodePlace place = PlaceOf(i % n % kBlockN, i / n % kBlockK);
      want[BlockIndex(i / n, i % n, BlocksN(n)) * kBlockWords + place.word] |=
          (codes[i] & 15u) << (4 * place.nibble);
    }
    cpu::Pack(codes.data(), k, n, got.data(), executor);
    if (got != want) Fail("pack k=%d n=%d", static_cast<int>(k), static_cast<int>(n));
  }
}

void TestDequantize(int seed) {
  std::mt19937 random(seed);
  HostCase c = RandomCase(seed);
  const Problem& p = c.problem;
  const DType out_dtype = kDTypes[random() % 3];
  HostArray got(out_dtype, p.k * p.n), want(out_dtype, p.k * p.n);
  cpu::ThreadExecutor executor(2);
  cpu::Dequantize(c.qweight.data(), c.scales.bytes.data(),
                  p.has_zeros ? c.zeros.bytes.data() : nullptr, p.x_dtype, p.k, p.n, p.group_size,
                  out_dtype, got.bytes.data(), executor);
  for (int64_t i = 0; i < want.size(); ++i) {
    const int64_t g = (p.group_size >= p.k ? 0 : i / p.n / p.group_size) * p.n + i % p.n;
    const float zero = p.has_zeros ? static_cast<float>(c.zeros[g]) : 8.0f;
    want.Set(i, (c.codes[i] - zero) * static_cast<float>(c.scales[g]));
  }
  if (got.bytes != want.bytes)
    Fail("dequantize seed=%d to %s: %s", seed, DTypeName(out_dtype), Describe(c).c_str());
}

void TestQuantize(int seed, DType w_dtype, DType scale_dtype, bool symmetric) {
  const HostCase shape = RandomCase(seed);
  const int64_t k = shape.problem.k, n = shape.problem.n, size = shape.problem.group_size;
  const int64_t groups = NumGroups(k, size);
  HostArray w(w_dtype, k * n);
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  for (int64_t i = 0; i < w.size(); ++i) w.Set(i, i % n == 2 ? 0.0f : normal(random) + i % 3);
  if (w.size() > 0) w.Set(0, std::numeric_limits<float>::quiet_NaN());
  HostArray scales(scale_dtype, groups * n), zeros(scale_dtype, groups * n);
  HostArray want_scales(scale_dtype, groups * n), want_zeros(scale_dtype, groups * n);
  std::vector<uint8_t> codes(k * n);
  for (int64_t g = 0; g < groups * n; ++g) {
    const int64_t begin = g / n * size, end = size >= k ? k : std::min(k, begin + size);
    float lo = 0, hi = 0, most = 0;
    for (int64_t i = begin; i < end; ++i) {
      const float value = static_cast<float>(w[i * n + g % n]);
      lo = MinOrNan(lo, value);
      hi = MaxOrNan(hi, value);
      most = MaxOrNan(most, std::abs(value));
    }
    want_scales.Set(g, symmetric ? most * kSymmetricStep : (hi - lo) * kAsymmetricStep);
    const float scale = static_cast<float>(want_scales[g]);
    const float zero = symmetric ? 8.0f : ZeroPoint(lo, scale);
    want_zeros.Set(g, zero);
    for (int64_t i = begin; i < end; ++i)
      codes[i * n + g % n] = CodeOf(static_cast<float>(w[i * n + g % n]), scale, zero);
  }
  std::vector<uint32_t> want(BlocksK(k) * BlocksN(n) * kBlockWords), got(want.size(), ~0u);
  cpu::ThreadExecutor executor(2);
  cpu::Pack(codes.data(), k, n, want.data(), executor);
  cpu::Quantize(w.bytes.data(), w_dtype, k, n, size, scale_dtype, got.data(), scales.bytes.data(),
                symmetric ? nullptr : zeros.bytes.data(), executor);
  bool same = got == want;
  for (int64_t g = 0; g < groups * n; ++g) {
    same &= scales[g] == want_scales[g] || (std::isnan(scales[g]) && std::isnan(want_scales[g]));
    same &= symmetric || zeros[g] == want_zeros[g];
  }
  if (!same)
    Fail("quantize seed=%d %s to %s symmetric=%d k=%d n=%d group_size=%d", seed, DTypeName(w_dtype),
         DTypeName(scale_dtype), symmetric, static_cast<int>(k), static_cast<int>(n),
         static_cast<int>(size));
}

// The value of a 16-bit pattern from the formats' definitions.
double ValueOf(uint16_t bits, int mantissa_bits) {
  const int exponent_bits = 15 - mantissa_bits, bias = (1 << (exponent_bits - 1)) - 1;
  const int exponent = bits >> mantissa_bits & ((1 << exponent_bits) - 1);
  const int mantissa = bits & ((1 << mantissa_bits) - 1);
  double value;
  if (exponent == (1 << exponent_bits) - 1)
    value = mantissa ? std::nan("") : std::numeric_limits<double>::infinity();
  else if (exponent == 0)
    value = std::ldexp(mantissa, 1 - bias - mantissa_bits);
  else
    value = std::ldexp((1 << mantissa_bits) + mantissa, exponent - bias - mantissa_bits);
  return bits & 0x8000 ? -value : value;
}

// Every 16-bit pattern widens to its value. Narrowing is checked at every place where its result
// changes: halfway between neighbours, and at the floats on either side.
void TestFloat16(int mantissa_bits, float (*widen)(uint16_t), uint16_t (*narrow)(float)) {
  const uint16_t infinity_bits = static_cast<uint16_t>(0x7fff >> mantissa_bits << mantissa_bits);
  const auto expect = [&](float value, uint16_t want) {
    for (uint16_t sign : {0, 0x8000}) {
      const uint16_t got = narrow(sign ? -value : value);
      if (got != (want | sign))
        Fail("narrowing %a to %d mantissa bits: %04x, expected %04x", sign ? -value : value,
             mantissa_bits, got, want | sign);
    }
  };
  for (int i = 0; i < 65536; ++i) {
    const uint16_t bits = static_cast<uint16_t>(i);
    const double want = ValueOf(bits, mantissa_bits);
    const float got = widen(bits);
    if (std::isnan(want) ? !std::isnan(got)
                         : got != want || std::signbit(got) != std::signbit(want))
      Fail("widening %04x of %d mantissa bits: %a, expected %a", i, mantissa_bits, got, want);
    if (std::isnan(want) && narrow(got) != (bits | 1 << (mantissa_bits - 1)))
      Fail("NaN %04x of %d mantissa bits came back as %04x", i, mantissa_bits, narrow(got));
    if (std::isnan(want) && mantissa_bits == 10 && !(std::bit_cast<uint32_t>(got) & 0x400000))
      Fail("NaN %04x of float16 widens to one that is not quiet", i);
    if (bits >= infinity_bits) continue;
    // The neighbour of the largest finite number would be a power of two.
    const double above = bits + 1 == infinity_bits ? 2 * want - ValueOf(bits - 1, mantissa_bits)
                                                   : ValueOf(bits + 1, mantissa_bits);
    const float middle = static_cast<float>((want + above) / 2);
    expect(got, bits);
    expect(middle, bits + (bits & 1));
    expect(std::nextafter(middle, 0.0f), bits);
    expect(std::nextafter(middle, std::numeric_limits<float>::infinity()), bits + 1);
  }
  expect(std::numeric_limits<float>::infinity(), infinity_bits);
}

void TestExecutor() {
  for (int threads : {0, 1, 2, 7}) {
    cpu::ThreadExecutor executor(threads);
    for (int64_t tasks : {0, 1, 3, 1000}) {
      std::vector<int> runs(tasks);
      executor.ParallelFor(tasks, [&](int64_t i) { ++runs[i]; });
      for (int count : runs) {
        if (count != 1) Fail("executor of %d threads ran a task %d times", threads, count);
      }
    }
  }
}

// Median microseconds of 4096 x 4096 products of float32 activations, on all threads, over copies
// of the weight that no cache holds together.
void Time(const std::vector<Isa>& isas) {
  constexpr int64_t kSize = 4096, kCopies = 24, kRuns = 49;
  for (const int64_t m : {1, 16}) {
    const HostCase c({.m = m,
                      .n = kSize,
                      .k = kSize,
                      .group_size = 128,
                      .x_dtype = W4A16_F32,
                      .out_dtype = W4A16_F32,
                      .has_zeros = 0,
                      .has_bias = 0,
                      .batch_invariant = 0},
                     1);
    const std::vector<std::vector<uint32_t>> copies(kCopies, c.qweight);
    HostArray out(W4A16_F32, m * kSize);
    cpu::ThreadExecutor executor(0);
    for (Isa isa : isas) {
      std::vector<double> times;
      for (int run = 0; run < kRuns; ++run) {
        Operands o = {};
        o.x = c.x.bytes.data();
        o.qweight = copies[run % kCopies].data();
        o.scales = c.scales.bytes.data();
        o.out = out.bytes.data();
        o.alpha = 1;
        const auto start = std::chrono::steady_clock::now();
        cpu::DotWith(isa, c.problem, o, executor);
        const std::chrono::duration<double, std::micro> us =
            std::chrono::steady_clock::now() - start;
        times.push_back(us.count());
      }
      std::nth_element(times.begin(), times.begin() + kRuns / 2, times.end());
      std::printf("M=%-3d %-9s %8.0f us\n", static_cast<int>(m), cpu::IsaName(isa),
                  times[kRuns / 2]);
    }
  }
}

int Main(int argc, char** argv) {
  std::vector<Isa> isas;
  for (Isa isa : cpu::kAllIsas) {
    if (cpu::IsaAvailable(isa)) isas.push_back(isa);
  }
  if (argc > 1 && std::string(argv[1]) == "--time") {
    Time(isas);
    return 0;
  }
  if (argc > 1) {
    for (Isa isa : isas) TestDot(isa, std::atoi(argv[1]));
    return 0;
  }
  TestFloat16(10, cpu::HalfToFloat, cpu::FloatToHalf);
  TestFloat16(7, cpu::BFloat16ToFloat, cpu::FloatToBFloat16);
  TestExecutor();
  TestPack();
  for (int seed = 0; seed < 60; ++seed) {
    TestDequantize(seed);
    for (bool symmetric : {false, true})
      TestQuantize(seed, kDTypes[seed % 3], kDTypes[seed / 3 % 3], symmetric);
  }
  for (Isa isa : isas) {
    for (int seed = 0; seed < kDotCases; ++seed) TestDot(isa, seed);
    TestRowsAreIndependent(isa);
    for (DType dtype : kDTypes) {
      for (int64_t group_size : {32, 64, 96, 1000}) TestOneHot(isa, dtype, group_size);
      TestExactIntegers(isa, dtype);
      TestNotFinite(isa, dtype);
    }
    for (DType dtype : {W4A16_F16, W4A16_BF16}) TestEveryScale(isa, dtype);
    std::printf("%s: ok\n", cpu::IsaName(isa));
  }
  if (std::string(cpu::InstructionSet()) != cpu::IsaName(isas.back()))
    Fail("Dot uses %s, not the best available", cpu::InstructionSet());
  return 0;
}

}  // namespace
}  // namespace w4a16

int main(int argc, char** argv) { return w4a16::Main(argc, argv); }
