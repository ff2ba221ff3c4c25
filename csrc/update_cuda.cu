// CUDA kernels of swa_fast::update_ and swa_fast::exchange_.
//
// Formula: update.h. Layout: every run is consecutive in the source and in each average, and has
// less than 2^31 elements. Bytes per element: sizeof(source) + 2 k sizeof(average), 4 + 8 k for k
// averages in fp32, plus 32 + 8 k for each run's entry and the counters; bound by memory bandwidth.
// The first update, a copy, does not read the averages.
//
// A long run has a block of its own. The short runs, which come last in the table, have a warp
// each: half of a network's tensors hold no more than a warp reads at once. In both cases a warp is
// what moves memory: it issues all loads of a step, eight 16-byte ones a thread for fp32, before it
// needs the first, and four blocks fit on a multiprocessor, so 128 KB of it are on their way.
//
// One launch serves any number of tensors of any types and the counters too. A block draws a ticket
// as soon as it has read them, and the one that drew the last ticket advances them. Nothing depends
// on the order in which blocks run, except which of them is last.

#include <cuda_runtime.h>

#include <algorithm>

#include "packed.cuh"
#include "update.h"

namespace swa_fast {
namespace {

constexpr int kWarp = 32;
constexpr int kWarps = 8;
constexpr int kThreads = kWarp * kWarps;
// Blocks on a multiprocessor: what is on its way to memory from 1024 threads hides its latency.
constexpr int kBlocks = 4;

struct Arguments {
  const Run* table;
  int64_t* state;
  int64_t* counters;  // of the state, behind the averages'
  int64_t seed;
  const char* bfloat16_base;
  int long_runs, runs;
  int rows;
  bool guard;
  WeightRule rules[kMaxAverages];
};
static_assert(sizeof(Arguments) <= 4096, "kernel arguments");

// The thread's number. Read anew at each use, because the compiler would keep what follows from it
// in registers across all the code for other types.
__device__ __forceinline__ int thread_id() {
  int id;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(id));
  return id;
}
__device__ __forceinline__ int lane_id() { return thread_id() % kWarp; }

// Which runs a block serves: one with all its warps, or one with each.
struct Share {
  int long_runs, all_runs;

  __device__ __forceinline__ bool alone() const { return static_cast<int>(blockIdx.x) < long_runs; }
  __device__ __forceinline__ int first() const {
    const int block = static_cast<int>(blockIdx.x);
    return alone() ? block : long_runs + (block - long_runs) * kWarps;
  }
  __device__ __forceinline__ int runs() const {
    return alone() ? 1 : min(kWarps, all_runs - first());
  }
  // This warp's run, counted from the first, and which of how many parts of it.
  __device__ __forceinline__ int run() const { return alone() ? 0 : thread_id() / kWarp; }
  __device__ __forceinline__ int part() const { return alone() ? thread_id() / kWarp : 0; }
  __device__ __forceinline__ int parts() const { return alone() ? kWarps : 1; }
};

// What the threads of a block have in common.
struct Shared {
  Run run[kWarps];
  double weight[kMaxAverages];
  int64_t n[kMaxAverages];
  bool skip;
};

// kPack_ elements are one access. The first choice: the wider type fills 16 bytes, so neighbouring
// threads touch neighbouring bytes in both arrays. Sources that are not aligned for that, and what
// remains at a run's end, take fewer.
template <typename Average_, typename Source_, bool kStochastic_, int kPack_>
struct UpdateTraits {
  using Average = Average_;
  using Source = Source_;
  static constexpr bool kStochastic = kStochastic_;
  using Math = opmath_t<Average, Source>;
  static constexpr int kPack = kPack_;
  static constexpr int kWider = sizeof(Average) > sizeof(Source) ? sizeof(Average) : sizeof(Source);
  // Packs in flight per thread and array: as many as 64 registers hold.
  static constexpr int kUnroll = kPack * kWider == kPackBytes ? (kStochastic ? 2 : 4)
                                 : kWider == 8 || kStochastic ? 4
                                                              : 8;
  static constexpr int kStride = kWarp * kPack;    // elements of a warp's access
  static constexpr int kStep = kStride * kUnroll;  // of all that it has in flight
  using AveragePack = Pack<Average, kPack>;
  using SourcePack = Pack<Source, kPack>;
  static_assert(kPack * kWider <= kPackBytes);
  static_assert(kPack <= 8 && 8 % kPack == 0, "a pack lies within one Philox group");
};

// One element's new average. `place` counts the average's elements.
template <typename Traits>
struct Blender {
  using Average = typename Traits::Average;
  using Source = typename Traits::Source;
  using Math = typename Traits::Math;
  static constexpr int kPack = Traits::kPack;
  Math factor;
  bool copy, near;
  int64_t seed, n;
  int row;

