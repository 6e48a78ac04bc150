// A problem's random operands and its result in double precision, on the host: what the stand-alone
// program and the native tests check kernels against. Slow and plain on purpose.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

#include "cpu/float16.h"
#include "layout.h"
#include "problem.h"

namespace w4a16 {

// An array of one of the library's types, as raw bytes.
struct HostArray {
  DType dtype;
  std::vector<uint8_t> bytes;

  HostArray(DType dtype_, int64_t size)
      : dtype(dtype_), bytes(static_cast<size_t>(size) * DTypeBytes(dtype_)) {}

  int64_t size() const { return static_cast<int64_t>(bytes.size()) / DTypeBytes(dtype); }

  double operator[](int64_t i) const {
    if (dtype == W4A16_F32) return Load<float>(i);
    const uint16_t bits = Load<uint16_t>(i);
    return dtype == W4A16_F16 ? cpu::HalfToFloat(bits) : cpu::BFloat16ToFloat(bits);
  }

  void Set(int64_t i, float value) {
    if (dtype == W4A16_F32) return Store(i, value);
    Store(i, dtype == W4A16_F16 ? cpu::FloatToHalf(value) : cpu::FloatToBFloat16(value));
  }

 private:
  template <typename T>
  T Load(int64_t i) const {
    T value;
    std::memcpy(&value, bytes.data() + i * sizeof(T), sizeof(T));
    return value;
  }
  template <typename T>
  void Store(int64_t i, T value) {
    std::memcpy(bytes.data() + i * sizeof(T), &value, sizeof(T));
  }
};

// The operands of `problem`, drawn from `seed`: x and bias standard normal, scales in [0.5, 1.5] /
// 8 with either sign, integer zeros (or multiples of 1/16, where `fractional_zeros`). Of a third of
// the groups all scales, and of another half of them, are 1/16 of that: kernels tell small ones.
struct HostCase {
  Problem problem;
  float alpha = 1.0f;
  HostArray x, scales, zeros, bias;
  std::vector<uint8_t> codes;     // [K, N]
  std::vector<uint32_t> qweight;  // packed, with random codes in the padding

  HostCase(const Problem& p, uint64_t seed, float alpha_ = 1.0f, bool fractional_zeros = false)
      : problem(p),
        alpha(alpha_),
        x(p.x_dtype, p.m * p.k),
        scales(p.x_dtype, NumGroups(p) * p.n),
        zeros(p.x_dtype, p.has_zeros ? NumGroups(p) * p.n : 0),
        bias(p.x_dtype, p.has_bias ? p.n : 0),
        codes(static_cast<size_t>(p.k * p.n)),
        qweight(static_cast<size_t>(BlocksK(p.k) * BlocksN(p.n) * kBlockWords)) {
    std::mt19937_64 random(seed);
    std::normal_distribution<float> normal;
    std::uniform_real_distribution<float> uniform(0.5f, 1.5f);
    for (int64_t i = 0; i < x.size(); ++i) x.Set(i, normal(random));
    for (int64_t i = 0; i < scales.size(); ++i) {
      const uint64_t kind = (static_cast<uint64_t>(i / p.n) + seed) % 3;
      const bool is_small = kind == 1 || (kind == 2 && random() % 2 == 0);
      scales.Set(i, uniform(random) / (is_small ? 128 : 8) * ((random() & 1) ? 1 : -1));
    }
    for (int64_t i = 0; i < zeros.size(); ++i)
      zeros.Set(i, fractional_zeros ? static_cast<float>(random() % 241) / 16
                                    : static_cast<float>(random() % 16));
    for (int64_t i = 0; i < bias.size(); ++i) bias.Set(i, normal(random));
    for (uint32_t& word : qweight) word = static_cast<uint32_t>(random());
    for (int64_t k = 0; k < p.k; ++k) {
      for (int64_t n = 0; n < p.n; ++n) {
        const CodePlace place = PlaceOf(n % kBlockN, k % kBlockK);
        const uint32_t word = qweight[BlockIndex(k, n, BlocksN(p.n)) * kBlockWords + place.word];
        codes[k * p.n + n] = (word >> (4 * place.nibble)) & 15;
      }
    }
  }

  double Weight(int64_t k, int64_t n) const {
    const int64_t g = problem.group_size >= problem.k ? 0 : k / problem.group_size;
    const double zero = problem.has_zeros ? zeros[g * problem.n + n] : kSymmetricZero;
    return (codes[k * problem.n + n] - zero) * scales[g * problem.n + n];
  }

  // out[m, n], and the root of the sum of its squared terms, which its rounding errors are measured
  // by.
  struct Expected {
    double value, magnitude;
  };
  Expected Reference(int64_t m, int64_t n) const {
    double sum = 0, squares = 0;
    for (int64_t k = 0; k < problem.k; ++k) {
      const double term = alpha * x[m * problem.k + k] * Weight(k, n);
      sum += term;
      squares += term * term;
    }
    if (problem.has_bias) sum += bias[n];
    return {sum, std::sqrt(squares)};
  }

  // Largest error allowed: weights may be rounded to x's type before they are multiplied, which
  // adds up like a random walk (6 steps of epsilon stand for over 20 standard deviations), and the
  // result is rounded once.
  double Tolerance(const Expected& expected) const {
    const auto epsilon = [](DType t) {
      return t == W4A16_F16 ? 0x1p-10 : t == W4A16_BF16 ? 0x1p-7 : 0x1p-20;
    };
    return 3 * epsilon(problem.x_dtype) * expected.magnitude +
           epsilon(problem.out_dtype) * std::abs(expected.value) + 1e-7;
  }
};

}  // namespace w4a16
