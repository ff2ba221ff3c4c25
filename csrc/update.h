// What the CPU and the CUDA kernels of swa_fast::update_ and swa_fast::swap_ share: segments, rules
// and random numbers. swa_fast/_layout.py describes the table of segments that swa_fast/engine.py
// builds.
#pragma once

#include <cmath>
#include <cstring>
#include <type_traits>

#include "layout.h"
#include "stable_compat.h"

namespace swa_fast {

// One row of the table: a run of consecutive elements, where it is read and where its averages lie.
struct Segment {
  const int64_t* words;

  C10_HOST_DEVICE const void* source() const {
    return reinterpret_cast<const void*>(words[kSource]);
  }
  C10_HOST_DEVICE char* average(int row) const {
    return reinterpret_cast<char*>(words[kSegmentHeader + row]);
  }
  // The number of the first element within its average.
  C10_HOST_DEVICE int64_t place() const { return words[kPlace]; }
  C10_HOST_DEVICE int64_t count() const { return words[kPacked] & 0xffffffff; }
  C10_HOST_DEVICE int average_type() const { return (words[kPacked] >> kAverageType) & 0xff; }
  C10_HOST_DEVICE int source_type() const { return (words[kPacked] >> kSourceType) & 0xff; }
  C10_HOST_DEVICE bool copied() const { return (words[kPacked] >> kCopied) & 1; }
  // What divides the address of every average, 16 at most.
  C10_HOST_DEVICE int alignment() const { return 1 << ((words[kPacked] >> kAlignment) & 7); }
};

// The bits of a floating type's exponent: all set for infinities and NaN, and only for them.
template <typename T>
struct Exponent;
template <>
struct Exponent<float> {
  using Bits = uint32_t;
  static constexpr Bits kMask = 0x7f800000u;
};
template <>
struct Exponent<double> {
  using Bits = uint64_t;
  static constexpr Bits kMask = 0x7ff0000000000000u;
};
template <>
struct Exponent<BFloat16> {
  using Bits = uint16_t;
  static constexpr Bits kMask = 0x7f80u;
};
template <>
struct Exponent<Half> {
  using Bits = uint16_t;
  static constexpr Bits kMask = 0x7c00u;
};

// One average's rule, a row of the `rules` tensor. With n updates before this one and
// s = n - update_after_step, the weight of the source is
//
//   SWA             1 / (n + 1)
//   external        1 at n = 0, else 0: the average belongs to a user's function
//   ring            1 if n mod gamma = power, else 0: one of the last gamma sources
//   filled          1 / (power + 1) if n > power, else 0: into the mean of a ring
//   all others      1                                                      if s <= 0, else
//   constant        1 - decay
//   inverse gamma   1 - clamp(1 - (1 + s / gamma)^-power, min_decay, decay)
//   ratio           1 - clamp((1 + s) / (10 + s), min_decay, decay)
//   exponential     1 - clamp(decay (1 - exp(-s / gamma)), min_decay, decay)
//   power law       1 - (s / (s + 1))^power
//   debiased        (1 - decay) / (1 - exp((s + 1) power)), power = log decay
struct WeightRule {
  double kind, decay, min_decay, gamma, power, update_after_step, unused[2];

