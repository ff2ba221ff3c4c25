// CUDA kernels of swa_fast::batch_norm_collect and swa_fast::batch_norm_merge_.
//
// Formula: batch_norm.h. Layout: [n, c, s], or [n * s, c] with channels-last; a block serves a part
// of one channel (contiguous) or of a tile of channels that fill 128 bytes of a row. Bytes per
// element: 3 sizeof(x), 12 for fp32: a read for the statistics, a read and a write for the output;
// bound by memory bandwidth. Plus 16 bytes for a block and channel of its tile.
//
// Two launches, one without the output. The last block of a tile to finish adds up the sums of all
// of them, in the order of the blocks' numbers, so nothing depends on the order in which they run.
// It knows that it is the last from a ticket, which it resets. What is the last one's to read,
// alone and while nothing else is left to do, has to be little: eight loads of a thread are on
// their way at a time, and where more than kAlone of them would follow, the blocks of a tile are
// divided into groups, each of which is added up by its own last block.

#include <cuda_runtime.h>

#include <algorithm>

#include "batch_norm.h"
#include "packed.cuh"

namespace swa_fast {
namespace {

constexpr int kThreads = 256;
constexpr int kWarpSize = 32;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kLine = 128;  // bytes of a row that a block of the channels-last kernels serves
// Blocks of a launch fill any GPU; not its own number, for the same bits on all. Half of them where
// a thread would have no more than kFewUnits units.
constexpr int64_t kBlocks = 1024, kFewUnits = 32;
constexpr int64_t kMaxSplits = 1024;
constexpr int kAtOnce = 8;  // loads of other blocks' sums that a thread has on their way
constexpr int64_t kAlone = 4 * kAtOnce;
// Blocks of these kernels that fit on a multiprocessor.
constexpr int kResident = 3;

// How the threads of a launch share the input. A unit is what a thread loads at once: a pack of
// values of one channel, or of one row. Units of a channel or tile are counted along the samples.
struct Geometry {
  Activations shape;
  int64_t units;                      // of a channel or tile
  int64_t run;                        // of one sample's run of a channel; contiguous only
  int64_t step_samples, step_in_run;  // kThreads units further on; contiguous only
  int64_t tiles;                      // blocks = tiles * splits, tiles fastest
  int splits, groups, group_size;  // of a tile's blocks; one group: all splits are merged at once
  int units_per_thread;
  int lanes;  // threads side by side along the channels; contiguous: 1
};

template <typename T_, int kPack_, bool kRows_>
struct BatchNormTraits {
  using T = T_;
  using Math = statistics_t<T>;
  static constexpr bool kRows = kRows_;
  static constexpr int kPack = kPack_;
  using Unit = Pack<T, kPack>;
  static constexpr int kColumns = kRows ? kPack : 1;  // channels in a unit
  static constexpr int kPerUnit = kPack / kColumns;   // values of each
  // Units in flight per thread, 64 bytes where they are wide, which are also what a group's pivot
  // is the mean of.
  static constexpr int kUnroll = sizeof(Unit) == kPackBytes ? 4 : 8;
  static constexpr int kPivotValues = kUnroll * kPerUnit;
  static constexpr int kGroupUnits = (kPivotValues < kPivot ? kGroup / 2 : kGroup) / kPerUnit;
  static constexpr int kMaxLanes = !kRows ? 1
                                   : kLine / static_cast<int>(sizeof(Unit)) < 32
                                       ? kLine / static_cast<int>(sizeof(Unit))
                                       : 32;
  static constexpr int kTile = kMaxLanes * kColumns;  // channels of a block, at most
  static_assert(kGroupUnits * kPerUnit * kPivot <= kPivotValues * kGroup,
                "the bound in batch_norm.h");
  static_assert(kGroupUnits % kUnroll == 0 && kTile <= kThreads);
  static_assert(sizeof(Unit) <= kPackBytes && (!kRows || kPack <= 4),
                "more columns take more registers than let a second block in");
};

// A thread's way through its units: 64 bits for the block's first address, 32 for what is added.
template <typename Traits>
class Cursor {
 public:
  __device__ __forceinline__ Cursor(const Geometry& g, int64_t tile, int64_t split) {
    if constexpr (Traits::kRows) {
      const int lane = threadIdx.x % g.lanes, row = threadIdx.x / g.lanes;
      step_ = kThreads / g.lanes;
      const int64_t first = split * (step_ * g.units_per_thread);
      base_ = first * g.shape.c + tile * g.lanes * Traits::kPack;
      channel_ = (tile * g.lanes + lane) * Traits::kPack;
      left_ = static_cast<int>(min(g.units - first, int64_t{step_ * g.units_per_thread})) - row;
      // A tile may reach past the last channel, which a unit does not, and threads may be left
      // over.
      if (channel_ >= g.shape.c || row >= step_) left_ = 0;
      stride_ = step_ * static_cast<uint32_t>(g.shape.c);
      offset_ = row * static_cast<uint32_t>(g.shape.c) + lane * Traits::kPack;
    } else {
      step_ = kThreads;
      channel_ = tile;
      const int64_t first = split * (step_ * g.units_per_thread);
      left_ = static_cast<int>(min(g.units - first, int64_t{step_ * g.units_per_thread}));
      left_ -= threadIdx.x;
      const int64_t unit = first + threadIdx.x;
      // A division of 64 bits is a hundred instructions.
      const int64_t sample = (unit | g.run) >> 32 == 0
                                 ? static_cast<uint32_t>(unit) / static_cast<uint32_t>(g.run)
                                 : unit / g.run;
      const int64_t sample_stride = g.shape.c * g.shape.s;
      in_run_ = unit - sample * g.run;
      run_ = g.run;
      step_in_run_ = g.step_in_run;
      base_ = 0;
      offset_ = sample * sample_stride + channel_ * g.shape.s + in_run_ * Traits::kPack;
      stride_ = g.step_samples * sample_stride + g.step_in_run * Traits::kPack;
      carry_ = sample_stride - g.shape.s;
    }
  }

