// The CPU side of one segment: average <- blend(average, source) over `count` elements.
//
// Bytes per element: sizeof(source) + 2 sizeof(average), 12 for fp32. The result does not depend on
// where a segment is cut: tails go through the same vector arithmetic as full vectors.
#pragma once

#include <cmath>
#include <cstring>

#include "update.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define SWA_FAST_HAS_AVX2_PATH 1
#include <immintrin.h>
// The wheel targets baseline x86-64; these functions alone use AVX2 and are chosen at run time.
#define SWA_FAST_AVX2 __attribute__((target("avx2,fma,f16c")))
#else
#define SWA_FAST_HAS_AVX2_PATH 0
#endif

namespace swa_fast {

// lerp in the form whose error is smallest on each side of w = 1/2 (torch.lerp does the same):
//   w <  1/2:  a + w (b - a)             w >= 1/2:  b - (1 - w) (b - a)
// written as  base + c (b - a).
enum class Mode { kCopy, kFromAverage, kFromSource };

struct Blend {
  Mode mode;
  double coefficient;  // c above, already rounded to the pair's arithmetic type

  // Fused like the vector code's, so that both round alike.
  template <typename Math>
  Math apply(Math a, Math b) const {
    if (mode == Mode::kCopy) return b;
    return std::fma(static_cast<Math>(coefficient), b - a, mode == Mode::kFromAverage ? a : b);
  }
};

template <typename Math>
Blend make_blend(Math w, bool copy) {
  if (copy) return {Mode::kCopy, 0.0};
  if (w < Math(0.5)) return {Mode::kFromAverage, w};
  return {Mode::kFromSource, -(Math(1) - w)};
}

template <typename Average, typename Source>
void average_portable(Average* average, const Source* source, int64_t count, Blend blend) {
  using Math = opmath_t<Average, Source>;
  for (int64_t i = 0; i < count; ++i) {
    average[i] = static_cast<Average>(
        blend.apply(static_cast<Math>(average[i]), static_cast<Math>(source[i])));
  }
}

#if SWA_FAST_HAS_AVX2_PATH

// Lanes<Math>: a 32-byte register of the arithmetic type with loads and stores for all four
// storage types. Narrow types are widened exactly and rounded to nearest even.
template <typename Math>
struct Lanes;

template <>
struct Lanes<float> {
  using Register = __m256;
  static constexpr int kCount = 8;

  SWA_FAST_AVX2 static inline Register load(const float* p) { return _mm256_loadu_ps(p); }
  SWA_FAST_AVX2 static inline Register load(const BFloat16* p) {
    const __m256i wide =
        _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
  }
  SWA_FAST_AVX2 static inline Register load(const Half* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }

  SWA_FAST_AVX2 static inline void store(float* p, Register v) { _mm256_storeu_ps(p, v); }
  SWA_FAST_AVX2 static inline void store(BFloat16* p, Register v) {
    const __m256i odd =
        _mm256_and_si256(_mm256_srli_epi32(_mm256_castps_si256(v), 16), _mm256_set1_epi32(1));
    store_rounded(p, v, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  }
  // The upper halves of v's bits plus `increment`, at most 0xffff; a NaN stays one.
  SWA_FAST_AVX2 static inline void store_rounded(BFloat16* p, Register v, __m256i increment) {
    const __m256i rounded = _mm256_add_epi32(_mm256_castps_si256(v), increment);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i high =
        _mm256_blendv_epi8(_mm256_srli_epi32(rounded, 16), _mm256_set1_epi32(0x7fc0), nan);
    // packus works within 128-bit halves; the permutation brings both halves' results together.
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
  }
  SWA_FAST_AVX2 static inline void store(Half* p, Register v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }

  SWA_FAST_AVX2 static inline Register blend(Register base, Register c, Register a, Register b) {
    return _mm256_fmadd_ps(c, _mm256_sub_ps(b, a), base);
  }
  SWA_FAST_AVX2 static inline Register broadcast(float x) { return _mm256_set1_ps(x); }
};

template <>
struct Lanes<double> {
  using Register = __m256d;
  static constexpr int kCount = 4;

