// CUDA kernels of swa_fast::update_ and swa_fast::exchange_.
//
// Formula: update.h. Layout: every run is consecutive in the source and in each average; a block
// serves one run, of a few thousand elements. Bytes per element: sizeof(source) + 2 k
// sizeof(average), 4 + 8 k for k averages in fp32, plus 32 + 8 k for each run's entry and the
// counters; bound by memory bandwidth. The first update, a copy, does not read the averages.
//
// One launch serves any number of tensors of any types and the counters too: the last block to
// finish advances them, when every other block has read them. Nothing depends on the order in which
// blocks run, except which of them is last.

#include <cuda_runtime.h>

#include <algorithm>

#include "packed.cuh"
#include "update.h"

namespace swa_fast {
namespace {

constexpr int kThreads = 256;

struct Arguments {
  const Run* table;
  int64_t* state;
  int64_t seed;
  const char* bfloat16_base;
  int rows;
  bool guard;
  WeightRule rules[kMaxAverages];
};
static_assert(sizeof(Arguments) <= 4096, "kernel arguments");

// What the threads of a block have in common.
struct Shared {
  Run run;
  double weight[kMaxAverages];
  int64_t n[kMaxAverages];
  bool skip;
};

template <typename Average_, typename Source_, bool kStochastic_>
struct UpdateTraits {
  using Average = Average_;
  using Source = Source_;
  static constexpr bool kStochastic = kStochastic_;
  using Math = opmath_t<Average, Source>;
  // The wider type fills 16 bytes, so neighbouring threads touch neighbouring bytes in both arrays.
  static constexpr int kPack =
      kPackBytes / (sizeof(Average) > sizeof(Source) ? sizeof(Average) : sizeof(Source));
  // Packs in flight per thread: as many as registers hold without spilling.
  static constexpr int kUnroll = kStochastic ? 1 : kPack == 4 ? 4 : 2;
  static constexpr int64_t kStep = int64_t{kThreads} * kPack * kUnroll;
  using AveragePack = Pack<Average, kPack>;
  using SourcePack = Pack<Source, kPack>;
  static_assert(sizeof(AveragePack) == kPackBytes || sizeof(SourcePack) == kPackBytes);
  static_assert(kPack <= 8 && 8 % kPack == 0, "a pack lies within one Philox group");
};

// base + c (b - a) in the form whose error is smaller on each side of w = 1/2, as torch.lerp.
// Fused by name and not left to the compiler, so that all backends round alike.
__device__ __forceinline__ float blend(float a, float b, float w) {
  return w < 0.5f ? fmaf(w, b - a, a) : fmaf(w - 1.0f, b - a, b);
}
__device__ __forceinline__ double blend(double a, double b, double w) {
  return w < 0.5 ? fma(w, b - a, a) : fma(w - 1.0, b - a, b);
}

// One element's new average. `place` counts the average's elements.
template <typename Traits>
struct Blender {
  using Average = typename Traits::Average;
  using Source = typename Traits::Source;
  using Math = typename Traits::Math;
  Math weight;
  bool copy;
  int64_t seed, n;
  int row;