  // The rows of a channels-last block are fewer than 2^32 elements apart.
  using Offset = std::conditional_t<Traits::kRows, uint32_t, int64_t>;

  __device__ __forceinline__ bool inside() const { return left_ > 0; }
  __device__ __forceinline__ int64_t channel() const { return channel_; }
  __device__ __forceinline__ int64_t base() const { return base_; }
  __device__ __forceinline__ Offset offset() const { return offset_; }

  __device__ __forceinline__ void advance() {
    left_ -= step_;
    offset_ += stride_;
    if constexpr (!Traits::kRows) {
      in_run_ += step_in_run_;
      if (in_run_ >= run_) {
        in_run_ -= run_;
        offset_ += carry_;
      }
    }
  }

 private:
  int left_, step_;  // units
  int64_t channel_, base_;
  Offset offset_, stride_;                      // in elements of the tensor
  int64_t in_run_, run_, step_in_run_, carry_;  // contiguous only
};

// Up to kUnroll units, loaded before the first is used. Returns how many.
template <typename Traits>
__device__ __forceinline__ int load_units(const typename Traits::T* x, Cursor<Traits>& cursor,
                                          Memory<typename Traits::Unit>* units,
                                          typename Cursor<Traits>::Offset* offsets) {
  int count = 0;
#pragma unroll
  for (int u = 0; u < Traits::kUnroll; ++u) {
    offsets[u] = cursor.offset();
    if (cursor.inside()) {
      units[u].load(x + cursor.offset());
      ++count;
      cursor.advance();
    }
  }
  return count;
}

// Fused by name and not left to the compiler.
__device__ __forceinline__ float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
__device__ __forceinline__ double multiply_add(double a, double b, double c) {
  return fma(a, b, c);
}

// The pivots of a unit's channels, as channel_pivot, in loads of whole units. Exact in Math: one
// value, except in fp64.
template <typename Traits>
__device__ __forceinline__ void load_pivots(const typename Traits::T* x, const Geometry& g,
                                            int64_t channel, typename Traits::Math* pivots) {
  using Math = typename Traits::Math;
  if constexpr (Traits::kRows) {
    const int64_t count = pivot_values<typename Traits::T>(g.shape);
#pragma unroll
    for (int c = 0; c < Traits::kColumns; ++c) pivots[c] = Math(0);
    if (channel >= g.shape.c) return;
    for (int64_t row = 0; row < count; ++row) {
      const typename Traits::Unit unit =
          *reinterpret_cast<const typename Traits::Unit*>(x + row * g.shape.c + channel);
#pragma unroll
      for (int c = 0; c < Traits::kColumns; ++c) {
        pivots[c] += static_cast<Math>(unit.element[c]);
      }
    }
    if (count > 1) {
#pragma unroll
      for (int c = 0; c < Traits::kColumns; ++c) pivots[c] /= static_cast<Math>(count);
    }
  } else {
    pivots[0] = static_cast<Math>(channel_pivot(x, g.shape, channel));
  }
}

template <typename Traits>
__device__ __forceinline__ void sum_units(const typename Traits::T* x, Cursor<Traits>& cursor,
                                          const typename Traits::Math* pivots, Sums* sums) {
  using Math = typename Traits::Math;
  constexpr int kColumns = Traits::kColumns;
  while (cursor.inside()) {
    Math group_pivot[kColumns], s1[Traits::kPack], s2[Traits::kPack];
#pragma unroll
    for (int e = 0; e < Traits::kPack; ++e) s1[e] = s2[e] = Math(0);
    int in_group = 0;
#pragma unroll 1
    while (in_group < Traits::kGroupUnits && cursor.inside()) {
      Memory<typename Traits::Unit> units[Traits::kUnroll];
      typename Cursor<Traits>::Offset offsets[Traits::kUnroll];
      const int count = load_units(x, cursor, units, offsets);
      if (in_group == 0) {
#pragma unroll
        for (int c = 0; c < kColumns; ++c) group_pivot[c] = Math(0);
#pragma unroll
        for (int u = 0; u < Traits::kUnroll; ++u) {
          if (u < count) {
            const typename Traits::Unit unit = units[u].unpacked();
#pragma unroll
            for (int e = 0; e < Traits::kPack; ++e) {
              group_pivot[e % kColumns] += static_cast<Math>(unit.element[e]);
            }
          }
        }
        const Math share = Math(1) / static_cast<Math>(count * Traits::kPerUnit);
#pragma unroll
        for (int c = 0; c < kColumns; ++c) group_pivot[c] *= share;
      }
#pragma unroll
      for (int u = 0; u < Traits::kUnroll; ++u) {
        if (u < count) {
          const typename Traits::Unit unit = units[u].unpacked();
#pragma unroll
          for (int e = 0; e < Traits::kPack; ++e) {
            const Math d = static_cast<Math>(unit.element[e]) - group_pivot[e % kColumns];
            s1[e] += d;
            s2[e] = multiply_add(d, d, s2[e]);
          }
        }
      }
      in_group += count;
    }
    const double k = static_cast<double>(in_group * Traits::kPerUnit);
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      Math first = Math(0), second = Math(0);
#pragma unroll
      for (int e = c; e < Traits::kPack; e += kColumns) {
        first += s1[e];
        second += s2[e];
      }
      sums[c].add_group(static_cast<double>(group_pivot[c]) - static_cast<double>(pivots[c]), k,
                        first, second);
    }
  }
}

// The sums over the threads whose numbers are equal modulo `lanes`, a power of two, of kColumns
// values each. The total of value c of thread `lane` goes to shared[lane * kColumns + c], for the
// threads below lanes * kColumns to return.
template <int kColumns>
__device__ __forceinline__ Sums block_sums(const Sums* values, int lanes, Sums* shared) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int width = lanes < kWarpSize ? lanes : kWarpSize;  // threads of a warp that stay apart
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
    Sums total = values[c];
    for (int offset = width; offset < kWarpSize; offset <<= 1) {
      total.first += __shfl_xor_sync(0xffffffffu, total.first, offset);
      total.second += __shfl_xor_sync(0xffffffffu, total.second, offset);
    }
    if (lane < width) shared[(warp * width + lane) * kColumns + c] = total;
  }
  __syncthreads();
  // What the warps wrote lies in rows of lanes * kColumns.
  const int columns = lanes * kColumns, rows = kWarps * width / lanes;
  Sums total{0.0, 0.0};
  if (threadIdx.x < columns) {
    for (int row = 0; row < rows; ++row) total.add(shared[row * columns + threadIdx.x]);
  }
  __syncthreads();
  return total;
}

