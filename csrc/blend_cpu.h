// The CPU side of one segment: average <- blend(average, source) over `count` elements.
//
// Bytes per element: sizeof(source) + 2 sizeof(average), 12 for fp32. The result does not depend on
// where a segment is cut: tails go through the same vector arithmetic as full vectors.
#pragma once

#include <cmath>
#include <cstring>

#include "lanes.h"
#include "update.h"

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

#if SWA_FAST_HAS_LANES

template <Mode kMode, typename Average, typename Source>
SWA_FAST_LANES inline void average_vector(Average* average, const Source* source,
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
SWA_FAST_LANES void average_lanes(Average* average, const Source* source, int64_t count,
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

#endif  // SWA_FAST_HAS_LANES

template <typename Average, typename Source>
void average_range(void* average_base, const void* source_base, int64_t begin, int64_t end,
                   Blend blend) {
  Average* average = static_cast<Average*>(average_base) + begin;
  const Source* source = static_cast<const Source*>(source_base) + begin;
#if SWA_FAST_HAS_LANES
  if (cpu_has_lanes()) {
    switch (blend.mode) {
      case Mode::kCopy:
        return average_lanes<Mode::kCopy>(average, source, end - begin, 0.0);
      case Mode::kFromAverage:
        return average_lanes<Mode::kFromAverage>(average, source, end - begin, blend.coefficient);
      case Mode::kFromSource:
        return average_lanes<Mode::kFromSource>(average, source, end - begin, blend.coefficient);
    }
  }
#endif
  average_portable(average, source, end - begin, blend);
}

}  // namespace swa_fast
