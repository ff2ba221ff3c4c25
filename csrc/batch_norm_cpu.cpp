// CPU kernels of swa_fast::batch_norm_collect and swa_fast::batch_norm_merge_.
//
// Formula: batch_norm.h. Layout: [n, c, s], or [n * s, c] with channels-last. Bytes per element:
// 3 sizeof(x), 12 for fp32: a read for the statistics, a read and a write for the output; the
// second read comes from the second-level cache where a channel (contiguous) fits it.
//
// What is summed together depends on the shape and the instruction set alone, so results do not
// depend on the number of threads: contiguous input is cut into blocks of a channel, channels-last
// input into blocks of rows, and the blocks' sums are added in order.

#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 warns of its own AVX-512 intrinsics (its bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#include <algorithm>
#include <new>
#include <numeric>
#include <vector>

#include "batch_norm.h"
#include "blend_cpu.h"
#include "caches.h"

#if SWA_FAST_HAS_AVX512_PATH
// As SWA_FAST_LANES, see lanes_avx2.h: chosen at run time.
#define SWA_FAST_AVX512 \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")))
#endif
#if defined(__clang__)
#define SWA_FAST_UNROLL _Pragma("unroll")
#elif defined(__GNUC__)
#define SWA_FAST_UNROLL _Pragma("GCC unroll 8")
#else
#define SWA_FAST_UNROLL
#endif
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace swa_fast {
namespace {

constexpr int64_t kGrain = 32768;          // elements below which a second thread does not pay
constexpr int64_t kBlockValues = 131072;   // of one channel: 512 KB of fp32, the second-level cache
constexpr int64_t kBlockElements = 65536;  // of a block of rows, about
constexpr int64_t kColumns = 128;          // that a row is made to have at least
constexpr int64_t kTileColumns = 1024;     // of a sample's part of a tile of short runs, about
constexpr int64_t kShortRun = 512;         // values
constexpr int64_t kManySamples = 8;        // from which on a column's sum pays
constexpr int64_t kChannelGrain = 256;     // channels below which a second thread does not pay
constexpr int64_t kTileBytes = 4096;       // neighbouring channels are read in runs of a page
constexpr int64_t kMaxTile = 16;

// Bytes that are fetched before their turn: of the input for a channel's sums, and of input or
// output for the output of rows.
constexpr int64_t kAhead = 1024, kOutputAhead = 8192;

template <typename T>
inline void prefetch(const T* p, int64_t bytes_ahead) {
#ifdef __GNUC__
  // The address may lie behind the tensor: a prefetch does not fault.
  __builtin_prefetch(reinterpret_cast<const char*>(p) + bytes_ahead);
#endif
}

// Columns whose three coefficients take half of the first-level cache: a power of two, so that
// pieces of so many are whole blocks.
template <typename Math>
int64_t coefficients_cached() {
  int64_t columns = 256;
  while (2 * columns * 3 * static_cast<int64_t>(sizeof(Math)) <= first_level_cache() / 2) {
    columns *= 2;
  }
  return columns;
}

// What one call works on.
template <typename T>
struct Input {
  const T* x;
  Activations shape;

  double pivot(int64_t channel) const { return channel_pivot(x, shape, channel); }
};

template <typename Math>
Math clamp(Math y, bool relu) {
  return relu && y < Math(0) ? Math(0) : y;  // NaN stays
}

// Vec<Math>: a register of the arithmetic type, for each instruction set, with the functions of
// Lanes, see lanes.h. Sums of kPanel registers, with their pivots, stay in registers. Where
// kPair<T>, load_pair and store_pair take two registers' worth of T, the even values in one and the
// odd ones in the other.

namespace portable {
#define SWA_FAST_TARGET

template <typename Math>
struct Vec {
  using Register = Math;
  using Scalar = Math;
  static constexpr int kCount = 1;
  static constexpr int kParts = 1;
  static constexpr int kPanel = 4;
  template <typename T>
  static constexpr bool kPair = false;

  template <typename T>
  static inline Register load(const T* p) {
    return static_cast<Math>(*p);
  }
  template <typename T>
  static inline void store(T* p, Register v) {
    *p = static_cast<T>(v);
  }
  template <typename T>
  static inline void stream(T* p, Register v) {
    store(p, v);
  }
  static inline Register broadcast(Math x) { return x; }
  static inline Register add(Register a, Register b) { return a + b; }
  static inline Register sub(Register a, Register b) { return a - b; }
  static inline Register mul(Register a, Register b) { return a * b; }
  static inline Register fma(Register a, Register b, Register c) { return a * b + c; }
  static inline Register relu(Register a) { return clamp(a, true); }
  static inline double part(Register a, int) { return a; }
};

#include "batch_norm_simd.h"
#undef SWA_FAST_TARGET
}  // namespace portable

#if SWA_FAST_HAS_LANES

namespace lanes {
#define SWA_FAST_TARGET SWA_FAST_LANES

template <typename Math>
struct Vec : Lanes<Math> {
  using Scalar = Math;
  static constexpr int kPanel = 4;
  template <typename T>
  static constexpr bool kPair = std::is_same_v<T, BFloat16>;
};

#include "batch_norm_simd.h"
#undef SWA_FAST_TARGET
}  // namespace lanes

#endif  // SWA_FAST_HAS_LANES

#if SWA_FAST_HAS_AVX512_PATH

namespace avx512 {
#define SWA_FAST_TARGET SWA_FAST_AVX512

template <typename Math>
struct Vec;

template <>
struct Vec<double> {
  using Register = __m512d;
  using Scalar = double;
  static constexpr int kCount = 8;
  static constexpr int kParts = 1;
  static constexpr int kPanel = 8;
  template <typename T>
  static constexpr bool kPair = false;

  SWA_FAST_AVX512 static inline Register load(const double* p) { return _mm512_loadu_pd(p); }
  SWA_FAST_AVX512 static inline void store(double* p, Register v) { _mm512_storeu_pd(p, v); }
  SWA_FAST_AVX512 static inline void stream(double* p, Register v) { _mm512_stream_pd(p, v); }
  SWA_FAST_AVX512 static inline Register broadcast(double x) { return _mm512_set1_pd(x); }
  SWA_FAST_AVX512 static inline Register add(Register a, Register b) { return _mm512_add_pd(a, b); }
  SWA_FAST_AVX512 static inline Register sub(Register a, Register b) { return _mm512_sub_pd(a, b); }
  SWA_FAST_AVX512 static inline Register mul(Register a, Register b) { return _mm512_mul_pd(a, b); }
  SWA_FAST_AVX512 static inline Register fma(Register a, Register b, Register c) {
    return _mm512_fmadd_pd(a, b, c);
  }
  SWA_FAST_AVX512 static inline Register relu(Register a) {
    return _mm512_max_pd(_mm512_setzero_pd(), a);
  }
  SWA_FAST_AVX512 static inline __m512d part(Register a, int) { return a; }
};

template <>
struct Vec<float> {
  using Register = __m512;
  using Scalar = float;
  static constexpr int kCount = 16;
  static constexpr int kParts = 2;
  static constexpr int kPanel = 8;
  template <typename T>
  static constexpr bool kPair = std::is_same_v<T, BFloat16>;

  SWA_FAST_AVX512 static inline Register load(const float* p) { return _mm512_loadu_ps(p); }
  SWA_FAST_AVX512 static inline Register load(const BFloat16* p) {
    const __m512i wide =
        _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
  }
  SWA_FAST_AVX512 static inline Register load(const Half* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  SWA_FAST_AVX512 static inline void store(float* p, Register v) { _mm512_storeu_ps(p, v); }
  SWA_FAST_AVX512 static inline void store(BFloat16* p, Register v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(p, v));
  }
  SWA_FAST_AVX512 static inline void store(Half* p, Register v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(p, v));
  }
  SWA_FAST_AVX512 static inline void stream(float* p, Register v) { _mm512_stream_ps(p, v); }
  template <typename Narrow>
  SWA_FAST_AVX512 static inline void stream(Narrow* p, Register v) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), narrow(p, v));
  }
  // The instruction takes subnormal numbers, below 2^-126, for zero.
  SWA_FAST_AVX512 static inline __m256i narrow(const BFloat16*, Register v) {
    return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v));
  }
  SWA_FAST_AVX512 static inline void load_pair(const BFloat16* p, Register& even, Register& odd) {
    const __m512i both = _mm512_loadu_si512(p);
    even = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
    odd = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(-65536)));
  }
  template <bool kStream>
  SWA_FAST_AVX512 static inline void store_pair(BFloat16* p, Register even, Register odd) {
    alignas(64) static constexpr uint16_t kInterleave[32] = {
        0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
        8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i halves = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(odd, even));
    const __m512i both = _mm512_permutexvar_epi16(_mm512_load_si512(kInterleave), halves);
    if constexpr (kStream) {
      _mm512_stream_si512(reinterpret_cast<__m512i*>(p), both);
    } else {
      _mm512_storeu_si512(p, both);
    }
  }
  SWA_FAST_AVX512 static inline __m256i narrow(const Half*, Register v) {
    return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  SWA_FAST_AVX512 static inline Register broadcast(float x) { return _mm512_set1_ps(x); }
  SWA_FAST_AVX512 static inline Register add(Register a, Register b) { return _mm512_add_ps(a, b); }
  SWA_FAST_AVX512 static inline Register sub(Register a, Register b) { return _mm512_sub_ps(a, b); }
  SWA_FAST_AVX512 static inline Register mul(Register a, Register b) { return _mm512_mul_ps(a, b); }
  SWA_FAST_AVX512 static inline Register fma(Register a, Register b, Register c) {
    return _mm512_fmadd_ps(a, b, c);
  }
  SWA_FAST_AVX512 static inline Register relu(Register a) {
    return _mm512_max_ps(_mm512_setzero_ps(), a);
  }
  SWA_FAST_AVX512 static inline __m512d part(Register a, int i) {
    return _mm512_cvtps_pd(i == 0 ? _mm512_castps512_ps256(a) : _mm512_extractf32x8_ps(a, 1));
  }
};