// One access of 16 bytes in fp32.
template <typename Math>
struct alignas(4 * sizeof(Math)) StoredCoefficients {
  Coefficients<Math> value;
  Math unused;
};

template <typename T>
struct StatisticsArguments {
  const T* x;
  Geometry geometry;
  Sums* partial;     // [tiles, splits + groups, channels of a tile]; unused without splits
  int32_t* tickets;  // [c], a tile's own and its groups' from the number of its first channel on
  StoredCoefficients<statistics_t<T>>* coefficients;  // [c]
  AffineVector weight, bias;
  double eps;
  BatchColumns batch;
};

// Takes one of the tickets 0, 1, 2, ... What this thread has written, and by way of a barrier what
// its block has, is there for who draws a later one.
__device__ __forceinline__ int draw_ticket(int32_t* ticket) {
  int drawn;
  asm volatile("atom.add.acq_rel.gpu.global.s32 %0, [%1], 1;"
               : "=r"(drawn)
               : "l"(ticket)
               : "memory");
  return drawn;
}

// Leaves a block's sums with those of others. In the last of `count` blocks `total`, of the thread
// for each channel, becomes the sum over all, and the result is true.
__device__ __forceinline__ bool add_to_others(Sums& total, Sums* parts, int place, int count,
                                              int channels, int32_t* ticket, Sums* shared) {
  __shared__ bool is_last;
  if (threadIdx.x < channels) {
    // Read by another block, so not through the first-level cache; as two halves of 16 bytes.
    __stcg(reinterpret_cast<double2*>(parts + place * channels + threadIdx.x),
           make_double2(total.first, total.second));
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    is_last = draw_ticket(ticket) == count - 1;
    if (is_last) *ticket = 0;
  }
  __syncthreads();
  if (!is_last) return false;
  const int column = threadIdx.x & (channels - 1), step = kThreads / channels;
  Sums mine{0.0, 0.0};
#pragma unroll 1
  for (int first = threadIdx.x / channels; first < count; first += kAtOnce * step) {
    double2 part[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int at = first + i * step;
      part[i] = make_double2(0.0, 0.0);
      if (at < count) {
        part[i] = __ldcg(reinterpret_cast<const double2*>(parts + at * channels + column));
      }
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) mine.add(Sums{part[i].x, part[i].y});
  }
  total = block_sums<1>(&mine, channels, shared);
  return true;
}

