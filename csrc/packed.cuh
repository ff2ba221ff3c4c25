// 16-byte packs: the unit in which CUDA kernels of this project touch global memory.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "layout.h"
#include "stable_compat.h"

namespace swa_fast {

constexpr int kPackBytes = 16;

// N elements moved by one access of N * sizeof(T) bytes, 4 to 16 of them.
template <typename T, int N>
struct alignas(N * sizeof(T)) Pack {
  static_assert((N & (N - 1)) == 0 && N * sizeof(T) <= kPackBytes, "one vector access");
  T element[N];
};

// A pack's memory. Held as such between its load and its use: as elements of 16 bits, or converted
// early because several uses need the same value, it would take twice the registers.
template <typename P>
struct Memory {
  using Word = std::conditional_t<sizeof(P) % 4 == 0, uint32_t, uint16_t>;
  Pack<Word, sizeof(P) / sizeof(Word)> words;

  __device__ __forceinline__ void load(const void* from) {
    words = *static_cast<const decltype(words)*>(from);
  }
  __device__ __forceinline__ P unpacked() {
    if constexpr (sizeof(P) > sizeof(P{}.element[0])) {
#pragma unroll
      for (Word& word : words.element) asm volatile("" : "+r"(word));
    }
    P pack;
    memcpy(&pack, &words, sizeof(P));
    return pack;
  }
};

// True when a Pack at every multiple of N elements from `pointer` is aligned.
template <typename P>
__device__ __forceinline__ bool is_aligned_for(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % alignof(P) == 0;
}

// A pointer that came out of a table, with the compiler told that it is one to global memory: else
// its accesses are generic, and find out at each what memory they are to.
template <typename T>
__device__ __forceinline__ T* to_global(T* pointer) {
  __builtin_assume(__isGlobal(pointer));
  return pointer;
}

// Calls `f` with a value of the type that a code of layout.h means.
template <typename F>
__device__ __forceinline__ void dispatch_code(int code, const F& f) {
  switch (code) {
    case kFloat:
      return f(float{});
    case kDouble:
      return f(double{});
    case kBfloat16:
      return f(BFloat16{});
    case kHalf:
      return f(Half{});
  }
}

}  // namespace swa_fast
