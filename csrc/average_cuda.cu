// CUDA kernel of swa_fast::average_.
//
// Formula: average.h. Layout: every pair is two runs of `numel` elements in the same order (the
// Python front hands over dense tensors only). Bytes per element: sizeof(source) + 2
// sizeof(average), 12 for fp32, plus 64 bytes of counter reads per block; bound by memory
// bandwidth.
//
// One launch serves up to Table::kCapacity tensors of one (average, source) type pair. The table
// of pointers travels as a kernel argument: no copy, no allocation, and a captured graph holds its
// own. A block finds its tensor by bisection over the first blocks of the tensors; every thread of
// the block reads the same entries, which the constant cache broadcasts.

#include <cuda_runtime.h>

#include <algorithm>

#include "average.h"
#include "packed.cuh"

namespace swa_fast {
namespace {

struct Table {
  // Kernel arguments end at 32,764 bytes on sm_70 and newer (CUDA 12.1 and newer); the table leaves
  // room for the scalar arguments behind it.
  static constexpr int kCapacity = 1150;

  void* average[kCapacity];
  const void* source[kCapacity];
  int64_t numel[kCapacity];
  uint32_t first_block[kCapacity];
  int32_t count;
};
static_assert(sizeof(Table) <= 32764 - 128, "kernel argument limit");

template <typename Average_, typename Source_>
struct AverageTraits {
  using Average = Average_;
  using Source = Source_;
  using Math = opmath_t<Average, Source>;
  static constexpr int kThreads = 256;
  // The wider type fills 16 bytes, so neighbouring threads touch neighbouring bytes in both arrays.
  static constexpr int kPack =
      kPackBytes / (sizeof(Average) > sizeof(Source) ? sizeof(Average) : sizeof(Source));
  static constexpr int kUnroll = 4;  // packs in flight per thread: 64 bytes of each array
  static constexpr int64_t kChunk = int64_t{kThreads} * kPack * kUnroll;  // elements per block
  using AveragePack = Pack<Average, kPack>;
  using SourcePack = Pack<Source, kPack>;
  static_assert(kThreads % 32 == 0, "the counter is broadcast by full warps");
  static_assert(sizeof(AveragePack) == kPackBytes || sizeof(SourcePack) == kPackBytes);
};

template <typename Math>
__device__ __forceinline__ Math blend(Math a, Math b, Math w) {
  // As torch.lerp: the form with the smaller error on each side of w = 1/2.
  return w < Math(0.5) ? a + w * (b - a) : b - (Math(1) - w) * (b - a);
}

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads)
    average_kernel(const __grid_constant__ Table table, const int64_t* n_pointer, int64_t n_value,
                   Rule rule) {
  using Average = typename Traits::Average;
  using Source = typename Traits::Source;
  using Math = typename Traits::Math;
  using AveragePack = typename Traits::AveragePack;
  using SourcePack = typename Traits::SourcePack;
  constexpr int kPack = Traits::kPack;

  // One read per warp: read by every thread, the counter would be 4 % of the traffic.
  long long n = n_value;
  if (n_pointer != nullptr) {
    if (threadIdx.x % 32 == 0) n = *n_pointer;
    n = __shfl_sync(0xffffffffu, n, 0);
  }
  const bool copy = n == 0;
  const Math w = rule.weight<Math>(n);

  int low = 0, high = table.count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (table.first_block[middle] <= blockIdx.x) {
      low = middle;
    } else {
      high = middle;
    }
  }
  Average* average = static_cast<Average*>(table.average[low]);
  const Source* source = static_cast<const Source*>(table.source[low]);
  const int64_t numel = table.numel[low];
  const int64_t chunk = int64_t{blockIdx.x - table.first_block[low]} * Traits::kChunk;

  const auto combine = [&](Average a, Source b) {
    const Math wide = static_cast<Math>(b);
    return static_cast<Average>(copy ? wide : blend(static_cast<Math>(a), wide, w));
  };

  if (is_aligned_for<AveragePack>(average) && is_aligned_for<SourcePack>(source)) {
    AveragePack a[Traits::kUnroll];
    SourcePack b[Traits::kUnroll];
#pragma unroll
    for (int u = 0; u < Traits::kUnroll; ++u) {
      const int64_t i = chunk + (int64_t{u} * Traits::kThreads + threadIdx.x) * kPack;
      if (i + kPack <= numel) {
        a[u] = *reinterpret_cast<const AveragePack*>(average + i);
        b[u] = *reinterpret_cast<const SourcePack*>(source + i);
      }
    }
#pragma unroll
    for (int u = 0; u < Traits::kUnroll; ++u) {
      const int64_t i = chunk + (int64_t{u} * Traits::kThreads + threadIdx.x) * kPack;
      if (i + kPack <= numel) {
#pragma unroll
        for (int k = 0; k < kPack; ++k) a[u].element[k] = combine(a[u].element[k], b[u].element[k]);
        *reinterpret_cast<AveragePack*>(average + i) = a[u];
      } else {
        for (int64_t j = i; j < numel; ++j) average[j] = combine(average[j], source[j]);
      }
    }
  } else {
    const int64_t end = chunk + Traits::kChunk < numel ? chunk + Traits::kChunk : numel;
    for (int64_t i = chunk + threadIdx.x; i < end; i += Traits::kThreads) {
      average[i] = combine(average[i], source[i]);
    }
  }
}

