// What the CPU and the CUDA kernels of swa_fast::update_ and swa_fast::exchange_ share: the table
// of runs, the rules and the random numbers. swa_fast/engine.py builds what is read here.
#pragma once

#include <cmath>
#include <cstring>
#include <type_traits>

#include "average.h"

namespace swa_fast {

// Most averages that one update serves; their rules travel as kernel arguments.
constexpr int kMaxAverages = 16;

// One run of consecutive elements: a whole tensor, or a part of one.
struct alignas(32) Run {
  const void* source;
  char* average;      // of row 0
  int64_t row_bytes;  // from one average to the next
  // Bits 0-31 elements, 32-39 average type, 40-47 source type, 48 copied always, and from 49 on the
  // index of the tensor of averages, which only the reference needs.
  int64_t packed;

  C10_HOST_DEVICE int64_t count() const { return packed & 0xffffffff; }
  C10_HOST_DEVICE int average_type() const { return (packed >> 32) & 0xff; }
  C10_HOST_DEVICE int source_type() const { return (packed >> 40) & 0xff; }
  C10_HOST_DEVICE bool copied() const { return (packed >> 48) & 1; }
};
static_assert(sizeof(Run) == 32 && std::is_trivially_copyable_v<Run>, "one memory sector");

// Type codes of a run. Bytes: any type, copied unchanged; elements are bytes.
enum TypeCode : int { kFloat = 0, kDouble = 1, kBFloat16 = 2, kHalf = 3, kBytes = 4 };

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
//   constant        1                                                      if s <= 0
//                   1 - decay                                              else
//   inverse gamma   the same with decay' = clamp(1 - (1 + s / gamma)^-power, min_decay, decay)
//   ratio           the same with decay' = clamp((1 + s) / (10 + s), min_decay, decay)
//   external        1 at n = 0, else 0: the average belongs to a user's function
struct WeightRule {
  double kind, decay, min_decay, gamma, power, update_after_step, unused[2];

  enum Kind : int { kSwa = 0, kConstant = 1, kInverseGamma = 2, kRatio = 3, kExternal = 4 };

  C10_HOST_DEVICE double weight(int64_t n) const {
    const int k = static_cast<int>(kind);
    if (k == kSwa) return 1.0 / static_cast<double>(n + 1);
    if (k == kExternal) return n == 0 ? 1.0 : 0.0;
    const double s = static_cast<double>(n) - update_after_step;
    if (s <= 0.0) return 1.0;
    if (k == kConstant) return 1.0 - decay;
    // exp and log1p are inlined on the GPU; pow is a call that needs a stack.
    const double d =
        k == kInverseGamma ? 1.0 - exp(-power * log1p(s / gamma)) : (1.0 + s) / (10.0 + s);
    return 1.0 - fmax(fmin(d, decay), min_decay);
  }
};
static_assert(sizeof(WeightRule) == 8 * sizeof(double), "a row of the rules tensor");

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

// state: n of each average, then the three counters below.
enum StateSlot : int { kTicket = 0, kNonFinite = 1, kSkipped = 2, kStateSlots = 3 };

struct UpdateArguments {
  int rows;
  // The first element of the bfloat16 averages: places for the random bits are counted from here.
  const char* bfloat16_base;
};

inline UpdateArguments check_update_arguments(const std::vector<Tensor>& averages,
                                              const Tensor& state, const Tensor& rules,
                                              const Tensor& table) {
  STD_TORCH_CHECK(!averages.empty(), "update_: expected at least one tensor of averages");
  UpdateArguments result{0, nullptr};
  for (const Tensor& tensor : averages) {
    STD_TORCH_CHECK(tensor.dim() == 2 && tensor.is_contiguous() &&
                        tensor.size(0) == averages[0].size(0) &&
                        tensor.get_device_index() == averages[0].get_device_index(),
                    "update_: averages must be contiguous, of two dimensions and on one device");
    if (tensor.scalar_type() == ScalarType::BFloat16) {
      result.bfloat16_base = static_cast<const char*>(tensor.const_data_ptr());
    }
  }
  const int64_t k = averages[0].size(0);
  STD_TORCH_CHECK(1 <= k && k <= kMaxAverages, "update_: expected 1 to ", kMaxAverages,
                  " averages, found ", k);
  STD_TORCH_CHECK(state.scalar_type() == ScalarType::Long && state.numel() == k + kStateSlots &&
                      state.is_contiguous(),
                  "update_: state must hold ", k + kStateSlots, " int64");
  STD_TORCH_CHECK(rules.is_cpu() && rules.scalar_type() == ScalarType::Double &&
                      rules.numel() == k * 8 && rules.is_contiguous(),
                  "update_: rules must be fp64 of shape [", k, ", 8] on the CPU");
  STD_TORCH_CHECK(
      table.scalar_type() == ScalarType::Long && table.numel() % 4 == 0 && table.is_contiguous(),
      "update_: table must be int64 of shape [runs, 4]");
  result.rows = static_cast<int>(k);
  return result;
}

}  // namespace swa_fast