template <typename Traits>
__global__ void __launch_bounds__(kThreads, kResident)
    statistics_kernel(const __grid_constant__ StatisticsArguments<typename Traits::T> arguments) {
  using T = typename Traits::T;
  using Math = typename Traits::Math;
  __shared__ Sums shared[kWarps * Traits::kTile];
  const Geometry& g = arguments.geometry;
  const int64_t tile = blockIdx.x % g.tiles;
  const int split = static_cast<int>(blockIdx.x / g.tiles);
  const int channels = g.lanes * Traits::kColumns;  // of the tile

  Cursor<Traits> cursor(g, tile, split);
  Math pivots[Traits::kColumns];
  load_pivots<Traits>(arguments.x, g, cursor.channel(), pivots);
  Sums sums[Traits::kColumns];
#pragma unroll
  for (int c = 0; c < Traits::kColumns; ++c) sums[c] = {0.0, 0.0};
  sum_units(arguments.x + cursor.base(), cursor, pivots, sums);
  Sums total = block_sums<Traits::kColumns>(sums, g.lanes, shared);

  if (g.splits > 1) {
    Sums* const parts = arguments.partial + tile * (g.splits + g.groups) * channels;
    int32_t* const ticket = arguments.tickets + tile * channels;
    if (g.groups > 1) {
      const int group = split / g.group_size, first = group * g.group_size;
      if (!add_to_others(total, parts + first * channels, split - first,
                         min(g.group_size, g.splits - first), channels, ticket + 1 + group,
                         shared)) {
        return;
      }
      if (!add_to_others(total, parts + g.splits * channels, group, g.groups, channels, ticket,
                         shared)) {
        return;
      }
    } else if (!add_to_others(total, parts, split, g.splits, channels, ticket, shared)) {
      return;
    }
  }

  const int64_t channel = tile * channels + threadIdx.x;
  if (threadIdx.x < channels && channel < g.shape.c) {
    const double m = static_cast<double>(g.shape.values());
    const Moments statistics = moments(total, channel_pivot<T>(arguments.x, g.shape, channel), m);
    arguments.batch.store(channel, g.shape, statistics);
    arguments.coefficients[channel] = {
        coefficients<Math>(statistics, m, arguments.eps, arguments.weight.at(channel, 1.0),
                           arguments.bias.at(channel, 0.0)),
        Math(0)};
  }
}