  C10_HOST_DEVICE double weight(int64_t n) const {
    const int k = static_cast<int>(kind);
    const double count = static_cast<double>(n);
    if (k == kSwa) return 1.0 / (count + 1.0);
    if (k == kExternal) return n == 0 ? 1.0 : 0.0;
    if (k == kRing) {
      return n % static_cast<int64_t>(gamma) == static_cast<int64_t>(power) ? 1.0 : 0.0;
    }
    if (k == kFilled) return count > power ? 1.0 / (power + 1.0) : 0.0;
    const double s = count - update_after_step;
    if (s <= 0.0) return 1.0;
    if (k == kConstant) return 1.0 - decay;
    double d;
    if (k == kRatio) {
      d = (1.0 + s) / (10.0 + s);
    } else {
      // One logarithm and one exponential for all: they are inlined on the GPU, and pow would be a
      // call that needs a stack.
      const bool logarithmic = k == kInverseGamma || k == kPowerLaw;
      const double x = logarithmic ? log1p(k == kPowerLaw ? -1.0 / (s + 1.0) : s / gamma) : 0.0;
      const double rest = -expm1(k == kPowerLaw       ? power * x
                                 : k == kInverseGamma ? -power * x
                                 : k == kDebiased     ? power * (s + 1.0)
                                                      : -s / gamma);
      if (k == kPowerLaw) return rest;
      if (k == kDebiased) return (1.0 - decay) / rest;
      d = k == kExponential ? decay * rest : rest;
    }
    return 1.0 - fmax(fmin(d, decay), min_decay);
  }
};
static_assert(sizeof(WeightRule) == kRuleColumns * sizeof(double), "a row of the rules tensor");
static_assert(alignof(WeightRule) == alignof(double), "rows lie where doubles may");

// Random bits for stochastic rounding: Philox4x32-10 (Salmon et al., SC 2011), keyed by the seed.
// The counter is made of the element's place in the average, the average's row and its n, so the
// bits of an element depend on nothing else: no chunking, thread or device shows in the result.
// One call serves eight elements, 16 bits each.
struct Philox {
  static constexpr uint32_t kMultiplier0 = 0xD2511F53u, kMultiplier1 = 0xCD9E8D57u;
  static constexpr uint32_t kKeyStep0 = 0x9E3779B9u, kKeyStep1 = 0xBB67AE85u;
  static constexpr int kRounds = 10;

  uint32_t word[4];

  C10_HOST_DEVICE Philox(int64_t seed, uint64_t group_of_eight, int64_t n, int row) {
    uint32_t c0 = static_cast<uint32_t>(group_of_eight);
    uint32_t c1 = static_cast<uint32_t>(group_of_eight >> 32);
    uint32_t c2 = static_cast<uint32_t>(n);
    uint32_t c3 = static_cast<uint32_t>(row);
    uint32_t k0 = static_cast<uint32_t>(seed);
    uint32_t k1 = static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32);
#ifdef __CUDA_ARCH__
#pragma unroll
#endif
    for (int round = 0; round < kRounds; ++round) {
      const uint64_t p0 = uint64_t{kMultiplier0} * c0;
      const uint64_t p1 = uint64_t{kMultiplier1} * c2;
      c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
      c1 = static_cast<uint32_t>(p1);
      c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
      c3 = static_cast<uint32_t>(p0);
      k0 += kKeyStep0;
      k1 += kKeyStep1;
    }
    word[0] = c0;
    word[1] = c1;
    word[2] = c2;
    word[3] = c3;
  }

  // `i` is the element's place within its eight; a constant after unrolling.
  C10_HOST_DEVICE uint32_t bits(int i) const { return (word[i / 2] >> (16 * (i % 2))) & 0xffffu; }
};

// x, rounded up with the probability of its distance from the next lower bfloat16.
C10_HOST_DEVICE inline BFloat16 round_stochastically(float x, uint32_t random16) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  if ((bits & 0x7f800000u) == 0x7f800000u) return static_cast<BFloat16>(x);  // infinite or NaN
  return BFloat16(static_cast<uint16_t>((bits + random16) >> 16), BFloat16::from_bits());
}

// Decides on the device whether an update takes place at all: after every `every`-th optimiser step
// that the gradient scaler did not skip, which it has if *found_inf is not zero. `offset` is added
// to the steps that `steps` has counted; before step 0 nothing is due.
struct Gate {
  const float* found_inf;
  int64_t* steps;  // null: every update is due
  int64_t every, offset;

  C10_HOST_DEVICE bool skipped() const { return found_inf != nullptr && *found_inf != 0.0f; }
  C10_HOST_DEVICE bool due() const {
    if (steps == nullptr) return true;
    const int64_t step = *steps + offset;
    return step >= 0 && step % every == 0;
  }
};

inline Gate make_gate(const std::optional<Tensor>& found_inf, const std::optional<Tensor>& steps,
                      int64_t every, int64_t offset, const std::optional<Tensor>& counters,
                      const Tensor& n_averaged) {
  const auto beside = [&](const Tensor& tensor) {
    return tensor.is_cuda() == n_averaged.is_cuda() &&
           (!tensor.is_cuda() || tensor.get_device_index() == n_averaged.get_device_index());
  };
  STD_TORCH_CHECK(!found_inf || (found_inf->scalar_type() == ScalarType::Float &&
                                 found_inf->numel() == 1 && beside(*found_inf)),
                  "update_: found_inf must hold one fp32 on the device of n_averaged");
  STD_TORCH_CHECK(
      !steps || (steps->scalar_type() == ScalarType::Long && steps->numel() == 1 && beside(*steps)),
      "update_: steps must hold one int64 on the device of n_averaged");
  STD_TORCH_CHECK(every >= 1, "update_: every must be 1 or more, found ", every);
  STD_TORCH_CHECK(counters || !(found_inf || steps), "update_: found_inf and steps need counters");
  return {found_inf ? static_cast<const float*>(found_inf->const_data_ptr()) : nullptr,
          steps ? static_cast<int64_t*>(steps->mutable_data_ptr()) : nullptr, every, offset};
}