  // kCount elements of one Philox group, in place.
  template <int kCount>
  __device__ __forceinline__ void operator()(Average* average, const Source* source,
                                             int64_t place) const {
    if constexpr (Traits::kStochastic) {
      const Philox random(seed, static_cast<uint64_t>(place) / 8, n, row);
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        // Shifts by a variable amount, because an array indexed by one would live in local memory.
        const int at = kCount == 8 ? i : static_cast<int>(place % 8) + i;
        const uint32_t low = at & 2 ? random.word[1] : random.word[0];
        const uint32_t high = at & 2 ? random.word[3] : random.word[2];
        const uint32_t bits = ((at & 4 ? high : low) >> (16 * (at & 1))) & 0xffffu;
        const float b = static_cast<float>(source[i]);
        const float x = copy ? b : blend(static_cast<float>(average[i]), b, weight);
        average[i] = round_stochastically(x, bits);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const Math b = static_cast<Math>(source[i]);
        average[i] =
            static_cast<Average>(copy ? b : blend(static_cast<Math>(average[i]), b, weight));
      }
    }
  }
};

template <typename Average, typename Source, bool kStochastic>
__device__ __forceinline__ void update_run(const Arguments& arguments, const Shared& shared) {
  using Traits = UpdateTraits<Average, Source, kStochastic>;
  using AveragePack = typename Traits::AveragePack;
  using SourcePack = typename Traits::SourcePack;
  constexpr int kPack = Traits::kPack;
  constexpr int kUnroll = Traits::kUnroll;
  const Run& run = shared.run;
  const int64_t count = run.count();
  const Source* source = to_global(static_cast<const Source*>(run.source));
  const int64_t first =
      kStochastic ? (run.average - arguments.bfloat16_base) / static_cast<int64_t>(sizeof(Average))
                  : 0;
  // Runs start at multiples of 16 bytes in the averages; a source may lie anywhere.
  const bool aligned = is_aligned_for<SourcePack>(source);

  // Loops that are not worth registers stay loops.
#pragma unroll 1
  for (int64_t begin = 0; begin < count; begin += Traits::kStep) {
    SourcePack b[kUnroll];
    if (aligned) {
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int64_t i = begin + (int64_t{u} * kThreads + threadIdx.x) * kPack;
        if (i + kPack <= count) b[u] = *reinterpret_cast<const SourcePack*>(source + i);
      }
    }
#pragma unroll 1
    for (int row = 0; row < arguments.rows; ++row) {
      const double w = run.copied() ? 1.0 : shared.weight[row];
      if (w == 0.0) continue;
      Average* average = to_global(reinterpret_cast<Average*>(run.average + row * run.row_bytes));
      const Blender<Traits> blender{static_cast<typename Traits::Math>(w), w == 1.0, arguments.seed,
                                    shared.n[row], row};
      if (aligned) {
        AveragePack a[kUnroll];
        if (w != 1.0) {
#pragma unroll
          for (int u = 0; u < kUnroll; ++u) {
            const int64_t i = begin + (int64_t{u} * kThreads + threadIdx.x) * kPack;
            if (i + kPack <= count) a[u] = *reinterpret_cast<const AveragePack*>(average + i);
          }
        }
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
          const int64_t i = begin + (int64_t{u} * kThreads + threadIdx.x) * kPack;
          if (i + kPack <= count) {
            blender.template operator()<kPack>(a[u].element, b[u].element, first + i);
            *reinterpret_cast<AveragePack*>(average + i) = a[u];
          } else {
#pragma unroll 1
            for (int64_t j = i; j < count; ++j) {
              blender.template operator()<1>(average + j, source + j, first + j);
            }
          }
        }
      } else {
        const int64_t end = begin + Traits::kStep < count ? begin + Traits::kStep : count;
#pragma unroll 1
        for (int64_t j = begin + threadIdx.x; j < end; j += kThreads) {
          blender.template operator()<1>(average + j, source + j, first + j);
        }
      }
    }
  }
}

// Calls f for the 16-byte packs and then for the single bytes of a run of bytes.
template <typename PackFunction, typename ByteFunction>
__device__ __forceinline__ void for_bytes(char* average, const char* source, int64_t count,
                                          const PackFunction& pack, const ByteFunction& byte) {
  using BytePack = Pack<uint64_t, 2>;
  average = to_global(average);
  source = to_global(source);
  int64_t done = 0;
  if (is_aligned_for<BytePack>(source)) {
    done = count - count % kPackBytes;
    for (int64_t i = int64_t{threadIdx.x} * kPackBytes; i < done; i += kThreads * kPackBytes) {
      pack(reinterpret_cast<BytePack*>(average + i),
           reinterpret_cast<BytePack*>(const_cast<char*>(source) + i));
    }
  }
  for (int64_t i = done + threadIdx.x; i < count; i += kThreads) {
    byte(average + i, const_cast<char*>(source) + i);
  }
}

template <typename F>
__device__ __forceinline__ void dispatch_code(int code, const F& f) {
  switch (code) {
    case kFloat:
      return f(float{});
    case kDouble:
      return f(double{});
    case kBFloat16:
      return f(BFloat16{});
    case kHalf:
      return f(Half{});
  }
}