template <typename Traits>
__global__ void __launch_bounds__(kThreads, kResident)
    normalise_kernel(const typename Traits::T* __restrict__ x, typename Traits::T* __restrict__ y,
                     const StoredCoefficients<typename Traits::Math>* __restrict__ coefficients,
                     const __grid_constant__ Geometry g, bool relu) {
  using T = typename Traits::T;
  using Math = typename Traits::Math;
  // Backwards: what was read last may still be in the second-level cache.
  const int64_t block = gridDim.x - 1 - blockIdx.x;
  Cursor<Traits> cursor(g, block % g.tiles, block / g.tiles);
  if (!cursor.inside()) return;
  Coefficients<Math> columns[Traits::kColumns];
#pragma unroll
  for (int c = 0; c < Traits::kColumns; ++c) columns[c] = coefficients[cursor.channel() + c].value;
  x += cursor.base();
  y += cursor.base();
#pragma unroll 1
  while (cursor.inside()) {
    Memory<typename Traits::Unit> units[Traits::kUnroll];
    typename Cursor<Traits>::Offset offsets[Traits::kUnroll];
    const int count = load_units(x, cursor, units, offsets);
#pragma unroll
    for (int u = 0; u < Traits::kUnroll; ++u) {
      if (u < count) {
        typename Traits::Unit unit = units[u].unpacked();
#pragma unroll
        for (int e = 0; e < Traits::kPack; ++e) {
          const Coefficients<Math>& c = columns[e % Traits::kColumns];
          const Math d = static_cast<Math>(unit.element[e]) - c.centre;
          const Math value = multiply_add(d, c.scale, c.offset);
          unit.element[e] = static_cast<T>(relu && value < Math(0) ? Math(0) : value);
        }
        *reinterpret_cast<typename Traits::Unit*>(y + offsets[u]) = unit;
      }
    }
  }
}

__global__ void __launch_bounds__(kThreads)
    merge_kernel(double* accumulators, double* batch, int64_t total, int estimator) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i < total) merge_channel(accumulators, batch, total, i, estimator);
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How the threads of a block share the channels of channels-last units, `packs` of them a row.
template <typename Traits>
int lanes_for_statistics(int64_t packs) {
  int lanes = 1;  // a power of two, for the sums over the threads of a channel
  while (lanes < Traits::kMaxLanes && lanes < packs) lanes *= 2;
  // Half of a line where a whole one would leave many threads without a channel.
  const int64_t idle = ceil_div(packs, lanes) * lanes - packs;
  return lanes == Traits::kMaxLanes && lanes > 1 && 8 * idle > packs ? lanes / 2 : lanes;
}

// Whole rows, or whole lines of them: lines that several blocks write in parts are slow to write.
template <typename Traits>
int lanes_for_output(int64_t packs) {
  constexpr int64_t kMost = kThreads / 4;
  if (packs <= kMost) return static_cast<int>(packs);
  constexpr int64_t kLineUnits = kLine / static_cast<int64_t>(sizeof(typename Traits::Unit));
  const int64_t each = ceil_div(packs, ceil_div(packs, kMost));
  return static_cast<int>(std::min(kMost, ceil_div(each, kLineUnits) * kLineUnits));
}

