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

template <Mode kMode, typename Average, typename Source>
void average_portable(void* average_data, const void* source_data, int64_t count,
                      double coefficient) {
  using Math = opmath_t<Average, Source>;
  Average* average = static_cast<Average*>(average_data);
  const Source* source = static_cast<const Source*>(source_data);
  for (int64_t i = 0; i < count; ++i) {
    average[i] = static_cast<Average>(Blend{kMode, coefficient}.apply(
        static_cast<Math>(average[i]), static_cast<Math>(source[i])));
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

// The last elements, fewer than a vector. Through a padded copy, so that an element's result does
// not depend on its place in the segment.
template <Mode kMode, typename Average, typename Source>
SWA_FAST_LANES __attribute__((noinline)) void average_rest(Average* average, const Source* source,
                                                           int64_t count, double coefficient) {
  using Math = opmath_t<Average, Source>;
  using L = Lanes<Math>;
  Average a[L::kCount] = {};
  Source b[L::kCount] = {};
  std::memcpy(a, average, count * sizeof(Average));
  std::memcpy(b, source, count * sizeof(Source));
  average_vector<kMode>(a, b, L::broadcast(static_cast<Math>(coefficient)));
  std::memcpy(average, a, count * sizeof(Average));
}

template <Mode kMode, typename Average, typename Source>
SWA_FAST_LANES void average_lanes(void* average_data, const void* source_data, int64_t count,
                                  double coefficient) {
  using Math = opmath_t<Average, Source>;
  using L = Lanes<Math>;
  Average* average = static_cast<Average*>(average_data);
  const Source* source = static_cast<const Source*>(source_data);
  const auto c = L::broadcast(static_cast<Math>(coefficient));
  int64_t i = 0;
  for (; i + L::kCount <= count; i += L::kCount) average_vector<kMode>(average + i, source + i, c);
  if (i < count) average_rest<kMode>(average + i, source + i, count - i, coefficient);
}

#endif  // SWA_FAST_HAS_LANES

// What updates a run of elements: average, source, their number and the blend's coefficient.
using BlendKernel = void (*)(void*, const void*, int64_t, double);

template <Mode kMode, typename Average, typename Source>
BlendKernel blend_kernel() {
#if SWA_FAST_HAS_LANES
  if (cpu_has_lanes()) return average_lanes<kMode, Average, Source>;
#endif
  return average_portable<kMode, Average, Source>;
}

template <typename Average, typename Source>
BlendKernel blend_kernel(Mode mode) {
  return mode == Mode::kCopy          ? blend_kernel<Mode::kCopy, Average, Source>()
         : mode == Mode::kFromAverage ? blend_kernel<Mode::kFromAverage, Average, Source>()
                                      : blend_kernel<Mode::kFromSource, Average, Source>();
}

}  // namespace swa_fast