// Random numbers have a kernel of their own, because they need more registers.
template <bool kStochastic>
__global__ void __launch_bounds__(kThreads)
    update_kernel(const __grid_constant__ Arguments arguments) {
  __shared__ Shared shared;
  int64_t* counters = arguments.state + arguments.rows;
  if (threadIdx.x < 32) {
    if (threadIdx.x < arguments.rows) {
      const int64_t n = arguments.state[threadIdx.x];
      shared.n[threadIdx.x] = n;
      shared.weight[threadIdx.x] = arguments.rules[threadIdx.x].weight(n);
    }
  } else if (threadIdx.x < 36) {
    // One entry is one memory sector, read by four neighbouring threads.
    reinterpret_cast<int64_t*>(&shared.run)[threadIdx.x - 32] =
        reinterpret_cast<const int64_t*>(arguments.table + blockIdx.x)[threadIdx.x - 32];
  } else if (threadIdx.x == 64) {
    shared.skip = arguments.guard && counters[kNonFinite] != 0;
  }
  __syncthreads();

  const Run& run = shared.run;
  if (shared.skip) {
    // Nothing is written.
  } else if (run.average_type() == kBytes) {
    for (int row = 0; row < arguments.rows; ++row) {
      for_bytes(
          run.average + row * run.row_bytes, static_cast<const char*>(run.source), run.count(),
          [](auto* a, auto* b) { *a = *b; }, [](char* a, char* b) { *a = *b; });
    }
  } else {
    dispatch_code(run.average_type(), [&](auto average) {
      dispatch_code(run.source_type(), [&](auto source) {
        using Average = decltype(average);
        using Source = decltype(source);
        if constexpr (kStochastic && std::is_same_v<Average, BFloat16> &&
                      !std::is_same_v<Source, double>) {
          if (!run.copied()) {
            return update_run<Average, Source, true>(arguments, shared);
          }
        }
        update_run<Average, Source, false>(arguments, shared);
      });
    });
  }

  // This block read the counters before the barrier above, so it may draw its ticket.
  if (threadIdx.x == 0) {
    __threadfence();
    const unsigned long long drawn =
        atomicAdd(reinterpret_cast<unsigned long long*>(counters + kTicket), 1ull);
    if (drawn == gridDim.x - 1) {
      __threadfence();
      counters[kTicket] = 0;
      if (shared.skip) {
        counters[kSkipped] += 1;
        counters[kNonFinite] = 0;
      } else {
        for (int row = 0; row < arguments.rows; ++row) arguments.state[row] += 1;
      }
    }
  }
}

template <typename T>
__device__ __forceinline__ bool any_nonfinite(const Run& run) {
  using Bits = typename Exponent<T>::Bits;
  constexpr int kPack = kPackBytes / sizeof(T);
  using BitsPack = Pack<Bits, kPack>;
  const Bits* bits = to_global(static_cast<const Bits*>(run.source));
  const int64_t count = run.count();
  bool found = false;
  int64_t done = 0;
  if (is_aligned_for<BitsPack>(bits)) {
    done = count - count % kPack;
    for (int64_t i = int64_t{threadIdx.x} * kPack; i < done; i += kThreads * kPack) {
      const BitsPack pack = *reinterpret_cast<const BitsPack*>(bits + i);
#pragma unroll
      for (int k = 0; k < kPack; ++k) {
        found |= (pack.element[k] & Exponent<T>::kMask) == Exponent<T>::kMask;
      }
    }
  }
  for (int64_t i = done + threadIdx.x; i < count; i += kThreads) {
    found |= (bits[i] & Exponent<T>::kMask) == Exponent<T>::kMask;
  }
  return found;
}

// Sets counters[kNonFinite] if a source holds an infinity or NaN. Reads every source once.
__global__ void __launch_bounds__(kThreads) guard_kernel(const Run* table, int64_t* counters) {
  const Run run = table[blockIdx.x];
  if (run.copied()) return;
  bool found = false;
  dispatch_code(run.source_type(),
                [&](auto source) { found = any_nonfinite<decltype(source)>(run); });
  if (found) atomicExch(reinterpret_cast<unsigned long long*>(counters + kNonFinite), 1ull);
}