// Depends on the shape, the type and the alignment alone.
template <typename Traits>
Geometry make_geometry(const Activations& shape, bool statistics) {
  Geometry g{};
  g.shape = shape;
  int64_t side_by_side = 1;  // threads along the units
  g.lanes = 1;
  if (Traits::kRows) {
    const int64_t packs = ceil_div(shape.c, Traits::kPack);
    g.lanes = statistics ? lanes_for_statistics<Traits>(packs) : lanes_for_output<Traits>(packs);
    g.tiles = ceil_div(packs, g.lanes);
    g.units = shape.values();
    side_by_side = kThreads / g.lanes;
  } else {
    g.tiles = shape.c;
    g.run = shape.s / Traits::kPack;
    g.units = shape.n * g.run;
    g.step_samples = kThreads / g.run;
    g.step_in_run = kThreads % g.run;
    side_by_side = kThreads;
  }
  constexpr int64_t kUnroll = Traits::kUnroll;
  const bool few = g.units * g.tiles < kFewUnits * side_by_side * kBlocks;
  const int64_t most = std::min(kMaxSplits, ceil_div(g.units, side_by_side * kUnroll));
  const int64_t wanted = std::min(most, ceil_div(few ? kBlocks / 2 : kBlocks, g.tiles));
  int64_t each = ceil_div(ceil_div(g.units, side_by_side * wanted), kUnroll) * kUnroll;
  if (Traits::kRows) {
    // Offsets of 32 bits, and more blocks where that is too few.
    const int64_t rows = (int64_t{1} << 32) / shape.c / side_by_side;
    each = std::min(each, rows / kUnroll * kUnroll);
    STD_TORCH_CHECK(each > 0, "batch_norm_collect.cuda: expected fewer than 2^32 / ",
                    side_by_side * kUnroll, " channels, found ", shape.c);
  }
  const int64_t splits = ceil_div(g.units, side_by_side * each);
  STD_TORCH_CHECK(side_by_side * each <= 0x7fffffff && splits <= 0x7fffffff / kThreads &&
                      g.tiles * splits <= 0x7fffffff,
                  "batch_norm_collect.cuda: x has too many channels or values: ", shape.c,
                  " channels of ", shape.values());
  g.units_per_thread = static_cast<int>(each);
  g.splits = static_cast<int>(splits);
  // As many groups as have blocks each, and a ticket of their own beside the tile's.
  const int64_t channels = g.lanes * Traits::kColumns;
  const int64_t tickets = std::min(channels, shape.c - (g.tiles - 1) * channels);
  g.groups = 1;
  if (statistics && splits * channels > kAlone * kThreads && tickets > 2) {
    int64_t groups = 2;
    while (groups * groups < splits) ++groups;
    groups = std::min(groups, tickets - 1);
    g.group_size = static_cast<int>(ceil_div(splits, groups));
    g.groups = static_cast<int>(ceil_div(splits, g.group_size));
  }
  return g;
}

void check_launch() {
  const cudaError_t status = cudaGetLastError();
  STD_TORCH_CHECK(status == cudaSuccess,
                  "batch_norm.cuda: launch failed: ", cudaGetErrorString(status));
}

struct Collect {
  const Tensor& x;
  Tensor& y;
  bool normalise, relu;
  double eps;
  AffineVector weight, bias;
  BatchColumns batch;
  const std::optional<Tensor>& tickets;

  template <typename Traits>
  void launch(const Activations& shape) const {
    using T = typename Traits::T;
    using Math = typename Traits::Math;
    const Geometry g = make_geometry<Traits>(shape, true);
    const int64_t channels = g.lanes * Traits::kColumns;
    // Coefficients, then the blocks' sums; in doubles, of which four hold one channel's.
    static_assert(sizeof(StoredCoefficients<Math>) <= 4 * sizeof(double));
    const int64_t partials = g.splits > 1 ? g.tiles * (g.splits + g.groups) * channels : 0;
    Tensor scratch = torch::stable::new_empty(x, {4 * shape.c + 2 * partials}, ScalarType::Double);
    double* const memory = static_cast<double*>(scratch.mutable_data_ptr());
    std::optional<Tensor> own_tickets;
    if (g.splits > 1 && !tickets.has_value()) {
      own_tickets = torch::stable::new_zeros(x, {shape.c}, ScalarType::Int);
    }
    StatisticsArguments<T> arguments{};
    arguments.x = static_cast<const T*>(x.const_data_ptr());
    arguments.geometry = g;
    arguments.partial = reinterpret_cast<Sums*>(memory + 4 * shape.c);
    if (g.splits > 1) {
      const Tensor& used = own_tickets.has_value() ? *own_tickets : *tickets;
      arguments.tickets = static_cast<int32_t*>(used.mutable_data_ptr());
    }
    arguments.coefficients = reinterpret_cast<StoredCoefficients<Math>*>(memory);
    arguments.weight = weight;
    arguments.bias = bias;
    arguments.eps = eps;
    arguments.batch = batch;
    const unsigned blocks = static_cast<unsigned>(g.tiles * g.splits);
    const cudaStream_t stream = current_stream(x.get_device_index());
    statistics_kernel<Traits><<<blocks, kThreads, 0, stream>>>(arguments);
    check_launch();
    if (!normalise) return;
    const Geometry out = make_geometry<Traits>(shape, false);
    normalise_kernel<Traits>
        <<<static_cast<unsigned>(out.tiles * out.splits), kThreads, 0, stream>>>(
            arguments.x, static_cast<T*>(y.mutable_data_ptr()), arguments.coefficients, out, relu);
    check_launch();
  }
};