#include "batch_norm_simd.h"
#undef SWA_FAST_TARGET
}  // namespace avx512

#endif  // SWA_FAST_HAS_AVX512_PATH

// Calls the version of a function template for this processor.
#if SWA_FAST_HAS_AVX512_PATH
#define SWA_FAST_CALL(function, ...)                 \
  (cpu_has_avx512()  ? avx512::function(__VA_ARGS__) \
   : cpu_has_lanes() ? lanes::function(__VA_ARGS__)  \
                     : portable::function(__VA_ARGS__))
#elif SWA_FAST_HAS_LANES
#define SWA_FAST_CALL(function, ...) lanes::function(__VA_ARGS__)
#else
#define SWA_FAST_CALL(function, ...) portable::function(__VA_ARGS__)
#endif

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Begins with a line of the caches. A vector of 64 bytes that does not is two loads, and a column
// has three vectors of coefficients for one of values: where malloc's address was not a multiple,
// the output of a layer took a third longer.
template <typename Number>
struct LineAllocator {
  using value_type = Number;
  static constexpr std::align_val_t kLine{64};

  LineAllocator() = default;
  template <typename Other>
  LineAllocator(const LineAllocator<Other>&) {}

  Number* allocate(size_t count) {
    return static_cast<Number*>(::operator new(count * sizeof(Number), kLine));
  }
  void deallocate(Number* p, size_t) { ::operator delete(p, kLine); }
  template <typename Other>
  bool operator==(const LineAllocator<Other>&) const {
    return true;
  }
  template <typename Other>
  bool operator!=(const LineAllocator<Other>&) const {
    return false;
  }
};

