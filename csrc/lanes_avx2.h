// Lanes on x86-64 with AVX2, see lanes.h. The wheel targets baseline x86-64: functions marked
// SWA_FAST_LANES alone use AVX2 and are chosen at run time.
#pragma once

#include <immintrin.h>

#define SWA_FAST_LANES __attribute__((target("avx2,fma,f16c")))

namespace swa_fast {

template <typename Math>
struct Lanes;

template <>
struct Lanes<float> {
  using Register = __m256;
  using Bits = __m128i;  // eight numbers of 16 bits
  static constexpr int kCount = 8;
  static constexpr int kParts = 2;

  SWA_FAST_LANES static inline Register load(const float* p) { return _mm256_loadu_ps(p); }
  SWA_FAST_LANES static inline Register load(const BFloat16* p) {
    const __m256i wide =
        _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
  }
  SWA_FAST_LANES static inline Register load(const Half* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }

  SWA_FAST_LANES static inline void store(float* p, Register v) { _mm256_storeu_ps(p, v); }
  SWA_FAST_LANES static inline void store(BFloat16* p, Register v) {
    const __m256i odd =
        _mm256_and_si256(_mm256_srli_epi32(_mm256_castps_si256(v), 16), _mm256_set1_epi32(1));
    store_rounded(p, v, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  }
  SWA_FAST_LANES static inline void store_with(BFloat16* p, Register v, Bits bits) {
    store_rounded(p, v, _mm256_cvtepu16_epi32(bits));
  }
  // The upper halves of v's bits plus `increment`, at most 0xffff; a NaN stays one.
  SWA_FAST_LANES static inline void store_rounded(BFloat16* p, Register v, __m256i increment) {
    const __m256i rounded = _mm256_add_epi32(_mm256_castps_si256(v), increment);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i high =
        _mm256_blendv_epi8(_mm256_srli_epi32(rounded, 16), _mm256_set1_epi32(0x7fc0), nan);
    // packus works within 128-bit halves; the permutation brings both halves' results together.
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
  }
  SWA_FAST_LANES static inline void load_pair(const BFloat16* p, Register& even, Register& odd) {
    const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    even = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
    odd = _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(-65536)));
  }
  template <bool kStream>
  SWA_FAST_LANES static inline void store_pair(BFloat16* p, Register even, Register odd) {
    const __m256i both =
        _mm256_blend_epi16(_mm256_srli_epi32(rounded(even), 16), rounded(odd), 0xaa);
    if constexpr (kStream) {
      _mm256_stream_si256(reinterpret_cast<__m256i*>(p), both);
    } else {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), both);
    }
  }
  // In the upper halves, to nearest even.
  SWA_FAST_LANES static inline __m256i rounded(Register v) {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i increment = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(_mm256_add_epi32(bits, increment), _mm256_set1_epi32(0x7fc00000),
                              nan);
  }
  SWA_FAST_LANES static inline void store(Half* p, Register v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }

  SWA_FAST_LANES static inline void stream(float* p, Register v) { _mm256_stream_ps(p, v); }
  template <typename Narrow>
  SWA_FAST_LANES static inline void stream(Narrow* p, Register v) {
    alignas(16) Narrow eight[8];
    store(eight, v);
    _mm_stream_si128(reinterpret_cast<__m128i*>(p), *reinterpret_cast<const __m128i*>(eight));
  }

  SWA_FAST_LANES static inline Register broadcast(float x) { return _mm256_set1_ps(x); }
  SWA_FAST_LANES static inline Register add(Register a, Register b) { return _mm256_add_ps(a, b); }
  SWA_FAST_LANES static inline Register sub(Register a, Register b) { return _mm256_sub_ps(a, b); }
  SWA_FAST_LANES static inline Register mul(Register a, Register b) { return _mm256_mul_ps(a, b); }
  SWA_FAST_LANES static inline Register fma(Register a, Register b, Register c) {
    return _mm256_fmadd_ps(a, b, c);
  }
  SWA_FAST_LANES static inline Register blend(Register base, Register c, Register a, Register b) {
    return fma(c, sub(b, a), base);
  }
  // The second operand where either is NaN or both are zero.
  SWA_FAST_LANES static inline Register relu(Register a) {
    return _mm256_max_ps(_mm256_setzero_ps(), a);
  }
  SWA_FAST_LANES static inline __m256d part(Register a, int i) {
    return _mm256_cvtps_pd(i == 0 ? _mm256_castps256_ps128(a) : _mm256_extractf128_ps(a, 1));
  }
};