  __device__ __forceinline__ Blender(double w, int64_t seed_, int64_t n_, int row_)
      : seed(seed_), n(n_), row(row_) {
    const Math weight = static_cast<Math>(w);
    copy = w == 1.0;
    near = weight < Math(0.5);
    factor = near ? weight : weight - Math(1);
  }

  // base + c (b - a) in the form whose error is smaller on each side of w = 1/2, as torch.lerp.
  // Fused by name and not left to the compiler, so that all backends round alike. Selected, because
  // a branch for each element costs more than the arithmetic.
  __device__ __forceinline__ Math blend(Math a, Math b) const {
    return copy ? b : fma(factor, b - a, near ? a : b);
  }

  // A pack of one Philox group, in place.
  __device__ __forceinline__ void operator()(Average* average, const Source* source,
                                             int64_t place) const {
    if constexpr (Traits::kStochastic) {
      const Philox random(seed, static_cast<uint64_t>(place) / 8, n, row);
#pragma unroll
      for (int i = 0; i < kPack; ++i) {
        // Shifts by a variable amount, because an array indexed by one would live in local memory.
        const int at = kPack == 8 ? i : static_cast<int>(place % 8) + i;
        const uint32_t low = at & 2 ? random.word[1] : random.word[0];
        const uint32_t high = at & 2 ? random.word[3] : random.word[2];
        const uint32_t bits = ((at & 4 ? high : low) >> (16 * (at & 1))) & 0xffffu;
        const float x = blend(static_cast<float>(average[i]), static_cast<float>(source[i]));
        average[i] = round_stochastically(x, bits);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kPack; ++i) {
        average[i] = static_cast<Average>(
            blend(static_cast<Math>(average[i]), static_cast<Math>(source[i])));
      }
    }
  }
};

// Elements [begin, end) of a run, whole packs, or of them what is this warp's part.
template <typename Traits>
__device__ __forceinline__ void update_part(const Arguments& arguments, const Shared& shared,
                                            const Run& run, int begin, int end, int part,
                                            int parts) {
  using Average = typename Traits::Average;
  using Source = typename Traits::Source;
  using AveragePack = typename Traits::AveragePack;
  using SourcePack = typename Traits::SourcePack;
  constexpr int kStride = Traits::kStride;
  constexpr int kUnroll = Traits::kUnroll;
  // Loops that are not worth registers stay loops.
#pragma unroll 1
  for (int at = begin + part * Traits::kStep + lane_id() * Traits::kPack; at < end;
       at += parts * Traits::kStep) {
    const int left = end - at;
    const Source* source = to_global(static_cast<const Source*>(run.source)) + at;
    // Not because they are read: values that only a condition defines are kept from step to step.
    Memory<SourcePack> b[kUnroll] = {};
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (u * kStride < left) b[u].load(source + u * kStride);
    }
#pragma unroll 1
    for (int row = 0; row < arguments.rows; ++row) {
      const double w = run.copied() ? 1.0 : shared.weight[row];
      if (w == 0.0) continue;
      Average* average =
          to_global(reinterpret_cast<Average*>(run.average + row * run.row_bytes)) + at;
      Memory<AveragePack> a[kUnroll];
      if (w != 1.0) {
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
          if (u * kStride < left) {
            a[u].load(average + u * kStride);
          }
        }
      }
      const Blender<Traits> blender(w, arguments.seed, shared.n[row], row);
      // Counted from the first of the bfloat16 averages.
      const int64_t place =
          Traits::kStochastic ? (run.average - arguments.bfloat16_base) / 2 + at : 0;
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        if (u * kStride < left) {
          AveragePack updated = a[u].unpacked();
          blender(updated.element, b[u].unpacked().element, place + u * kStride);
          *reinterpret_cast<AveragePack*>(average + u * kStride) = updated;
        }
      }
    }
  }
}