template <typename Number>
using Lines = std::vector<Number, LineAllocator<Number>>;

// The layer, given everything but the input and the output.
struct Layer {
  AffineVector weight, bias;
  double eps;
  bool relu, stream;
  BatchColumns batch;

  template <typename Math>
  Coefficients<Math> finish(int64_t channel, const Activations& shape, const Sums& sums,
                            double pivot) const {
    const double m = static_cast<double>(shape.values());
    const Moments statistics = moments(sums, pivot, m);
    batch.store(channel, shape, statistics);
    return coefficients<Math>(statistics, m, eps, weight.at(channel, 1.0), bias.at(channel, 0.0));
  }
};

// Where column i of `columns` is among pivots, sums and coefficients: in every whole block of
// `interleaved` columns, a power of two, the even ones come first.
inline int64_t place(int64_t i, int64_t columns, int64_t interleaved) {
  const int64_t mask = interleaved - 1;
  if (mask == 0 || i >= (columns & ~mask)) return i;
  const int64_t within = i & mask;
  return i - within + (within & 1) * (interleaved / 2) + within / 2;
}

// Bytes that sum_columns fetches before their turn from rows `stride` elements apart, of which
// `columns` are read: the rows that it takes up next, since the hardware looks no further than to
// the end of a page. From long rows only what comes next in each: so many of them at once lie in
// the same few places of the first-level cache. A part of every row, in a cache, is not fetched.
template <typename T>
int64_t rows_ahead(const Layer& layer, int64_t columns, int64_t stride) {
  constexpr int64_t kLongRow = 4096, kInLongRow = 512, kAtLeast = 8192;
  const int64_t row = stride * static_cast<int64_t>(sizeof(T));
  if (columns < stride) return layer.stream ? kPivot * row : 0;
  return row >= kLongRow ? kInLongRow : std::max(kPivot * row, kAtLeast);
}