// Checks what the table's addresses do not tell; returns the number of averages.
inline int check_update_arguments(const Tensor& n_averaged, const std::optional<Tensor>& counters,
                                  const Tensor& rules, const Tensor& table) {
  const int64_t k = n_averaged.numel();
  STD_TORCH_CHECK(1 <= k && k <= kMaxAverages, "update_: expected 1 to ", kMaxAverages,
                  " averages, found ", k);
  STD_TORCH_CHECK(n_averaged.scalar_type() == ScalarType::Long && n_averaged.is_contiguous(),
                  "update_: n_averaged must be contiguous int64");
  STD_TORCH_CHECK(!counters || (counters->scalar_type() == ScalarType::Long &&
                                counters->numel() == kCounters && counters->is_contiguous()),
                  "update_: counters must hold ", kCounters, " int64");
  STD_TORCH_CHECK(rules.is_cpu() && rules.scalar_type() == ScalarType::Double &&
                      rules.numel() == k * kRuleColumns && rules.is_contiguous(),
                  "update_: rules must be fp64 of shape [", k, ", ", kRuleColumns, "] on the CPU");
  STD_TORCH_CHECK(table.scalar_type() == ScalarType::Long && table.dim() == 2 &&
                      table.size(1) == kSegmentHeader + k && table.is_contiguous(),
                  "update_: table must be int64 of shape [segments, ", kSegmentHeader + k, "]");
  return static_cast<int>(k);
}

// Rows of the averages in a table that serves swa_fast::swag_, and after these one for each of the
// last deviations.
constexpr int kSwagMean = 0;
constexpr int kSwagSquares = 1;
constexpr int kSwagDeviations = 2;

inline void check_swag_arguments(const Tensor& n_averaged, const Tensor& counters,
                                 const Tensor& table, int64_t pairs, int64_t columns) {
  STD_TORCH_CHECK(n_averaged.scalar_type() == ScalarType::Long && n_averaged.numel() == 1,
                  "swag_: n_averaged must hold one int64");
  STD_TORCH_CHECK(counters.scalar_type() == ScalarType::Long && counters.numel() == kCounters &&
                      counters.is_contiguous(),
                  "swag_: counters must hold ", kCounters, " int64");
  STD_TORCH_CHECK(columns >= 1, "swag_: expected 1 column or more, found ", columns);
  STD_TORCH_CHECK(table.scalar_type() == ScalarType::Long && table.dim() == 2 &&
                      table.size(1) >= kSegmentHeader + kSwagDeviations + columns &&
                      table.is_contiguous(),
                  "swag_: table must be int64 of shape [segments, ",
                  kSegmentHeader + kSwagDeviations + columns, " or more]");
  // Averages of fp32 from sources of fp32, bfloat16 and fp16, or both of fp64.
  constexpr int64_t kAllowed = 1 << (4 * kFloat + kFloat) | 1 << (4 * kFloat + kBfloat16) |
                               1 << (4 * kFloat + kHalf) | 1 << (4 * kDouble + kDouble);
  STD_TORCH_CHECK((pairs & ~kAllowed) == 0, "swag_: expected averages of fp32 or fp64");
}

// The number of averages in a table that serves a swap with average `row`.
inline int check_swap_arguments(const Tensor& table, int64_t row) {
  STD_TORCH_CHECK(table.scalar_type() == ScalarType::Long && table.dim() == 2 &&
                      table.size(1) > kSegmentHeader && table.is_contiguous(),
                  "swap_: table must be int64 of shape [segments, ", kSegmentHeader,
                  " + averages]");
  const int64_t rows = table.size(1) - kSegmentHeader;
  STD_TORCH_CHECK(0 <= row && row < rows, "swap_: expected average 0 to ", rows - 1, ", found ",
                  row);
  return static_cast<int>(rows);
}

}  // namespace swa_fast
