// 16-byte packs: the unit in which CUDA kernels of this project touch global memory.
#pragma once

#include <cstdint>

namespace swa_fast {

constexpr int kPackBytes = 16;

// N elements moved by one access of N * sizeof(T) bytes, 4 to 16 of them.
template <typename T, int N>
struct alignas(N * sizeof(T)) Pack {
  static_assert((N & (N - 1)) == 0 && N * sizeof(T) <= kPackBytes, "one vector access");
  T element[N];
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

}  // namespace swa_fast