// Contiguous, with many short runs: tiles of channels, each small enough for the second-level
// cache. A sample's part of a tile is one piece of memory, so tiles are what rows are in
// collect_rows, and a run's length does not matter.
template <typename T>
void collect_short_runs(const Input<T>& input, const Layer& layer, T* y) {
  using Math = statistics_t<T>;
  const Activations& shape = input.shape;
  // With whole blocks in a channel their order does not matter.
  const bool paired = shape.s % SWA_FAST_CALL(interleaved<T>) == 0;
  // Whole vectors, if possible.
  int64_t tile = std::max<int64_t>(1, kTileColumns / shape.s);
  if (tile > 4) tile -= tile % (tile > 16 ? 16 : 4);
  const int64_t stride = shape.c * shape.s;
  const int64_t ahead = rows_ahead<T>(layer, tile * shape.s, stride);
  const int64_t grain = std::max<int64_t>(1, kGrain / (tile * shape.values()));
  torch::stable::parallel_for(0, ceil_div(shape.c, tile), grain, [&](int64_t from, int64_t to) {
    Lines<double> pivots(tile * shape.s), sums(2 * tile * shape.s);
    Lines<Math> c(3 * tile * shape.s);
    for (int64_t t = from; t < to; ++t) {
      const int64_t channel = t * tile, channels = std::min(tile, shape.c - channel);
      const int64_t columns = channels * shape.s;
      const T* const x = input.x + channel * shape.s;
      for (int64_t i = 0; i < channels; ++i) {
        std::fill_n(pivots.data() + i * shape.s, shape.s, input.pivot(channel + i));
      }
      SWA_FAST_CALL(sum_columns, x, shape.n, columns, stride, ahead, paired, pivots.data(),
                    sums.data());
      for (int64_t i = 0; i < channels; ++i) {
        const double* const first = sums.data() + i * shape.s;
        const Sums total{SWA_FAST_CALL(sum_of, first, shape.s),
                         SWA_FAST_CALL(sum_of, first + columns, shape.s)};
        const auto one = layer.finish<Math>(channel + i, shape, total, pivots[i * shape.s]);
        std::fill_n(c.data() + i * shape.s, shape.s, one.centre);
        std::fill_n(c.data() + columns + i * shape.s, shape.s, one.scale);
        std::fill_n(c.data() + 2 * columns + i * shape.s, shape.s, one.offset);
      }
      if (y != nullptr) {
        // The tile is in a cache.
        SWA_FAST_CALL(normalise_columns, x, y + channel * shape.s, shape.n, columns, stride, 0,
                      paired, c.data(), layer.relu, layer.stream);
      }
    }
    if (layer.stream) end_of_stream();
  });
}

