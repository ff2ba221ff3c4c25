// Philox, see update.h, for eight groups at a time:
//
//   philox_groups(seed, group, n, row, bits)
//
// has the same bits as Philox(seed, group, n, row) and the seven groups after it: in bits[j]
// sixteen for each of the eight elements of group + j, in their order.
#pragma once

#include "lanes.h"
#include "update.h"

namespace swa_fast {

#if SWA_FAST_HAS_LANES
constexpr int kPhiloxGroups = 8;
#endif

#if defined(__x86_64__) && SWA_FAST_HAS_LANES

// high and low: the words of the products of eight words and one factor.
SWA_FAST_LANES inline void multiply(__m256i words, __m256i factor, __m256i& high, __m256i& low) {
  const __m256i even = _mm256_mul_epu32(words, factor);
  const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64(words, 32), factor);
  high = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
  low = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
}

SWA_FAST_LANES inline void philox_groups(int64_t seed, uint64_t group, int64_t n, int row,
                                         Lanes<float>::Bits (&bits)[kPhiloxGroups]) {
  const __m256i all = _mm256_set1_epi64x(static_cast<int64_t>(group));
  // In the order in which the shuffles below put the groups from 0 to 7.
  const __m256 a = _mm256_castsi256_ps(_mm256_add_epi64(all, _mm256_setr_epi64x(0, 1, 4, 5)));
  const __m256 b = _mm256_castsi256_ps(_mm256_add_epi64(all, _mm256_setr_epi64x(2, 3, 6, 7)));
  __m256i c0 = _mm256_castps_si256(_mm256_shuffle_ps(a, b, 0x88));
  __m256i c1 = _mm256_castps_si256(_mm256_shuffle_ps(a, b, 0xdd));
  __m256i c2 = _mm256_set1_epi32(static_cast<int>(n));
  __m256i c3 = _mm256_set1_epi32(row);
  __m256i k0 = _mm256_set1_epi32(static_cast<int>(seed));
  __m256i k1 = _mm256_set1_epi32(static_cast<int>(static_cast<uint64_t>(seed) >> 32));
  const __m256i m0 = _mm256_set1_epi32(static_cast<int>(Philox::kMultiplier0));
  const __m256i m1 = _mm256_set1_epi32(static_cast<int>(Philox::kMultiplier1));
  const __m256i step0 = _mm256_set1_epi32(static_cast<int>(Philox::kKeyStep0));
  const __m256i step1 = _mm256_set1_epi32(static_cast<int>(Philox::kKeyStep1));
  for (int round = 0; round < Philox::kRounds; ++round) {
    __m256i high0, low0, high1, low1;
    multiply(c0, m0, high0, low0);
    multiply(c2, m1, high1, low1);
    c0 = _mm256_xor_si256(_mm256_xor_si256(high1, c1), k0);
    c1 = low1;
    c2 = _mm256_xor_si256(_mm256_xor_si256(high0, c3), k1);
    c3 = low0;
    k0 = _mm256_add_epi32(k0, step0);
    k1 = _mm256_add_epi32(k1, step1);
  }
  // From a register for each word to one for each group.
  const __m256i lower01 = _mm256_unpacklo_epi32(c0, c1), upper01 = _mm256_unpackhi_epi32(c0, c1);
  const __m256i lower23 = _mm256_unpacklo_epi32(c2, c3), upper23 = _mm256_unpackhi_epi32(c2, c3);
  const __m256i two[4] = {
      _mm256_unpacklo_epi64(lower01, lower23), _mm256_unpackhi_epi64(lower01, lower23),
      _mm256_unpacklo_epi64(upper01, upper23), _mm256_unpackhi_epi64(upper01, upper23)};
  for (int i = 0; i < 4; ++i) {
    bits[i] = _mm256_castsi256_si128(two[i]);
    bits[i + 4] = _mm256_extracti128_si256(two[i], 1);
  }
}

#elif SWA_FAST_HAS_LANES

inline void philox_groups(int64_t seed, uint64_t group, int64_t n, int row,
                          Lanes<float>::Bits (&bits)[kPhiloxGroups]) {
  uint32_t low[kPhiloxGroups], high[kPhiloxGroups];
  for (int j = 0; j < kPhiloxGroups; ++j) {
    low[j] = static_cast<uint32_t>(group + j);
    high[j] = static_cast<uint32_t>((group + j) >> 32);
  }
  // high and low: the words of the products of four words and one factor.
  const auto multiply = [](uint32x4_t words, uint32_t factor, uint32x4_t& high, uint32x4_t& low) {
    const uint64x2_t first = vmull_n_u32(vget_low_u32(words), factor);
    const uint64x2_t second = vmull_high_n_u32(words, factor);
    low = vuzp1q_u32(vreinterpretq_u32_u64(first), vreinterpretq_u32_u64(second));
    high = vuzp2q_u32(vreinterpretq_u32_u64(first), vreinterpretq_u32_u64(second));
  };
  for (int four = 0; four < kPhiloxGroups; four += 4) {
    uint32x4_t c0 = vld1q_u32(low + four), c1 = vld1q_u32(high + four);
    uint32x4_t c2 = vdupq_n_u32(static_cast<uint32_t>(n));
    uint32x4_t c3 = vdupq_n_u32(static_cast<uint32_t>(row));
    uint32_t k0 = static_cast<uint32_t>(seed);
    uint32_t k1 = static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32);
    for (int round = 0; round < Philox::kRounds; ++round) {
      uint32x4_t high0, low0, high1, low1;
      multiply(c0, Philox::kMultiplier0, high0, low0);
      multiply(c2, Philox::kMultiplier1, high1, low1);
      c0 = veorq_u32(veorq_u32(high1, c1), vdupq_n_u32(k0));
      c1 = low1;
      c2 = veorq_u32(veorq_u32(high0, c3), vdupq_n_u32(k1));
      c3 = low0;
      k0 += Philox::kKeyStep0;
      k1 += Philox::kKeyStep1;
    }
    // From a register for each word to the words of each group, one behind the other.
    uint32_t words[16];
    vst4q_u32(words, {{c0, c1, c2, c3}});
    for (int j = 0; j < 4; ++j) {
      bits[four + j] = vreinterpretq_u16_u32(vld1q_u32(words + 4 * j));
    }
  }
}

#endif

}  // namespace swa_fast