template <typename Traits>
void launch(const Table& table, int64_t blocks, const int64_t* n_pointer, int64_t n_value,
            Rule rule, cudaStream_t stream) {
  average_kernel<Traits><<<static_cast<unsigned>(blocks), Traits::kThreads, 0, stream>>>(
      table, n_pointer, n_value, rule);
  const cudaError_t status = cudaGetLastError();
  STD_TORCH_CHECK(status == cudaSuccess,
                  "average_.cuda: launch failed: ", cudaGetErrorString(status));
}

// All pairs of one (average, source) type combination, in as few launches as the table allows.
template <typename Traits>
void average_pairs(const std::vector<Tensor>& averages, const std::vector<Tensor>& sources,
                   const std::vector<size_t>& members, const int64_t* n_pointer, int64_t n_value,
                   Rule rule, cudaStream_t stream) {
  constexpr int64_t kMaxBlocks = 0x7fffffff;
  Table table;
  table.count = 0;
  int64_t blocks = 0;
  for (const size_t i : members) {
    const int64_t numel = averages[i].numel();
    const int64_t needed = (numel + Traits::kChunk - 1) / Traits::kChunk;
    STD_TORCH_CHECK(needed <= kMaxBlocks, "average_.cuda: pair ", i,
                    " has too many elements: ", numel);
    if (table.count == Table::kCapacity || blocks + needed > kMaxBlocks) {
      launch<Traits>(table, blocks, n_pointer, n_value, rule, stream);
      table.count = 0;
      blocks = 0;
    }
    table.average[table.count] = averages[i].mutable_data_ptr();
    table.source[table.count] = sources[i].const_data_ptr();
    table.numel[table.count] = numel;
    table.first_block[table.count] = static_cast<uint32_t>(blocks);
    ++table.count;
    blocks += needed;
  }
  launch<Traits>(table, blocks, n_pointer, n_value, rule, stream);
}

void average_cuda(std::vector<Tensor> averages, std::vector<Tensor> sources, Tensor n_averaged,
                  std::optional<double> decay) {
  check_average_arguments(averages, sources, n_averaged);
  if (averages.empty()) return;
  const auto device = averages[0].get_device_index();
  for (size_t i = 0; i < averages.size(); ++i) {
    STD_TORCH_CHECK(averages[i].is_cuda() && sources[i].is_cuda() &&
                        averages[i].get_device_index() == device &&
                        sources[i].get_device_index() == device,
                    "average_.cuda: pair ", i, " is not on cuda:", static_cast<int>(device));
  }
  // A counter on the device is read by the kernel: no synchronization, and right on graph replay.
  const int64_t* n_pointer = nullptr;
  int64_t n_value = 0;
  if (n_averaged.is_cpu()) {
    n_value = *static_cast<const int64_t*>(n_averaged.const_data_ptr());
  } else {
    STD_TORCH_CHECK(n_averaged.get_device_index() == device,
                    "average_.cuda: n_averaged is on another device");
    n_pointer = static_cast<const int64_t*>(n_averaged.const_data_ptr());
  }

  // Launches go to the current device's context, which need not be the tensors' device.
  const torch::stable::accelerator::DeviceGuard guard(device);
  const cudaStream_t stream = current_stream(device);
  const Rule rule(decay);

  std::vector<size_t> pending;
  for (size_t i = 0; i < averages.size(); ++i) {
    if (averages[i].numel() > 0) pending.push_back(i);
  }
  while (!pending.empty()) {
    const ScalarType average_type = averages[pending[0]].scalar_type();
    const ScalarType source_type = sources[pending[0]].scalar_type();
    const auto rest = std::stable_partition(pending.begin(), pending.end(), [&](size_t i) {
      return averages[i].scalar_type() == average_type && sources[i].scalar_type() == source_type;
    });
    const std::vector<size_t> members(pending.begin(), rest);
    dispatch_floating("average_", average_type, [&](auto average) {
      dispatch_floating("average_", source_type, [&](auto source) {
        using Traits = AverageTraits<decltype(average), decltype(source)>;
        average_pairs<Traits>(averages, sources, members, n_pointer, n_value, rule, stream);
      });
    });
    pending.erase(pending.begin(), rest);
  }
}

}  // namespace
}  // namespace swa_fast

STABLE_TORCH_LIBRARY_IMPL(swa_fast, CUDA, m) {
  m.impl("average_.cuda", TORCH_BOX(&swa_fast::average_cuda));
}