// Contiguous: tiles of channels times blocks of samples, or of parts of a sample. `y` may be null.
template <typename T>
void collect_contiguous(const Input<T>& input, const Layer& layer, T* y) {
  using Math = statistics_t<T>;
  const Activations& shape = input.shape;
  const int64_t run_bytes = shape.s * static_cast<int64_t>(sizeof(T));
  const int64_t tile = std::clamp<int64_t>(kTileBytes / run_bytes, 1, kMaxTile);
  const int64_t tiles = ceil_div(shape.c, tile);
  const int64_t parts = ceil_div(shape.s, kBlockValues);  // of a sample's run
  const int64_t samples = std::max<int64_t>(1, kBlockValues / shape.s);
  const int64_t blocks = ceil_div(shape.n, samples) * parts;
  if (blocks == 1 && shape.s <= kShortRun && shape.n >= kManySamples) {
    return collect_short_runs(input, layer, y);
  }

  // Calls f(first sample, samples, first value of the run, values) for block `b`.
  const auto with_block = [&](int64_t b, const auto& f) {
    const int64_t n = b / parts * samples, begin = b % parts * kBlockValues;
    f(n, std::min(samples, shape.n - n), begin, std::min(kBlockValues, shape.s - begin));
  };
  const auto sum = [&](int64_t t, int64_t b, Sums* sums) {
    const int64_t channel = t * tile, channels = std::min(tile, shape.c - channel);
    with_block(b, [&](int64_t n, int64_t count, int64_t begin, int64_t length) {
      SWA_FAST_CALL(sum_tile, input, channel, channels, n, count, begin, length, sums);
    });
  };
  const auto normalise = [&](int64_t t, int64_t b, const Coefficients<Math>* c) {
    const int64_t channel = t * tile, channels = std::min(tile, shape.c - channel);
    with_block(b, [&](int64_t n, int64_t count, int64_t begin, int64_t length) {
      for (int64_t sample = n; sample < n + count; ++sample) {
        for (int64_t i = 0; i < channels; ++i) {
          const int64_t at = (sample * shape.c + channel + i) * shape.s + begin;
          SWA_FAST_CALL(normalise_run, input.x + at, y + at, length, c[i], layer.relu,
                        layer.stream);
        }
      }
    });
  };

  const int64_t grain = std::max<int64_t>(
      1, kGrain / (tile * std::min(shape.values(), samples * std::min(shape.s, kBlockValues))));
  if (blocks == 1) {
    torch::stable::parallel_for(0, tiles, grain, [&](int64_t from, int64_t to) {
      for (int64_t t = from; t < to; ++t) {
        Sums sums[kMaxTile];
        Coefficients<Math> c[kMaxTile];
        sum(t, 0, sums);
        for (int64_t i = 0; i < std::min(tile, shape.c - t * tile); ++i) {
          const int64_t channel = t * tile + i;
          c[i] = layer.finish<Math>(channel, shape, sums[i], input.pivot(channel));
        }
        if (y != nullptr) normalise(t, 0, c);
      }
      if (layer.stream) end_of_stream();
    });
    return;
  }
  std::vector<Sums> sums(blocks * tiles * tile);
  torch::stable::parallel_for(0, blocks * tiles, grain, [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) sum(i % tiles, i / tiles, sums.data() + i * tile);
  });
  std::vector<Coefficients<Math>> c(shape.c);
  for (int64_t channel = 0; channel < shape.c; ++channel) {
    Sums total{0.0, 0.0};
    for (int64_t b = 0; b < blocks; ++b) total.add(sums[b * tiles * tile + channel]);
    c[channel] = layer.finish<Math>(channel, shape, total, input.pivot(channel));
  }
  if (y == nullptr) return;
  torch::stable::parallel_for(0, blocks * tiles, grain, [&](int64_t from, int64_t to) {
    // Backwards: what was read last may still be in a cache.
    for (int64_t i = to - 1; i >= from; --i) {
      normalise(i % tiles, i / tiles, c.data() + i % tiles * tile);
    }
    if (layer.stream) end_of_stream();
  });
}