template <typename Average, typename Source, bool kStochastic>
__device__ __forceinline__ void update_run(const Arguments& arguments, const Shared& shared,
                                           const Run& run, const Share& share) {
  using Single = UpdateTraits<Average, Source, kStochastic, 1>;
  constexpr int kPack = kPackBytes / Single::kWider;
  using Whole = UpdateTraits<Average, Source, kStochastic, kPack>;
  constexpr int kWord = sizeof(Source) < 4 ? 4 / sizeof(Source) : 1;
  const int count = static_cast<int>(run.count());
  const char* average = run.average;
  const auto fits = [&](auto traits) {
    using Traits = decltype(traits);
    return is_aligned_for<typename Traits::SourcePack>(run.source) &&
           is_aligned_for<typename Traits::AveragePack>(average);
  };
  int packed = 0;
  if (count % kPack != 0 && count <= Single::kStep) {
    // All of it in one step of single elements: as packs and a rest it would wait twice.
  } else if (fits(Whole{})) {
    packed = count / kPack * kPack;
    update_part<Whole>(arguments, shared, run, 0, packed, share.part(), share.parts());
  } else if constexpr (kWord > 1 && kWord < kPack) {
    using Words = UpdateTraits<Average, Source, kStochastic, kWord>;
    if (fits(Words{})) {
      packed = count / kWord * kWord;
      update_part<Words>(arguments, shared, run, 0, packed, share.part(), share.parts());
    }
  }
  // The last warp first: it is the one without packs where a run does not fill its block.
  update_part<Single>(arguments, shared, run, packed, count, share.parts() - 1 - share.part(),
                      share.parts());
}

// Calls f with the widest unit of memory that divides `address`, 16 bytes at most.
template <typename F>
__device__ __forceinline__ void dispatch_unit(uint64_t address, const F& f) {
  if (address % 16 == 0) return f(Pack<uint64_t, 2>{});
  if (address % 8 == 0) return f(uint64_t{});
  if (address % 4 == 0) return f(uint32_t{});
  if (address % 2 == 0) return f(uint16_t{});
  return f(uint8_t{});
}

__device__ __forceinline__ uint64_t address_of(const void* pointer) {
  return reinterpret_cast<uint64_t>(pointer);
}

// A run whose elements are bytes: read once, and written into every average.
__device__ __forceinline__ void copy_run(const Run& run, int rows, int part, int parts) {
  const int count = static_cast<int>(run.count());
  const uint64_t places = address_of(run.source) | address_of(run.average) | run.row_bytes | count;
  dispatch_unit(places, [&](auto unit) {
    using Unit = decltype(unit);
    constexpr int kUnroll = 4;
    const int units = count / static_cast<int>(sizeof(Unit));
    const Unit* source = to_global(static_cast<const Unit*>(run.source));
#pragma unroll 1
    for (int i = part * kWarp * kUnroll + lane_id(); i < units; i += parts * kWarp * kUnroll) {
      Unit b[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        if (i + u * kWarp < units) b[u] = source[i + u * kWarp];
      }
#pragma unroll 1
      for (int row = 0; row < rows; ++row) {
        Unit* average = to_global(reinterpret_cast<Unit*>(run.average + row * run.row_bytes));
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
          if (i + u * kWarp < units) average[i + u * kWarp] = b[u];
        }
      }
    }
  });
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

// Takes one of the tickets 0, 1, 2, ... What this thread has read, and by way of a barrier what its
// block has, is read before that: who drew the last ticket may overwrite it. The lower half of an
// int64.
__device__ __forceinline__ unsigned draw_ticket(int64_t* ticket) {
  unsigned drawn;
  asm volatile("atom.add.release.gpu.global.u32 %0, [%1], 1;"
               : "=r"(drawn)
               : "l"(ticket)
               : "memory");
  return drawn;
}

