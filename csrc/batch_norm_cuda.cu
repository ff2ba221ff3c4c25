// CUDA kernels of swa_fast::batch_norm_collect and swa_fast::batch_norm_merge_.
//
// Formula: batch_norm.h. Layout: [n, c, s], or [n * s, c] with channels-last; a block serves a part
// of one channel (contiguous) or of a tile of up to 128 channels. Bytes per element: 3 sizeof(x),
// 12 for fp32: a read for the statistics, a read and a write for the output; bound by memory
// bandwidth. Plus 16 bytes for a block and channel of its tile.
//
// Two launches, one without the output. The last block of a tile to finish adds up the sums of all
// of them, in the order of the blocks' numbers, so nothing depends on the order in which they run.
// It knows that it is the last from a ticket, which it resets.

#include <cuda_runtime.h>

#include <algorithm>

#include "batch_norm.h"
#include "packed.cuh"

namespace swa_fast {
namespace {

constexpr int kThreads = 256;
constexpr int kWarpSize = 32;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kMaxTile = 128;      // channels that a block of the channels-last kernels serves
constexpr int64_t kBlocks = 1024;  // fills any GPU; not its own number, for the same bits on all
constexpr int64_t kMaxSplits = 512;

// How the threads of a launch share the input. A unit is what a thread loads at once: a pack of
// values of one channel, or of one row. Units of a channel or tile are counted along the samples.
struct Geometry {
  Activations shape;
  int64_t units;                      // of a channel or tile
  int64_t run;                        // of one sample's run of a channel; contiguous only
  int64_t step_samples, step_in_run;  // kThreads units further on; contiguous only
  int64_t tiles, splits;              // blocks = tiles * splits, tiles fastest
  int64_t units_per_thread;
  int lanes;  // threads side by side along the channels, a power of two; contiguous: 1
};

template <typename T_, bool kVector, bool kRows_>
struct BatchNormTraits {
  using T = T_;
  using Math = statistics_t<T>;
  static constexpr bool kRows = kRows_;
  static constexpr int kPack = kVector ? kPackBytes / static_cast<int>(sizeof(T)) : 1;
  using Unit = Pack<T, kPack>;
  static constexpr int kColumns = kRows ? kPack : 1;  // channels in a unit
  static constexpr int kPerUnit = kPack / kColumns;   // values of each
  // Units in flight per thread, which are also what a group's pivot is the mean of.
  static constexpr int kUnroll = kPerUnit == 1 ? 8 : 4;
  static constexpr int kGroupUnits = kGroup / kPerUnit;
  static constexpr int kMaxLanes =
      kRows ? (kMaxTile / kColumns < 32 ? kMaxTile / kColumns : 32) : 1;
  static constexpr int kTile = kMaxLanes * kColumns;  // channels of a block, at most
  static_assert(kUnroll * kPerUnit >= kPivot, "the bound in batch_norm.h");
  static_assert(kGroupUnits % kUnroll == 0 && kTile <= kThreads);
  static_assert(!kVector || sizeof(Unit) == kPackBytes);
};

// A thread's way through its units.
template <typename Traits>
class Cursor {
 public:
  __device__ __forceinline__ Cursor(const Geometry& g, int64_t tile, int64_t split) {
    if constexpr (Traits::kRows) {
      const int lane = threadIdx.x & (g.lanes - 1);
      step_ = kThreads / g.lanes;
      channel_ = (tile * g.lanes + lane) * Traits::kPack;
      unit_ = split * step_ * g.units_per_thread + threadIdx.x / g.lanes;
      // A tile may reach past the last channel; a unit does not.
      end_ = channel_ < g.shape.c ? min(g.units, (split + 1) * step_ * g.units_per_thread) : 0;
      offset_ = unit_ * g.shape.c + channel_;
      stride_ = step_ * g.shape.c;
    } else {
      step_ = kThreads;
      channel_ = tile;
      unit_ = split * step_ * g.units_per_thread + threadIdx.x;
      end_ = min(g.units, (split + 1) * step_ * g.units_per_thread);
      // A division of 64 bits is a hundred instructions.
      const int64_t sample = (unit_ | g.run) >> 32 == 0
                                 ? static_cast<uint32_t>(unit_) / static_cast<uint32_t>(g.run)
                                 : unit_ / g.run;
      const int64_t sample_stride = g.shape.c * g.shape.s;
      in_run_ = unit_ - sample * g.run;
      run_ = g.run;
      step_in_run_ = g.step_in_run;
      offset_ = sample * sample_stride + channel_ * g.shape.s + in_run_ * Traits::kPack;
      stride_ = g.step_samples * sample_stride + g.step_in_run * Traits::kPack;
      carry_ = sample_stride - g.shape.s;
    }
  }

  __device__ __forceinline__ bool inside() const { return unit_ < end_; }
  __device__ __forceinline__ int64_t channel() const { return channel_; }
  __device__ __forceinline__ int64_t offset() const { return offset_; }