// Channels-last: blocks of rows. `y` may be null.
//
// Where a row is short, several make one, so that a column is one of their channels; what is left
// over is summed in fp64 value by value.
template <typename T>
void collect_rows(const Input<T>& input, const Layer& layer, T* y) {
  using Math = statistics_t<T>;
  const Activations& shape = input.shape;
  const int64_t channels = shape.c;
  const int64_t fold = channels < kColumns ? kColumns / std::gcd(channels, kColumns) : 1;
  const int64_t columns = fold * channels, rows = shape.values() / fold;
  const T* const rest = input.x + rows * columns;
  const int64_t rest_values = shape.values() * channels - rows * columns;
  const int64_t order = SWA_FAST_CALL(interleaved<T>);
  // Whole groups, and enough of them that a block's sums are small beside its input.
  const int64_t block =
      std::max<int64_t>(kGroup, ceil_div(kBlockElements / columns, kGroup) * kGroup);
  const int64_t blocks = ceil_div(rows, block);
  const int64_t grain = std::max<int64_t>(1, kGrain / (block * columns));
  const int64_t ahead = rows_ahead<T>(layer, columns, columns);
  const auto rows_of = [&](int64_t b) { return std::min(block, rows - b * block); };

  Lines<double> pivots(columns);
  for (int64_t i = 0; i < columns; ++i) {
    pivots[place(i, columns, order)] = input.pivot(i % channels);
  }
  Lines<double> sums(std::max<int64_t>(blocks, 1) * 2 * columns);
  torch::stable::parallel_for(0, blocks, grain, [&](int64_t from, int64_t to) {
    for (int64_t b = from; b < to; ++b) {
      SWA_FAST_CALL(sum_columns, input.x + b * block * columns, rows_of(b), columns, columns, ahead,
                    true, pivots.data(), sums.data() + b * 2 * columns);
    }
  });
  const int64_t sum_grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, blocks));
  torch::stable::parallel_for(0, 2 * columns, sum_grain, [&](int64_t from, int64_t to) {
    for (int64_t b = 1; b < blocks; ++b) {
      for (int64_t i = from; i < to; ++i) sums[i] += sums[b * 2 * columns + i];
    }
  });
  Lines<Math> c(3 * columns);
  torch::stable::parallel_for(0, channels, kChannelGrain, [&](int64_t from, int64_t to) {
    for (int64_t channel = from; channel < to; ++channel) {
      Sums total{0.0, 0.0};
      for (int64_t i = channel; i < columns; i += channels) {
        const double* const column = sums.data() + place(i, columns, order);
        total.add(Sums{column[0], column[columns]});
      }
      const double pivot = pivots[place(channel, columns, order)];
      for (int64_t i = channel; i < rest_values; i += channels) {
        total.add(static_cast<double>(static_cast<Math>(rest[i])) - pivot);
      }
      const auto one = layer.finish<Math>(channel, shape, total, pivot);
      for (int64_t i = channel; i < columns; i += channels) {
        Math* const column = c.data() + place(i, columns, order);
        column[0] = one.centre;
        column[columns] = one.scale;
        column[2 * columns] = one.offset;
      }
      for (int64_t i = channel; y != nullptr && i < rest_values; i += channels) {
        SWA_FAST_CALL(normalise_run, rest + i, y + rows * columns + i, 1, one, layer.relu, false);
      }
    }
  });
  if (y == nullptr) return;
  torch::stable::parallel_for(0, blocks, grain, [&](int64_t from, int64_t to) {
    // Backwards where what was read last may still be in a cache; from memory, in its order.
    for (int64_t i = from; i < to; ++i) {
      const int64_t b = layer.stream ? i : from + to - 1 - i, at = b * block * columns;
      SWA_FAST_CALL(normalise_columns, input.x + at, y + at, rows_of(b), columns, columns,
                    kOutputAhead, true, c.data(), layer.relu, layer.stream);
    }
    if (layer.stream) end_of_stream();
  });
}