  SWA_FAST_AVX2 static inline Register load(const double* p) { return _mm256_loadu_pd(p); }
  SWA_FAST_AVX2 static inline Register load(const float* p) {
    return _mm256_cvtps_pd(_mm_loadu_ps(p));
  }
  SWA_FAST_AVX2 static inline Register load(const BFloat16* p) {
    const __m128i four = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    return _mm256_cvtps_pd(_mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(four), 16)));
  }
  SWA_FAST_AVX2 static inline Register load(const Half* p) {
    return _mm256_cvtps_pd(_mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }

  SWA_FAST_AVX2 static inline void store(double* p, Register v) { _mm256_storeu_pd(p, v); }
  SWA_FAST_AVX2 static inline void store(float* p, Register v) {
    _mm_storeu_ps(p, _mm256_cvtpd_ps(v));
  }
  template <typename Narrow>
  SWA_FAST_AVX2 static inline void store(Narrow* p, Register v) {
    static_assert(sizeof(Narrow) == 2);
    Narrow eight[8];
    Lanes<float>::store(eight, _mm256_castps128_ps256(_mm256_cvtpd_ps(v)));
    std::memcpy(p, eight, kCount * sizeof(Narrow));
  }

  SWA_FAST_AVX2 static inline Register blend(Register base, Register c, Register a, Register b) {
    return _mm256_fmadd_pd(c, _mm256_sub_pd(b, a), base);
  }
  SWA_FAST_AVX2 static inline Register broadcast(double x) { return _mm256_set1_pd(x); }
};

template <Mode kMode, typename Average, typename Source>
SWA_FAST_AVX2 inline void average_vector(Average* average, const Source* source,
                                         typename Lanes<opmath_t<Average, Source>>::Register c) {
  using L = Lanes<opmath_t<Average, Source>>;
  const auto b = L::load(source);
  if constexpr (kMode == Mode::kCopy) {
    L::store(average, b);
  } else {
    const auto a = L::load(average);
    L::store(average, L::blend(kMode == Mode::kFromAverage ? a : b, c, a, b));
  }
}

template <Mode kMode, typename Average, typename Source>
SWA_FAST_AVX2 void average_avx2(Average* average, const Source* source, int64_t count,
                                double coefficient) {
  using Math = opmath_t<Average, Source>;
  using L = Lanes<Math>;
  const auto c = L::broadcast(static_cast<Math>(coefficient));
  int64_t i = 0;
  for (; i + L::kCount <= count; i += L::kCount) average_vector<kMode>(average + i, source + i, c);
  if (i < count) {
    // Through a padded copy, so that an element's result does not depend on its place in the
    // segment.
    Average a[L::kCount] = {};
    Source b[L::kCount] = {};
    std::memcpy(a, average + i, (count - i) * sizeof(Average));
    std::memcpy(b, source + i, (count - i) * sizeof(Source));
    average_vector<kMode>(a, b, c);
    std::memcpy(average + i, a, (count - i) * sizeof(Average));
  }
}

inline bool cpu_has_avx2() {
  static const bool yes = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                          __builtin_cpu_supports("f16c");
  return yes;
}

#endif  // SWA_FAST_HAS_AVX2_PATH

template <typename Average, typename Source>
void average_range(void* average_base, const void* source_base, int64_t begin, int64_t end,
                   Blend blend) {
  Average* average = static_cast<Average*>(average_base) + begin;
  const Source* source = static_cast<const Source*>(source_base) + begin;
#if SWA_FAST_HAS_AVX2_PATH
  if (cpu_has_avx2()) {
    switch (blend.mode) {
      case Mode::kCopy:
        return average_avx2<Mode::kCopy>(average, source, end - begin, 0.0);
      case Mode::kFromAverage:
        return average_avx2<Mode::kFromAverage>(average, source, end - begin, blend.coefficient);
      case Mode::kFromSource:
        return average_avx2<Mode::kFromSource>(average, source, end - begin, blend.coefficient);
    }
  }
#endif
  average_portable(average, source, end - begin, blend);
}

}  // namespace swa_fast