// Random numbers have a kernel of their own, because they need more registers.
template <bool kStochastic>
__global__ void __launch_bounds__(kThreads, kBlocks)
    update_kernel(const __grid_constant__ Arguments arguments) {
  __shared__ Shared shared;
  const Share share{arguments.long_runs, arguments.runs};
  if (threadIdx.x < kWarp) {
    if (threadIdx.x < arguments.rows) {
      const int64_t n = arguments.state[threadIdx.x];
      shared.n[threadIdx.x] = n;
      shared.weight[threadIdx.x] = arguments.rules[threadIdx.x].weight(n);
    }
  } else if (threadIdx.x < 2 * kWarp) {
    // One entry is one memory sector, read by four neighbouring threads.
    static_assert(kWarps * sizeof(Run) == kWarp * sizeof(int64_t));
    if (lane_id() < 4 * share.runs()) {
      reinterpret_cast<int64_t*>(shared.run)[lane_id()] =
          reinterpret_cast<const int64_t*>(arguments.table + share.first())[lane_id()];
    }
  } else if (threadIdx.x == 2 * kWarp) {
    shared.skip = arguments.guard && arguments.counters[kNonFinite] != 0;
  }
  __syncthreads();

  // The block has read all counters. Nothing waits for the ticket's number before the memory that
  // is on its way meanwhile.
  unsigned drawn = ~0u;
  if (threadIdx.x == 0) drawn = draw_ticket(arguments.counters + kTicket);

  if (!shared.skip && share.run() < share.runs()) {
    const Run& run = shared.run[share.run()];
    if (run.average_type() == kBytes) {
      copy_run(run, arguments.rows, share.part(), share.parts());
    } else {
      dispatch_code(run.average_type(), [&](auto average) {
        dispatch_code(run.source_type(), [&](auto source) {
          using Average = decltype(average);
          using Source = decltype(source);
          if constexpr (kStochastic && std::is_same_v<Average, BFloat16> &&
                        !std::is_same_v<Source, double>) {
            if (!run.copied()) {
              return update_run<Average, Source, true>(arguments, shared, run, share);
            }
          }
          update_run<Average, Source, false>(arguments, shared, run, share);
        });
      });
    }
  }

  if (drawn == gridDim.x - 1) {
    // The other half of the tickets' order. It waits for this block's memory, too, which the end of
    // the kernel would wait for anyway.
    __threadfence();
    arguments.counters[kTicket] = 0;
    if (shared.skip) {
      arguments.counters[kSkipped] += 1;
      arguments.counters[kNonFinite] = 0;
    } else {
      for (int row = 0; row < arguments.rows; ++row) arguments.state[row] += 1;
    }
  }
}

template <typename T>
__device__ __forceinline__ bool any_nonfinite(const Run& run, int part, int parts) {
  using Bits = typename Exponent<T>::Bits;
  const int count = static_cast<int>(run.count());
  bool found = false;
  // What remains from `begin` on; returns where packs of this size end.
  const auto look = [&](auto pack, int begin, int warp) {
    using BitsPack = decltype(pack);
    constexpr int kPack = sizeof(BitsPack) / sizeof(Bits);
    constexpr int kUnroll = kPack == 1 ? 8 : 4;
    const int end = count - (count - begin) % kPack;
    const Bits* bits = to_global(static_cast<const Bits*>(run.source));
#pragma unroll 1
    for (int at = begin + (warp * kUnroll * kWarp + lane_id()) * kPack; at < end;
         at += parts * kUnroll * kWarp * kPack) {
      BitsPack b[kUnroll] = {};
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        if (u * kWarp * kPack < end - at) {
          b[u] = *reinterpret_cast<const BitsPack*>(bits + at + u * kWarp * kPack);
        }
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
        for (int k = 0; k < kPack; ++k) {
          found |= (b[u].element[k] & Exponent<T>::kMask) == Exponent<T>::kMask;
        }
      }
    }
    return end;
  };
  using Whole = Pack<Bits, kPackBytes / sizeof(Bits)>;
  int packed = 0;
  if (is_aligned_for<Whole>(run.source)) packed = look(Whole{}, 0, part);
  look(Pack<Bits, 1>{}, packed, parts - 1 - part);
  return found;
}

// Sets counters[kNonFinite] if a source holds an infinity or NaN. Reads every source once.
__global__ void __launch_bounds__(kThreads)
    guard_kernel(const Run* table, int long_runs, int runs, int64_t* counters) {
  const Share share{long_runs, runs};
  if (share.run() >= share.runs()) return;
  const Run run = table[share.first() + share.run()];
  if (run.copied()) return;
  bool found = false;
  dispatch_code(run.source_type(), [&](auto source) {
    found = any_nonfinite<decltype(source)>(run, share.part(), share.parts());
  });
  if (__any_sync(~0u, found) && lane_id() == 0) {
    atomicExch(reinterpret_cast<unsigned long long*>(counters + kNonFinite), 1ull);
  }
}

__global__ void __launch_bounds__(kThreads)
    exchange_kernel(const Run* table, int long_runs, int runs, int64_t row) {
  const Share share{long_runs, runs};
  if (share.run() >= share.runs()) return;
  const Run run = table[share.first() + share.run()];
  const int part = share.part(), parts = share.parts();
  const int code = run.source_type();
  const int size = code == kDouble ? 8 : code == kFloat ? 4 : code == kBytes ? 1 : 2;
  const int bytes = static_cast<int>(run.count()) * size;
  char* average = run.average + row * run.row_bytes;
  dispatch_unit(address_of(run.source) | address_of(average) | bytes, [&](auto unit) {
    using Unit = decltype(unit);
    constexpr int kUnroll = 4;
    const int units = bytes / static_cast<int>(sizeof(Unit));
    Unit* left = to_global(reinterpret_cast<Unit*>(average));
    Unit* right = to_global(static_cast<Unit*>(const_cast<void*>(run.source)));
#pragma unroll 1
    for (int i = part * kWarp * kUnroll + lane_id(); i < units; i += parts * kWarp * kUnroll) {
      Unit a[kUnroll], b[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        if (i + u * kWarp < units) {
          a[u] = left[i + u * kWarp];
          b[u] = right[i + u * kWarp];
        }
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        if (i + u * kWarp < units) {
          left[i + u * kWarp] = b[u];
          right[i + u * kWarp] = a[u];
        }
      }
    }
  });
}