template <>
struct Lanes<double> {
  using Register = __m256d;
  static constexpr int kCount = 4;
  static constexpr int kParts = 1;

  SWA_FAST_LANES static inline Register load(const double* p) { return _mm256_loadu_pd(p); }
  SWA_FAST_LANES static inline Register load(const float* p) {
    return _mm256_cvtps_pd(_mm_loadu_ps(p));
  }
  SWA_FAST_LANES static inline Register load(const BFloat16* p) {
    const __m128i four = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    return _mm256_cvtps_pd(_mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(four), 16)));
  }
  SWA_FAST_LANES static inline Register load(const Half* p) {
    return _mm256_cvtps_pd(_mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }

  SWA_FAST_LANES static inline void store(double* p, Register v) { _mm256_storeu_pd(p, v); }
  SWA_FAST_LANES static inline void store(float* p, Register v) {
    _mm_storeu_ps(p, _mm256_cvtpd_ps(v));
  }
  template <typename Narrow>
  SWA_FAST_LANES static inline void store(Narrow* p, Register v) {
    static_assert(sizeof(Narrow) == 2);
    Narrow eight[8];
    Lanes<float>::store(eight, _mm256_castps128_ps256(_mm256_cvtpd_ps(v)));
    std::memcpy(p, eight, kCount * sizeof(Narrow));
  }

  SWA_FAST_LANES static inline void stream(double* p, Register v) { _mm256_stream_pd(p, v); }

  SWA_FAST_LANES static inline Register broadcast(double x) { return _mm256_set1_pd(x); }
  SWA_FAST_LANES static inline Register add(Register a, Register b) { return _mm256_add_pd(a, b); }
  SWA_FAST_LANES static inline Register sub(Register a, Register b) { return _mm256_sub_pd(a, b); }
  SWA_FAST_LANES static inline Register mul(Register a, Register b) { return _mm256_mul_pd(a, b); }
  SWA_FAST_LANES static inline Register fma(Register a, Register b, Register c) {
    return _mm256_fmadd_pd(a, b, c);
  }
  SWA_FAST_LANES static inline Register blend(Register base, Register c, Register a, Register b) {
    return fma(c, sub(b, a), base);
  }
  // The second operand where either is NaN or both are zero.
  SWA_FAST_LANES static inline Register relu(Register a) {
    return _mm256_max_pd(_mm256_setzero_pd(), a);
  }
  SWA_FAST_LANES static inline __m256d part(Register a, int) { return a; }
};

// The instruction sets that ATEN_CPU_CAPABILITY, by which torch chooses its own kernels, leaves:
// none, AVX2, or all that there are.
enum class Allowed { kNone, kAvx2, kAll };

inline Allowed allowed_instructions() {
  const char* const name = std::getenv("ATEN_CPU_CAPABILITY");
  if (name == nullptr) return Allowed::kAll;
  return std::strcmp(name, "default") == 0 ? Allowed::kNone
         : std::strcmp(name, "avx2") == 0  ? Allowed::kAvx2
                                           : Allowed::kAll;
}

inline bool cpu_has_lanes() {
  static const bool yes = allowed_instructions() != Allowed::kNone &&
                          __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                          __builtin_cpu_supports("f16c");
  return yes;
}

// Processors with BF16 run 512-bit instructions without slowing down (Zen 4, Sapphire Rapids and
// later); on older ones AVX2 is as good.
inline bool cpu_has_avx512() {
  static const bool yes = allowed_instructions() == Allowed::kAll && cpu_has_lanes() &&
                          __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") &&
                          __builtin_cpu_supports("avx512vl") &&
                          __builtin_cpu_supports("avx512bf16");
  return yes;
}

}  // namespace swa_fast
