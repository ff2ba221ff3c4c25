// CUDA kernels of swa_fast::update_, swa_fast::swap_ and swa_fast::swag_.
//
// Formula: update.h. Layout: every segment is consecutive in the source and in each average, and
// has less than 2^31 elements. Bytes per element: sizeof(source) + 2 k sizeof(average), 4 + 8 k for
// k averages in fp32, plus 24 + 16 k for each segment's row of the table and the counters; bound by
// memory bandwidth. The first update, a copy, does not read the averages.
//
// A long segment has a block of its own. The short ones, which come last in the table, have a warp
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
  const int64_t* table;
  int64_t* n_averaged;
  int64_t* counters;  // null: nothing is counted
  int64_t seed;
  int long_segments, segments;
  int rows;
  bool skip_nonfinite;
  Gate gate;
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

// Which segments a block serves: one with all its warps, or one with each.
struct Share {
  int long_segments, all_segments;

  __device__ __forceinline__ bool alone() const {
    return static_cast<int>(blockIdx.x) < long_segments;
  }
  __device__ __forceinline__ int first() const {
    const int block = static_cast<int>(blockIdx.x);
    return alone() ? block : long_segments + (block - long_segments) * kWarps;
  }
  __device__ __forceinline__ int segments() const {
    return alone() ? 1 : min(kWarps, all_segments - first());
  }
  // This warp's segment, counted from the first, and which of how many parts of it.
  __device__ __forceinline__ int segment() const { return alone() ? 0 : thread_id() / kWarp; }
  __device__ __forceinline__ int part() const { return alone() ? thread_id() / kWarp : 0; }
  __device__ __forceinline__ int parts() const { return alone() ? kWarps : 1; }
};

// What the threads of a block have in common.
struct Shared {
  int64_t words[kWarps][kSegmentHeader + kMaxAverages];  // its segments' rows of the table
  double weight[kMaxAverages];
  int64_t n[kMaxAverages];
  bool counts;     // the optimiser's step as one
  bool nonfinite;  // the sources of an update that was due
  bool skip;
};