__global__ void __launch_bounds__(kThreads) exchange_kernel(const Run* table, int64_t row) {
  const Run run = table[blockIdx.x];
  const int code = run.source_type();
  const int64_t size = code == kDouble ? 8 : code == kFloat ? 4 : code == kBytes ? 1 : 2;
  const auto exchange = [](auto* a, auto* b) {
    const auto kept = *a;
    *a = *b;
    *b = kept;
  };
  for_bytes(run.average + row * run.row_bytes, static_cast<const char*>(run.source),
            run.count() * size, exchange, exchange);
}

// The current device's guard, the stream and the number of blocks of a launch over `table`.
struct Launch {
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream;
  const Run* table;
  int64_t runs;

  explicit Launch(const Tensor& table_)
      : guard(table_.get_device_index()),
        stream(current_stream(table_.get_device_index())),
        table(static_cast<const Run*>(table_.const_data_ptr())),
        runs(table_.numel() / 4) {
    STD_TORCH_CHECK(table_.is_cuda(), "update_.cuda: table must be on a CUDA device");
    STD_TORCH_CHECK(0 < runs && runs <= 0x7fffffff,
                    "update_.cuda: expected 1 to 2^31 - 1 runs, found ", runs);
  }

  unsigned blocks() const { return static_cast<unsigned>(runs); }

  static void check() {
    const cudaError_t status = cudaGetLastError();
    STD_TORCH_CHECK(status == cudaSuccess,
                    "update_.cuda: launch failed: ", cudaGetErrorString(status));
  }
};

void update_cuda(std::vector<Tensor> averages, Tensor state, Tensor rules, Tensor table,
                 std::vector<Tensor> /*sources*/, int64_t /*pairs*/, std::optional<int64_t> seed,
                 bool guard) {
  const UpdateArguments checked = check_update_arguments(averages, state, rules, table);
  const Launch launch(table);
  STD_TORCH_CHECK(averages[0].is_cuda() && state.is_cuda() &&
                      averages[0].get_device_index() == table.get_device_index() &&
                      state.get_device_index() == table.get_device_index(),
                  "update_.cuda: averages, state and table must be on one CUDA device");
  Arguments arguments{};
  arguments.table = launch.table;
  arguments.state = static_cast<int64_t*>(state.mutable_data_ptr());
  arguments.seed = seed.value_or(0);
  arguments.bfloat16_base = checked.bfloat16_base;
  arguments.rows = checked.rows;
  arguments.guard = guard;
  std::copy_n(static_cast<const WeightRule*>(rules.const_data_ptr()), arguments.rows,
              arguments.rules);
  if (guard) {
    guard_kernel<<<launch.blocks(), kThreads, 0, launch.stream>>>(launch.table,
                                                                  arguments.state + arguments.rows);
    Launch::check();
  }
  const auto kernel = seed.has_value() ? update_kernel<true> : update_kernel<false>;
  kernel<<<launch.blocks(), kThreads, 0, launch.stream>>>(arguments);
  Launch::check();
}

void exchange_cuda(std::vector<Tensor> averages, std::vector<Tensor> /*sources*/, Tensor table,
                   int64_t row) {
  STD_TORCH_CHECK(!averages.empty() && 0 <= row && row < averages[0].size(0),
                  "exchange_.cuda: no row ", row);
  if (table.numel() == 0) return;
  const Launch launch(table);
  exchange_kernel<<<launch.blocks(), kThreads, 0, launch.stream>>>(launch.table, row);
  Launch::check();
}

}  // namespace
}  // namespace swa_fast

STABLE_TORCH_LIBRARY_IMPL(swa_fast, CUDA, m) {
  m.impl("update_.cuda", TORCH_BOX(&swa_fast::update_cuda));
  m.impl("exchange_.cuda", TORCH_BOX(&swa_fast::exchange_cuda));
}
