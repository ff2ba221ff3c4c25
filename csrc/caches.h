// Lines that will be read soon; and which memory is too large for the processor's caches, so that
// stores go past them: a store into a cache fetches the line first and writes it back later, twice
// the traffic of one past it.
#pragma once

#include <cstdint>
#ifdef __linux__
#include <unistd.h>
#endif
#ifdef __x86_64__
#include <immintrin.h>
#endif

namespace swa_fast {

// Asks the memory for the line of `p`. A function that does nothing but prefetch has no effect in
// gcc's eyes, which drops its calls: the empty statement keeps them.
inline void fetch_ahead(const void* p) {
  __builtin_prefetch(p);
  asm volatile("");
}

// What the system tells of a cache, in bytes, or `otherwise` where it tells nothing.
inline int64_t cache_bytes([[maybe_unused]] int name, int64_t otherwise) {
  int64_t found = 0;
#ifdef __linux__
  found = sysconf(name);
#endif
  return found > 0 ? found : otherwise;
}

#ifdef _SC_LEVEL1_DCACHE_SIZE
constexpr int kFirstLevel = _SC_LEVEL1_DCACHE_SIZE, kSecondLevel = _SC_LEVEL2_CACHE_SIZE;
#else
constexpr int kFirstLevel = -1, kSecondLevel = -1;  // names that sysconf does not know
#endif

// Bytes of a core's first-level cache for data.
inline int64_t first_level_cache() {
  static const int64_t bytes = cache_bytes(kFirstLevel, int64_t{32} << 10);
  return bytes;
}

// Bytes of a core's own second-level cache. How much of the third level a process has is nowhere to
// be asked: its size is that of all such caches of a socket, which others use, too.
inline int64_t second_level_cache() {
  static const int64_t bytes = cache_bytes(kSecondLevel, int64_t{1} << 20);
  return bytes;
}

// Whether an output of that many bytes, written beside an input of about as many, has left the
// caches before anybody reads it. Measured on a Zen 5 and a Zen 3, whose second levels are 1 MiB
// and 512 KiB: from twelve times as many on, stores past the caches are faster.
inline bool outlasts_caches(int64_t bytes) { return bytes >= 12 * second_level_cache(); }

// Stores past the caches have no place in the order of others until this.
inline void end_of_stream() {
#ifdef __x86_64__
  _mm_sfence();
#endif
}

}  // namespace swa_fast