// kPack_ elements are one access. The first choice: the wider type fills 16 bytes, so neighbouring
// threads touch neighbouring bytes in both arrays. Sources that are not aligned for that, and what
// remains at a segment's end, take fewer.
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
  int64_t seed;
  uint32_t n;
  int row;

  __device__ __forceinline__ Blender(double w, int64_t seed_, int64_t n_, int row_)
      : seed(seed_), n(static_cast<uint32_t>(n_)), row(row_) {
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

// Elements [begin, end) of a segment, whole packs, or of them what is this warp's part.
template <typename Traits>
__device__ __forceinline__ void update_part(const Arguments& arguments, const Shared& shared,
                                            Segment segment, int begin, int end, int part,
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
    const Source* source = to_global(static_cast<const Source*>(segment.source())) + at;
    // Not because they are read: values that only a condition defines are kept from step to step.
    Memory<SourcePack> b[kUnroll] = {};
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (u * kStride < left) b[u].load(source + u * kStride);
    }
#pragma unroll 1
    for (int row = 0; row < arguments.rows; ++row) {
      const double w = segment.copied() ? 1.0 : shared.weight[row];
      if (w == 0.0) continue;
      Average* average = to_global(reinterpret_cast<Average*>(segment.average(row))) + at;
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
      const int64_t place = Traits::kStochastic ? segment.place() + at : 0;
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
__device__ __forceinline__ void update_segment(const Arguments& arguments, const Shared& shared,
                                               Segment segment, const Share& share) {
  using Single = UpdateTraits<Average, Source, kStochastic, 1>;
  constexpr int kPack = kPackBytes / Single::kWider;
  using Whole = UpdateTraits<Average, Source, kStochastic, kPack>;
  constexpr int kWord = sizeof(Source) < 4 ? 4 / sizeof(Source) : 1;
  const int count = static_cast<int>(segment.count());
  const auto fits = [&](auto traits) {
    using Traits = decltype(traits);
    return is_aligned_for<typename Traits::SourcePack>(segment.source()) &&
           segment.alignment() >= static_cast<int>(alignof(typename Traits::AveragePack));
  };
  int packed = 0;
  if (count % kPack != 0 && count <= Single::kStep) {
    // All of it in one step of single elements: as packs and a rest it would wait twice.
  } else if (fits(Whole{})) {
    packed = count / kPack * kPack;
    update_part<Whole>(arguments, shared, segment, 0, packed, share.part(), share.parts());
  } else if constexpr (kWord > 1 && kWord < kPack) {
    using Words = UpdateTraits<Average, Source, kStochastic, kWord>;
    if (fits(Words{})) {
      packed = count / kWord * kWord;
      update_part<Words>(arguments, shared, segment, 0, packed, share.part(), share.parts());
    }
  }
  // The last warp first: it is the one without packs where a segment does not fill its block.
  update_part<Single>(arguments, shared, segment, packed, count, share.parts() - 1 - share.part(),
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

// A segment whose elements are bytes: read once, and written into every average.
__device__ __forceinline__ void copy_segment(Segment segment, int rows, int part, int parts) {
  const int count = static_cast<int>(segment.count());
  const uint64_t places = address_of(segment.source()) | segment.alignment() | count;
  dispatch_unit(places, [&](auto unit) {
    using Unit = decltype(unit);
    constexpr int kUnroll = 4;
    const int units = count / static_cast<int>(sizeof(Unit));
    const Unit* source = to_global(static_cast<const Unit*>(segment.source()));
#pragma unroll 1
    for (int i = part * kWarp * kUnroll + lane_id(); i < units; i += parts * kWarp * kUnroll) {
      Unit b[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        if (i + u * kWarp < units) b[u] = source[i + u * kWarp];
      }
#pragma unroll 1
      for (int row = 0; row < rows; ++row) {
        Unit* average = to_global(reinterpret_cast<Unit*>(segment.average(row)));
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
          if (i + u * kWarp < units) average[i + u * kWarp] = b[u];
        }
      }
    }
  });
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

// Random numbers have a kernel of their own, because they need more registers: where bfloat16 is
// emulated more than four blocks leave, and fewer blocks cost less than registers that are spilled.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr int kStochasticBlocks = 3;
#else
constexpr int kStochasticBlocks = kBlocks;
#endif

template <bool kStochastic>
__global__ void __launch_bounds__(kThreads, kStochastic ? kStochasticBlocks : kBlocks)
    update_kernel(const __grid_constant__ Arguments arguments) {
  __shared__ Shared shared;
  const Share share{arguments.long_segments, arguments.segments};
  // A warp reads the row of its segment, each lane a word, and the last warp reads the counters
  // too: its loads are both on their way before it needs the first.
  static_assert(kSegmentHeader + kMaxAverages <= kWarp && kMaxAverages < kWarp);
  const int width = kSegmentHeader + arguments.rows;
  const int warp = thread_id() / kWarp, lane = lane_id();
  const bool has_word = lane < width && warp < share.segments();
  const bool has_count = warp == kWarps - 1 && lane < arguments.rows;
  int64_t word = 0, n = 0;
  if (has_word) word = arguments.table[static_cast<int64_t>(share.first() + warp) * width + lane];
  if (has_count) n = arguments.n_averaged[lane];
  if (has_word) shared.words[warp][lane] = word;
  if (has_count) {
    shared.n[lane] = n;
    shared.weight[lane] = arguments.rules[lane].weight(n);
  }
  if (threadIdx.x == kThreads - 1) {
    const bool counts = !arguments.gate.skipped();
    const bool due = counts && arguments.gate.due();
    const bool bad = due && arguments.skip_nonfinite && arguments.counters[kNonFinite] != 0;
    shared.counts = counts;
    shared.nonfinite = bad;
    shared.skip = !due || bad;
  }
  __syncthreads();

  // The block has read all counters. Nothing waits for the ticket's number before the memory that
  // is on its way meanwhile.
  unsigned drawn = ~0u;
  if (threadIdx.x == 0 && arguments.counters != nullptr) {
    drawn = draw_ticket(arguments.counters + kTicket);
  }

  if (!shared.skip && share.segment() < share.segments()) {
    const Segment segment{shared.words[share.segment()]};
    if (segment.average_type() == kBytes) {
      copy_segment(segment, arguments.rows, share.part(), share.parts());
    } else {
      dispatch_code(segment.average_type(), [&](auto average) {
        dispatch_code(segment.source_type(), [&](auto source) {
          using Average = decltype(average);
          using Source = decltype(source);
          if constexpr (kStochastic && std::is_same_v<Average, BFloat16> &&
                        !std::is_same_v<Source, double>) {
            if (!segment.copied()) {
              return update_segment<Average, Source, true>(arguments, shared, segment, share);
            }
          }
          update_segment<Average, Source, false>(arguments, shared, segment, share);
        });
      });
    }
  }

  if (drawn == gridDim.x - 1) {
    // The other half of the tickets' order. It waits for this block's memory, too, which the end of
    // the kernel would wait for anyway.
    __threadfence();
    arguments.counters[kTicket] = 0;
    if (shared.counts && arguments.gate.steps != nullptr) *arguments.gate.steps += 1;
    if (shared.skip) {
      if (shared.nonfinite) arguments.counters[kSkipped] += 1;
      arguments.counters[kNonFinite] = 0;
    } else {
      for (int row = 0; row < arguments.rows; ++row) arguments.n_averaged[row] += 1;
    }
  }
}

template <typename T>
__device__ __forceinline__ bool any_nonfinite(Segment segment, int part, int parts) {
  using Bits = typename Exponent<T>::Bits;
  const int count = static_cast<int>(segment.count());
  bool found = false;
  // What remains from `begin` on; returns where packs of this size end.
  const auto look = [&](auto pack, int begin, int warp) {
    using BitsPack = decltype(pack);
    constexpr int kPack = sizeof(BitsPack) / sizeof(Bits);
    constexpr int kUnroll = kPack == 1 ? 8 : 4;
    const int end = count - (count - begin) % kPack;
    const Bits* bits = to_global(static_cast<const Bits*>(segment.source()));
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
  if (is_aligned_for<Whole>(segment.source())) packed = look(Whole{}, 0, part);
  look(Pack<Bits, 1>{}, packed, parts - 1 - part);
  return found;
}

// Sets counters[kNonFinite] if a source holds an infinity or NaN. Reads every source once.
__global__ void __launch_bounds__(kThreads)
    nonfinite_kernel(const int64_t* table, int width, int long_segments, int segments,
                     int64_t* counters) {
  const Share share{long_segments, segments};
  if (share.segment() >= share.segments()) return;
  const Segment segment{table + static_cast<int64_t>(share.first() + share.segment()) * width};
  if (segment.copied()) return;
  bool found = false;
  dispatch_code(segment.source_type(), [&](auto source) {
    found = any_nonfinite<decltype(source)>(segment, share.part(), share.parts());
  });
  if (__any_sync(~0u, found) && lane_id() == 0) {
    atomicExch(reinterpret_cast<unsigned long long*>(counters + kNonFinite), 1ull);
  }
}

__global__ void __launch_bounds__(kThreads)
    swap_kernel(const int64_t* table, int width, int long_segments, int segments, int row) {
  const Share share{long_segments, segments};
  if (share.segment() >= share.segments()) return;
  const Segment segment{table + static_cast<int64_t>(share.first() + share.segment()) * width};
  const int part = share.part(), parts = share.parts();
  const int code = segment.source_type();
  const int size = code == kDouble ? 8 : code == kFloat ? 4 : code == kBytes ? 1 : 2;
  const int bytes = static_cast<int>(segment.count()) * size;
  char* average = segment.average(row);
  const void* source = segment.source();
  dispatch_unit(address_of(source) | address_of(average) | bytes, [&](auto unit) {
    using Unit = decltype(unit);
    constexpr int kUnroll = 4;
    const int units = bytes / static_cast<int>(sizeof(Unit));
    Unit* left = to_global(reinterpret_cast<Unit*>(average));
    Unit* right = to_global(static_cast<Unit*>(const_cast<void*>(source)));
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

struct SwagArguments {
  const int64_t* table;
  int64_t* n_averaged;
  int64_t* counters;
  int width, long_segments, segments;
  int columns;
  Gate gate;
};

// Elements [begin, end) of a segment, whole packs, or of them what is this warp's part: the mean
// moves, the squared deviations from it grow (Welford), and how far the source is from the new mean
// is what a column holds. 4 + 8 + 8 + 4 bytes per fp32 element.
template <typename Average, typename Source, int kPack>
__device__ __forceinline__ void swag_part(Segment segment, int begin, int end, int64_t n, int part,
                                          int parts) {
  using AveragePack = Pack<Average, kPack>;
  using SourcePack = Pack<Source, kPack>;
  constexpr int kUnroll = 2;
  constexpr int kStride = kWarp * kPack;
  const Average weight = static_cast<Average>(1.0 / static_cast<double>(n + 1));
  const bool copy = n == 0, near = weight < Average(0.5);
  const Average factor = near ? weight : weight - Average(1);
  const Source* source = to_global(static_cast<const Source*>(segment.source()));
  Average* mean = to_global(reinterpret_cast<Average*>(segment.average(kSwagMean)));
  Average* squares = to_global(reinterpret_cast<Average*>(segment.average(kSwagSquares)));
  Average* column = to_global(reinterpret_cast<Average*>(segment.average(kSwagDeviations)));
#pragma unroll 1
  for (int at = begin + part * kStride * kUnroll + lane_id() * kPack; at < end;
       at += parts * kStride * kUnroll) {
    SourcePack b[kUnroll] = {};
    AveragePack m[kUnroll] = {}, s[kUnroll] = {};
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int i = at + u * kStride;
      if (i < end) {
        b[u] = *reinterpret_cast<const SourcePack*>(source + i);
        if (!copy) {
          m[u] = *reinterpret_cast<const AveragePack*>(mean + i);
          s[u] = *reinterpret_cast<const AveragePack*>(squares + i);
        }
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int i = at + u * kStride;
      if (i < end) {
        AveragePack d;
#pragma unroll
        for (int k = 0; k < kPack; ++k) {
          const Average x = static_cast<Average>(b[u].element[k]), old = m[u].element[k];
          const Average now = copy ? x : fma(factor, x - old, near ? old : x);
          d.element[k] = x - now;
          s[u].element[k] = copy ? Average(0) : fma(x - old, x - now, s[u].element[k]);
          m[u].element[k] = now;
        }
        *reinterpret_cast<AveragePack*>(mean + i) = m[u];
        *reinterpret_cast<AveragePack*>(squares + i) = s[u];
        *reinterpret_cast<AveragePack*>(column + i) = d;
      }
    }
  }
}

template <typename Average, typename Source>
__device__ __forceinline__ void swag_segment(Segment segment, int64_t n, const Share& share) {
  constexpr int kPack = kPackBytes / sizeof(Average);
  const int count = static_cast<int>(segment.count());
  int packed = 0;
  if (is_aligned_for<Pack<Source, kPack>>(segment.source()) && segment.alignment() == kPackBytes) {
    packed = count / kPack * kPack;
    swag_part<Average, Source, kPack>(segment, 0, packed, n, share.part(), share.parts());
  }
  swag_part<Average, Source, 1>(segment, packed, count, n, share.parts() - 1 - share.part(),
                                share.parts());
}

__global__ void __launch_bounds__(kThreads, kBlocks)
    swag_kernel(const __grid_constant__ SwagArguments arguments) {
  // A segment's row as far as it is needed: of the columns the one whose turn it is.
  constexpr int kWords = kSegmentHeader + kSwagDeviations + 1;
  __shared__ int64_t words[kWarps][kWords];
  __shared__ int64_t n;
  __shared__ bool counts, due;
  const Share share{arguments.long_segments, arguments.segments};
  const int warp = thread_id() / kWarp, lane = lane_id();
  if (warp < share.segments() && lane < kWords) {
    int word = lane;
    if (lane == kWords - 1) word += static_cast<int>(*arguments.n_averaged % arguments.columns);
    const int64_t row = static_cast<int64_t>(share.first() + warp) * arguments.width;
    words[warp][lane] = arguments.table[row + word];
  }
  if (threadIdx.x == 0) {
    n = *arguments.n_averaged;
    counts = !arguments.gate.skipped();
    due = counts && arguments.gate.due();
  }
  __syncthreads();
  unsigned drawn = ~0u;
  if (threadIdx.x == 0) drawn = draw_ticket(arguments.counters + kTicket);
  if (due && share.segment() < share.segments()) {
    const Segment segment{words[share.segment()]};
    if (segment.average_type() == kDouble) {
      swag_segment<double, double>(segment, n, share);
    } else {
      dispatch_code(segment.source_type(), [&](auto source) {
        if constexpr (!std::is_same_v<decltype(source), double>) {
          swag_segment<float, decltype(source)>(segment, n, share);
        }
      });
    }
  }
  if (drawn == gridDim.x - 1) {
    __threadfence();
    arguments.counters[kTicket] = 0;
    if (counts && arguments.gate.steps != nullptr) *arguments.gate.steps += 1;
    if (due) *arguments.n_averaged += 1;
  }
}

// The current device's guard, the stream and the number of blocks of a launch over `table`.
struct Launch {
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream;
  const int64_t* table;
  int width;
  int64_t segments, short_segments;

  explicit Launch(const Tensor& table_, int64_t short_segments_)
      : guard(table_.get_device_index()),
        stream(current_stream(table_.get_device_index())),
        table(static_cast<const int64_t*>(table_.const_data_ptr())),
        width(static_cast<int>(table_.size(1))),
        segments(table_.size(0)),
        short_segments(short_segments_) {
    STD_TORCH_CHECK(table_.is_cuda(), "update_.cuda: table must be on a CUDA device");
    STD_TORCH_CHECK(0 < segments && segments <= 0x7fffffff - kWarps,
                    "update_.cuda: expected 1 to 2^31 - 9 segments, found ", segments);
    STD_TORCH_CHECK(0 <= short_segments && short_segments <= segments,
                    "update_.cuda: expected 0 to ", segments, " short segments, found ",
                    short_segments);
  }

  int long_segments() const { return static_cast<int>(segments - short_segments); }

  unsigned blocks() const {
    return static_cast<unsigned>(long_segments() + (short_segments + kWarps - 1) / kWarps);
  }

  static void check() {
    const cudaError_t status = cudaGetLastError();
    STD_TORCH_CHECK(status == cudaSuccess,
                    "update_.cuda: launch failed: ", cudaGetErrorString(status));
  }
};

void update_cuda(std::vector<Tensor> /*averages*/, std::vector<Tensor> /*sources*/,
                 Tensor n_averaged, std::optional<Tensor> counters, Tensor rules, Tensor table,
                 int64_t /*pairs*/, std::optional<int64_t> seed, bool skip_nonfinite,
                 int64_t short_segments, std::optional<Tensor> found_inf,
                 std::optional<Tensor> steps, int64_t every, int64_t offset) {
  const int rows = check_update_arguments(n_averaged, counters, rules, table);
  const Launch launch(table, short_segments);
  STD_TORCH_CHECK(
      n_averaged.is_cuda() && n_averaged.get_device_index() == table.get_device_index() &&
          (!counters ||
           (counters->is_cuda() && counters->get_device_index() == table.get_device_index())),
      "update_.cuda: n_averaged, counters and table must be on one CUDA device");
  STD_TORCH_CHECK(counters || !skip_nonfinite, "update_.cuda: skip_nonfinite needs counters");
  Arguments arguments{};
  arguments.table = launch.table;
  arguments.n_averaged = static_cast<int64_t*>(n_averaged.mutable_data_ptr());
  arguments.counters = counters ? static_cast<int64_t*>(counters->mutable_data_ptr()) : nullptr;
  arguments.seed = seed.value_or(0);
  arguments.long_segments = launch.long_segments();
  arguments.segments = static_cast<int>(launch.segments);
  arguments.rows = rows;
  arguments.skip_nonfinite = skip_nonfinite;
  arguments.gate = make_gate(found_inf, steps, every, offset, counters, n_averaged);
  std::copy_n(static_cast<const WeightRule*>(rules.const_data_ptr()), rows, arguments.rules);
  if (skip_nonfinite) {
    nonfinite_kernel<<<launch.blocks(), kThreads, 0, launch.stream>>>(
        launch.table, launch.width, arguments.long_segments, arguments.segments,
        arguments.counters);
    Launch::check();
  }
  const auto kernel = seed.has_value() ? update_kernel<true> : update_kernel<false>;
  kernel<<<launch.blocks(), kThreads, 0, launch.stream>>>(arguments);
  Launch::check();
}

void swap_cuda(std::vector<Tensor> /*averages*/, std::vector<Tensor> /*sources*/, Tensor table,
               int64_t row, int64_t short_segments) {
  check_swap_arguments(table, row);
  if (table.numel() == 0) return;
  const Launch launch(table, short_segments);
  swap_kernel<<<launch.blocks(), kThreads, 0, launch.stream>>>(
      launch.table, launch.width, launch.long_segments(), static_cast<int>(launch.segments),
      static_cast<int>(row));
  Launch::check();
}

void swag_cuda(std::vector<Tensor> /*averages*/, std::vector<Tensor> /*sources*/, Tensor n_averaged,
               Tensor counters, Tensor table, int64_t pairs, int64_t columns,
               int64_t short_segments, std::optional<Tensor> found_inf, std::optional<Tensor> steps,
               int64_t every, int64_t offset) {
  check_swag_arguments(n_averaged, counters, table, pairs, columns);
  const Launch launch(table, short_segments);
  STD_TORCH_CHECK(n_averaged.is_cuda() &&
                      n_averaged.get_device_index() == table.get_device_index() &&
                      counters.is_cuda() && counters.get_device_index() == table.get_device_index(),
                  "swag_.cuda: n_averaged, counters and table must be on one CUDA device");
  SwagArguments arguments{};
  arguments.table = launch.table;
  arguments.n_averaged = static_cast<int64_t*>(n_averaged.mutable_data_ptr());
  arguments.counters = static_cast<int64_t*>(counters.mutable_data_ptr());
  arguments.width = launch.width;
  arguments.long_segments = launch.long_segments();
  arguments.segments = static_cast<int>(launch.segments);
  arguments.columns = static_cast<int>(columns);
  arguments.gate = make_gate(found_inf, steps, every, offset, counters, n_averaged);
  swag_kernel<<<launch.blocks(), kThreads, 0, launch.stream>>>(arguments);
  Launch::check();
}

}  // namespace
}  // namespace swa_fast

STABLE_TORCH_LIBRARY_IMPL(swa_fast, CUDA, m) {
  m.impl("update_.cuda", TORCH_BOX(&swa_fast::update_cuda));
  m.impl("swap_.cuda", TORCH_BOX(&swa_fast::swap_cuda));
  m.impl("swag_.cuda", TORCH_BOX(&swa_fast::swag_cuda));
}