Tensor collect_cuda(Tensor x, std::optional<Tensor> weight, std::optional<Tensor> bias, double eps,
                    bool relu, bool normalise, Tensor batch, std::optional<Tensor> tickets) {
  STD_TORCH_CHECK(x.is_cuda(), "batch_norm_collect.cuda: x must be on a CUDA device");
  const Activations shape = check_activations(x);
  STD_TORCH_CHECK(
      !tickets.has_value() ||
          (tickets->scalar_type() == ScalarType::Int && tickets->is_contiguous() &&
           tickets->numel() == shape.c && tickets->get_device_index() == x.get_device_index()),
      "batch_norm_collect.cuda: tickets must hold ", shape.c, " contiguous int32 on x's device");
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor y = normalise ? torch::stable::empty_like(x) : torch::stable::new_empty(x, {0});
  const Collect collect{x,
                        y,
                        normalise,
                        relu,
                        eps,
                        check_affine(weight, x, "weight"),
                        check_affine(bias, x, "bias"),
                        check_batch(batch, x),
                        tickets};
  dispatch_floating("batch_norm_collect", x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    // The widest pack that divides what lies between steps of n, and all addresses.
    const int64_t line = shape.channels_last ? shape.c : shape.s;
    const uint64_t places = reinterpret_cast<uintptr_t>(x.const_data_ptr()) |
                            reinterpret_cast<uintptr_t>(y.const_data_ptr());
    const auto divides = [&](int64_t pack) {
      return line % pack == 0 && places % (pack * sizeof(T)) == 0;
    };
    if (shape.channels_last) {
      if constexpr (sizeof(T) <= 4) {
        if (divides(4)) return collect.launch<BatchNormTraits<T, 4, true>>(shape);
      }
      if (divides(2)) return collect.launch<BatchNormTraits<T, 2, true>>(shape);
      return collect.launch<BatchNormTraits<T, 1, true>>(shape);
    }
    if constexpr (sizeof(T) <= 2) {
      if (divides(8)) return collect.launch<BatchNormTraits<T, 8, false>>(shape);
    }
    if constexpr (sizeof(T) <= 4) {
      if (divides(4)) return collect.launch<BatchNormTraits<T, 4, false>>(shape);
    }
    if (divides(2)) return collect.launch<BatchNormTraits<T, 2, false>>(shape);
    return collect.launch<BatchNormTraits<T, 1, false>>(shape);
  });
  return y;
}

void merge_cuda(Tensor accumulators, Tensor batch, int64_t estimator) {
  const int64_t total = check_merge(accumulators, batch, estimator);
  STD_TORCH_CHECK(batch.is_cuda(), "batch_norm_merge_.cuda: batch must be on a CUDA device");
  if (total == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(batch.get_device_index());
  merge_kernel<<<static_cast<unsigned>(ceil_div(total, kThreads)), kThreads, 0,
                 current_stream(batch.get_device_index())>>>(
      static_cast<double*>(accumulators.mutable_data_ptr()),
      static_cast<double*>(batch.mutable_data_ptr()), total, static_cast<int>(estimator));
  check_launch();
}

}  // namespace
}  // namespace swa_fast

STABLE_TORCH_LIBRARY_IMPL(swa_fast, CUDA, m) {
  m.impl("batch_norm_collect.cuda", TORCH_BOX(&swa_fast::collect_cuda));
  m.impl("batch_norm_merge_.cuda", TORCH_BOX(&swa_fast::merge_cuda));
}