// The C library maps fresh memory for every allocation of more than 32 MiB. Its first touch, a page
// fault for every 4 KiB, would take longer than all the rest.
void ask_for_huge_pages(const Tensor& tensor) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kPage = 4096, kOwnMapping = uintptr_t{32} << 20;
  const uintptr_t bytes = static_cast<uintptr_t>(tensor.numel()) * tensor.element_size();
  if (bytes < kOwnMapping) return;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
  const uintptr_t from = (begin + kPage - 1) / kPage * kPage, to = (begin + bytes) / kPage * kPage;
  // Where the system has none, nothing is lost.
  (void)madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);
#endif
}

// Memory that another library handed to torch may begin anywhere; a float may not.
Tensor aligned(const Tensor& tensor) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
  return address % tensor.element_size() == 0 ? tensor : torch::stable::clone(tensor);
}

Tensor collect_cpu(Tensor x, std::optional<Tensor> weight, std::optional<Tensor> bias, double eps,
                   bool relu, bool normalise, Tensor batch, std::optional<Tensor> /*tickets*/) {
  const Activations shape = check_activations(x);
  STD_TORCH_CHECK(x.is_cpu(), "batch_norm_collect.cpu: x must be on the CPU");
  x = aligned(x);
  if (weight) weight = aligned(*weight);
  if (bias) bias = aligned(*bias);
  const Layer layer{check_affine(weight, x, "weight"),
                    check_affine(bias, x, "bias"),
                    eps,
                    relu,
                    outlasts_caches(x.numel() * static_cast<int64_t>(x.element_size())),
                    check_batch(batch, x)};
  Tensor y = normalise ? torch::stable::empty_like(x) : torch::stable::new_empty(x, {0});
  if (normalise) ask_for_huge_pages(y);
  dispatch_floating("batch_norm_collect", x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const Input<T> input{static_cast<const T*>(x.const_data_ptr()), shape};
    T* const output = normalise ? static_cast<T*>(y.mutable_data_ptr()) : nullptr;
    if (shape.channels_last) {
      collect_rows(input, layer, output);
    } else {
      collect_contiguous(input, layer, output);
    }
  });
  return y;
}

void merge_cpu(Tensor accumulators, Tensor batch, int64_t estimator) {
  const int64_t total = check_merge(accumulators, batch, estimator);
  STD_TORCH_CHECK(batch.is_cpu(), "batch_norm_merge_.cpu: batch must be on the CPU");
  double* const a = static_cast<double*>(accumulators.mutable_data_ptr());
  double* const b = static_cast<double*>(batch.mutable_data_ptr());
  torch::stable::parallel_for(0, total, kGrain, [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) merge_channel(a, b, total, i, static_cast<int>(estimator));
  });
}

}  // namespace
}  // namespace swa_fast

STABLE_TORCH_LIBRARY_IMPL(swa_fast, CPU, m) {
  m.impl("batch_norm_collect.cpu", TORCH_BOX(&swa_fast::collect_cpu));
  m.impl("batch_norm_merge_.cpu", TORCH_BOX(&swa_fast::merge_cpu));
}