  __device__ __forceinline__ void advance() {
    unit_ += step_;
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
  int64_t channel_, unit_, end_, step_;
  int64_t offset_, stride_;                     // in elements of the tensor
  int64_t in_run_, run_, step_in_run_, carry_;  // contiguous only
};

// Up to kUnroll units, loaded before the first is used. Returns how many.
template <typename Traits>
__device__ __forceinline__ int load_units(const typename Traits::T* x, Cursor<Traits>& cursor,
                                          typename Traits::Unit* units, int64_t* offsets) {
  int count = 0;
#pragma unroll
  for (int u = 0; u < Traits::kUnroll; ++u) {
    offsets[u] = cursor.offset();
    if (cursor.inside()) {
      units[u] = *reinterpret_cast<const typename Traits::Unit*>(x + cursor.offset());
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

// The pivots of a unit's channels, as channel_pivot, in loads of whole units.
template <typename Traits>
__device__ __forceinline__ void load_pivots(const typename Traits::T* x, const Geometry& g,
                                            int64_t channel, double* pivots) {
  using Math = typename Traits::Math;
  if constexpr (Traits::kRows) {
    const int64_t count = pivot_values<typename Traits::T>(g.shape);
#pragma unroll
    for (int c = 0; c < Traits::kColumns; ++c) pivots[c] = 0.0;
    if (channel >= g.shape.c) return;
    for (int64_t row = 0; row < count; ++row) {
      const typename Traits::Unit unit =
          *reinterpret_cast<const typename Traits::Unit*>(x + row * g.shape.c + channel);
#pragma unroll
      for (int c = 0; c < Traits::kColumns; ++c) {
        pivots[c] += static_cast<double>(static_cast<Math>(unit.element[c]));
      }
    }
    if (count > 1) {
#pragma unroll
      for (int c = 0; c < Traits::kColumns; ++c) pivots[c] /= static_cast<double>(count);
    }
  } else {
    pivots[0] = channel_pivot(x, g.shape, channel);
  }
}

template <typename Traits>
__device__ __forceinline__ void sum_units(const typename Traits::T* x, Cursor<Traits>& cursor,
                                          const double* pivots, Sums* sums) {
  using Math = typename Traits::Math;
  constexpr int kColumns = Traits::kColumns;
  while (cursor.inside()) {
    Math group_pivot[kColumns], s1[Traits::kPack], s2[Traits::kPack];
#pragma unroll
    for (int e = 0; e < Traits::kPack; ++e) s1[e] = s2[e] = Math(0);
    int in_group = 0;
#pragma unroll 1
    while (in_group < Traits::kGroupUnits && cursor.inside()) {
      typename Traits::Unit units[Traits::kUnroll];
      int64_t offsets[Traits::kUnroll];
      const int count = load_units(x, cursor, units, offsets);
      if (in_group == 0) {
#pragma unroll
        for (int c = 0; c < kColumns; ++c) group_pivot[c] = Math(0);
#pragma unroll
        for (int u = 0; u < Traits::kUnroll; ++u) {
#pragma unroll
          for (int e = 0; e < Traits::kPack; ++e) {
            if (u < count) group_pivot[e % kColumns] += static_cast<Math>(units[u].element[e]);
          }
        }
        const Math share = Math(1) / static_cast<Math>(count * Traits::kPerUnit);
#pragma unroll
        for (int c = 0; c < kColumns; ++c) group_pivot[c] *= share;
      }
#pragma unroll
      for (int u = 0; u < Traits::kUnroll; ++u) {
        if (u < count) {
#pragma unroll
          for (int e = 0; e < Traits::kPack; ++e) {
            const Math d = static_cast<Math>(units[u].element[e]) - group_pivot[e % kColumns];
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
      sums[c].add_group(static_cast<double>(group_pivot[c]) - pivots[c], k, first, second);
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
  Sums* partial;     // [tiles, splits, channels of a tile]; unused without splits
  int32_t* tickets;  // [c], one for a tile at the number of its first channel; likewise
  StoredCoefficients<statistics_t<T>>* coefficients;  // [c]
  AffineVector weight, bias;
  double eps;
  BatchColumns batch;
};

template <typename Traits>
__global__ void __launch_bounds__(kThreads)
    statistics_kernel(const __grid_constant__ StatisticsArguments<typename Traits::T> arguments) {
  using T = typename Traits::T;
  using Math = typename Traits::Math;
  __shared__ Sums shared[kWarps * Traits::kTile];
  __shared__ bool is_last;
  const Geometry& g = arguments.geometry;
  const int64_t tile = blockIdx.x % g.tiles, split = blockIdx.x / g.tiles;
  const int channels = g.lanes * Traits::kColumns;  // of the tile

  Cursor<Traits> cursor(g, tile, split);
  double pivots[Traits::kColumns];
  load_pivots<Traits>(arguments.x, g, cursor.channel(), pivots);
  Sums sums[Traits::kColumns];
#pragma unroll
  for (int c = 0; c < Traits::kColumns; ++c) sums[c] = {0.0, 0.0};
  sum_units(arguments.x, cursor, pivots, sums);
  Sums total = block_sums<Traits::kColumns>(sums, g.lanes, shared);

  if (g.splits > 1) {
    Sums* const partial = arguments.partial + tile * g.splits * channels;
    if (threadIdx.x < channels) {
      // Read by another block, so not through the first-level cache; as two halves of 16 bytes.
      __stcg(reinterpret_cast<double2*>(partial + split * channels + threadIdx.x),
             make_double2(total.first, total.second));
    }
    __threadfence();
    __syncthreads();
    int32_t* const ticket = arguments.tickets + tile * channels;
    if (threadIdx.x == 0) is_last = atomicAdd(ticket, 1) == g.splits - 1;
    __syncthreads();
    if (!is_last) return;
    __threadfence();
    Sums mine{0.0, 0.0};
    const int column = threadIdx.x & (channels - 1);
#pragma unroll 8
    for (int64_t i = threadIdx.x / channels; i < g.splits; i += kThreads / channels) {
      const double2 part =
          __ldcg(reinterpret_cast<const double2*>(partial + i * channels + column));
      mine.add(Sums{part.x, part.y});
    }
    total = block_sums<1>(&mine, channels, shared);
    if (threadIdx.x == 0) *ticket = 0;
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
__global__ void __launch_bounds__(kThreads)
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
#pragma unroll 1
  while (cursor.inside()) {
    typename Traits::Unit units[Traits::kUnroll];
    int64_t offsets[Traits::kUnroll];
    const int count = load_units(x, cursor, units, offsets);
#pragma unroll
    for (int u = 0; u < Traits::kUnroll; ++u) {
      if (u < count) {
#pragma unroll
        for (int e = 0; e < Traits::kPack; ++e) {
          const Coefficients<Math>& c = columns[e % Traits::kColumns];
          const Math d = static_cast<Math>(units[u].element[e]) - c.centre;
          const Math value = multiply_add(d, c.scale, c.offset);
          units[u].element[e] = static_cast<T>(relu && value < Math(0) ? Math(0) : value);
        }
        *reinterpret_cast<typename Traits::Unit*>(y + offsets[u]) = units[u];
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

// Depends on the shape, the type and the alignment alone.
template <typename Traits>
Geometry make_geometry(const Activations& shape) {
  Geometry g{};
  g.shape = shape;
  int64_t side_by_side = 1;  // threads along the units
  if (Traits::kRows) {
    const int64_t packs = ceil_div(shape.c, Traits::kPack);
    g.lanes = 1;
    while (g.lanes < Traits::kMaxLanes && g.lanes < packs) g.lanes *= 2;
    g.tiles = ceil_div(packs, g.lanes);
    g.units = shape.values();
    side_by_side = kThreads / g.lanes;
  } else {
    g.lanes = 1;
    g.tiles = shape.c;
    g.run = shape.s / Traits::kPack;
    g.units = shape.n * g.run;
    g.step_samples = kThreads / g.run;
    g.step_in_run = kThreads % g.run;
    side_by_side = kThreads;
  }
  const int64_t most = std::min(kMaxSplits, ceil_div(g.units, side_by_side * Traits::kUnroll));
  const int64_t wanted = std::min(most, ceil_div(kBlocks, g.tiles));
  g.units_per_thread =
      ceil_div(ceil_div(g.units, side_by_side * wanted), Traits::kUnroll) * Traits::kUnroll;
  g.splits = ceil_div(g.units, side_by_side * g.units_per_thread);
  STD_TORCH_CHECK(g.tiles * g.splits <= 0x7fffffff,
                  "batch_norm_collect.cuda: x has too many channels: ", shape.c);
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
    const Geometry g = make_geometry<Traits>(shape);
    const int64_t channels = g.lanes * Traits::kColumns;
    // Coefficients, then the blocks' sums; in doubles, of which four hold one channel's.
    static_assert(sizeof(StoredCoefficients<Math>) <= 4 * sizeof(double));
    const int64_t partials = g.splits > 1 ? g.tiles * g.splits * channels : 0;
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
    normalise_kernel<Traits><<<blocks, kThreads, 0, stream>>>(
        arguments.x, static_cast<T*>(y.mutable_data_ptr()), arguments.coefficients, g, relu);
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
  dispatch_floating(x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    constexpr int64_t kPack = kPackBytes / static_cast<int64_t>(sizeof(T));
    const int64_t line = shape.channels_last ? shape.c : shape.s;  // runs between steps of n
    const bool vector = line % kPack == 0 && (reinterpret_cast<uintptr_t>(x.const_data_ptr()) |
                                              reinterpret_cast<uintptr_t>(y.const_data_ptr())) %
                                                     kPackBytes ==
                                                 0;
    if (shape.channels_last) {
      vector ? collect.launch<BatchNormTraits<T, true, true>>(shape)
             : collect.launch<BatchNormTraits<T, false, true>>(shape);
    } else {
      vector ? collect.launch<BatchNormTraits<T, true, false>>(shape)
             : collect.launch<BatchNormTraits<T, false, false>>(shape);
    }
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