// The current device's guard, the stream and the number of blocks of a launch over `table`.
struct Launch {
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream;
  const Run* table;
  int64_t runs, short_runs;

  explicit Launch(const Tensor& table_, int64_t short_runs_)
      : guard(table_.get_device_index()),
        stream(current_stream(table_.get_device_index())),
        table(static_cast<const Run*>(table_.const_data_ptr())),
        runs(table_.numel() / 4),
        short_runs(short_runs_) {
    STD_TORCH_CHECK(table_.is_cuda(), "update_.cuda: table must be on a CUDA device");
    STD_TORCH_CHECK(0 < runs && runs <= 0x7fffffff - kWarps,
                    "update_.cuda: expected 1 to 2^31 - 9 runs, found ", runs);
    STD_TORCH_CHECK(0 <= short_runs && short_runs <= runs, "update_.cuda: expected 0 to ", runs,
                    " short runs, found ", short_runs);
  }

  int long_runs() const { return static_cast<int>(runs - short_runs); }

  unsigned blocks() const {
    return static_cast<unsigned>(long_runs() + (short_runs + kWarps - 1) / kWarps);
  }

  static void check() {
    const cudaError_t status = cudaGetLastError();
    STD_TORCH_CHECK(status == cudaSuccess,
                    "update_.cuda: launch failed: ", cudaGetErrorString(status));
  }
};

void update_cuda(std::vector<Tensor> averages, Tensor state, Tensor rules, Tensor table,
                 std::vector<Tensor> /*sources*/, int64_t /*pairs*/, std::optional<int64_t> seed,
                 bool guard, int64_t short_runs) {
  const UpdateArguments checked = check_update_arguments(averages, state, rules, table);
  const Launch launch(table, short_runs);
  STD_TORCH_CHECK(averages[0].is_cuda() && state.is_cuda() &&
                      averages[0].get_device_index() == table.get_device_index() &&
                      state.get_device_index() == table.get_device_index(),
                  "update_.cuda: averages, state and table must be on one CUDA device");
  Arguments arguments{};
  arguments.table = launch.table;
  arguments.state = static_cast<int64_t*>(state.mutable_data_ptr());
  arguments.counters = arguments.state + checked.rows;
  arguments.seed = seed.value_or(0);
  arguments.bfloat16_base = checked.bfloat16_base;
  arguments.long_runs = launch.long_runs();
  arguments.runs = static_cast<int>(launch.runs);
  arguments.rows = checked.rows;
  arguments.guard = guard;
  std::copy_n(static_cast<const WeightRule*>(rules.const_data_ptr()), arguments.rows,
              arguments.rules);
  if (guard) {
    guard_kernel<<<launch.blocks(), kThreads, 0, launch.stream>>>(
        launch.table, arguments.long_runs, arguments.runs, arguments.counters);
    Launch::check();
  }
  const auto kernel = seed.has_value() ? update_kernel<true> : update_kernel<false>;
  kernel<<<launch.blocks(), kThreads, 0, launch.stream>>>(arguments);
  Launch::check();
}

void exchange_cuda(std::vector<Tensor> averages, std::vector<Tensor> /*sources*/, Tensor table,
                   int64_t row, int64_t short_runs) {
  STD_TORCH_CHECK(!averages.empty() && 0 <= row && row < averages[0].size(0),
                  "exchange_.cuda: no row ", row);
  if (table.numel() == 0) return;
  const Launch launch(table, short_runs);
  exchange_kernel<<<launch.blocks(), kThreads, 0, launch.stream>>>(
      launch.table, launch.long_runs(), static_cast<int>(launch.runs), row);
  Launch::check();
}

}  // namespace
}  // namespace swa_fast

STABLE_TORCH_LIBRARY_IMPL(swa_fast, CUDA, m) {
  m.impl("update_.cuda", TORCH_BOX(&swa_fast::update_cuda));
  m.impl("exchange_.cuda", TORCH_BOX(&swa_fast::exchange_cuda));
}
