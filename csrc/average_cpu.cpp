// CPU kernel of swa_fast::average_.
//
// Formula: average.h. Layout: every pair is two runs of `numel` elements in the same order (the
// Python front hands over dense tensors only). Bytes per element: sizeof(source) + 2
// sizeof(average), 12 for fp32; bound by memory bandwidth from a few million elements on.
//
// All pairs are laid end to end on one axis of elements and torch's thread pool splits that axis,
// so ten thousand tiny tensors and one large one are divided equally well. The result does not
// depend on where the splits fall: tails go through the same vector arithmetic as full vectors.

#include <algorithm>
#include <cstring>

#include "average.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define SWA_FAST_HAS_AVX2_PATH 1
#include <immintrin.h>
// The wheel targets baseline x86-64; these functions alone use AVX2 and are chosen at run time.
#define SWA_FAST_AVX2 __attribute__((target("avx2,fma,f16c")))
#else
#define SWA_FAST_HAS_AVX2_PATH 0
#endif

namespace swa_fast {
namespace {

// Below this many elements a second thread costs more than it saves.
constexpr int64_t kGrainElements = 16384;

// lerp in the form whose error is smallest on each side of w = 1/2 (torch.lerp does the same):
//   w <  1/2:  a + w (b - a)             w >= 1/2:  b - (1 - w) (b - a)
// written as  base + c (b - a).
enum class Mode { kCopy, kFromAverage, kFromSource };

struct Blend {
  Mode mode;
  double coefficient;  // c above, already rounded to the pair's arithmetic type
};

template <typename Math>
Blend make_blend(const Rule& rule, int64_t n) {
  if (n == 0) return {Mode::kCopy, 0.0};
  const Math w = rule.weight<Math>(n);
  if (w < Math(0.5)) return {Mode::kFromAverage, w};
  return {Mode::kFromSource, -(Math(1) - w)};
}

template <typename Average, typename Source>
void average_portable(Average* average, const Source* source, int64_t count, Blend blend) {
  using Math = opmath_t<Average, Source>;
  const Math c = static_cast<Math>(blend.coefficient);
  switch (blend.mode) {
    case Mode::kCopy:
      for (int64_t i = 0; i < count; ++i)
        average[i] = static_cast<Average>(static_cast<Math>(source[i]));
      break;
    case Mode::kFromAverage:
      for (int64_t i = 0; i < count; ++i) {
        const Math a = static_cast<Math>(average[i]), b = static_cast<Math>(source[i]);
        average[i] = static_cast<Average>(a + c * (b - a));
      }
      break;
    case Mode::kFromSource:
      for (int64_t i = 0; i < count; ++i) {
        const Math a = static_cast<Math>(average[i]), b = static_cast<Math>(source[i]);
        average[i] = static_cast<Average>(b + c * (b - a));
      }
      break;
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
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded =
        _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
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
  template <typename Narrow>
  SWA_FAST_AVX2 static inline Register load(const Narrow* p) {
    static_assert(sizeof(Narrow) == 2);
    Narrow eight[8] = {};
    std::memcpy(eight, p, kCount * sizeof(Narrow));
    return _mm256_cvtps_pd(_mm256_castps256_ps128(Lanes<float>::load(eight)));
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
    // Through a padded copy, so that an element's result does not depend on its place in the run.
    Average a[L::kCount] = {};
    Source b[L::kCount] = {};
    std::memcpy(a, average + i, (count - i) * sizeof(Average));
    std::memcpy(b, source + i, (count - i) * sizeof(Source));
    average_vector<kMode>(a, b, c);
    std::memcpy(average + i, a, (count - i) * sizeof(Average));
  }
}

bool cpu_has_avx2() {
  static const bool yes = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                          __builtin_cpu_supports("f16c");
  return yes;
}

#endif  // SWA_FAST_HAS_AVX2_PATH

template <typename Average, typename Source>
void average_run(void* average_base, const void* source_base, int64_t begin, int64_t end,
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

struct Segment {
  void* average;
  const void* source;
  int64_t begin;  // first element on the common axis
  void (*run)(void*, const void*, int64_t, int64_t, Blend);
  Blend blend;
};

void average_cpu(std::vector<Tensor> averages, std::vector<Tensor> sources, Tensor n_averaged,
                 std::optional<double> decay) {
  check_average_arguments(averages, sources, n_averaged);
  STD_TORCH_CHECK(n_averaged.is_cpu(), "average_.cpu: n_averaged must be on the CPU");
  const int64_t n = *static_cast<const int64_t*>(n_averaged.const_data_ptr());
  const Rule rule(decay);

  std::vector<Segment> segments;
  segments.reserve(averages.size());
  int64_t total = 0;
  for (size_t i = 0; i < averages.size(); ++i) {
    STD_TORCH_CHECK(averages[i].is_cpu() && sources[i].is_cpu(), "average_.cpu: pair ", i,
                    " is not on the CPU");
    const int64_t count = averages[i].numel();
    if (count == 0) continue;
    Segment segment{
        averages[i].mutable_data_ptr(), sources[i].const_data_ptr(), total, nullptr, {}};
    dispatch_floating(averages[i].scalar_type(), [&](auto average) {
      dispatch_floating(sources[i].scalar_type(), [&](auto source) {
        using Average = decltype(average);
        using Source = decltype(source);
        segment.run = average_run<Average, Source>;
        segment.blend = make_blend<opmath_t<Average, Source>>(rule, n);
      });
    });
    segments.push_back(segment);
    total += count;
  }
  if (total == 0) return;

  torch::stable::parallel_for(0, total, kGrainElements, [&](int64_t begin, int64_t end) {
    auto segment = std::upper_bound(segments.begin(), segments.end(), begin,
                                    [](int64_t at, const Segment& s) { return at < s.begin; }) -
                   1;
    for (; begin < end; ++segment) {
      const int64_t stop =
          std::min(end, segment + 1 == segments.end() ? total : (segment + 1)->begin);
      segment->run(segment->average, segment->source, begin - segment->begin, stop - segment->begin,
                   segment->blend);
      begin = stop;
    }
  });
}

}  // namespace
}  // namespace swa_fast

STABLE_TORCH_LIBRARY_IMPL(swa_fast, CPU, m) {
  m.impl("average_.cpu", TORCH_BOX(&swa_fast::average_cpu));
}
