// Lanes<float> and Lanes<double>: 32 bytes of the arithmetic type as a register, on processors that
// have vector instructions for them. Everything that is computed with them comes out the same, bit
// for bit, whichever header they are from, but for the sign and the payload of a NaN.
//
//   Register               kCount numbers
//   load(p), store(p, v)   from and to all four storage types: widened exactly, rounded to nearest
//                          even
//   stream(p, v)           a store past the caches, where there is one, to a multiple of its size
//   load_pair(p, even, odd), store_pair<kStream>(p, even, odd)
//                          Lanes<float> from and to bfloat16: twice kCount numbers, those at even
//                          places in one register, fewer instructions than in order
//   store_with(p, v, bits) Lanes<float> to bfloat16: v's bits plus eight numbers of 16 bits, the
//                          lower half then dropped; a NaN stays one
//   broadcast, add, sub, mul
//   fma(a, b, c)           a b + c, rounded once
//   blend(base, c, a, b)   base + c (b - a), of two roundings
//   relu(a)                0 where a < 0, else a, which may be -0 or NaN
//   part(a, i)             the i-th of kParts pieces, as Lanes<double>::Register
#pragma once

#include <cstdlib>
#include <cstring>

#include "stable_compat.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define SWA_FAST_HAS_LANES 1
#define SWA_FAST_HAS_AVX512_PATH 1
#include "lanes_avx2.h"
#elif defined(__aarch64__) && defined(__GNUC__)
#define SWA_FAST_HAS_LANES 1
#define SWA_FAST_HAS_AVX512_PATH 0
#include "lanes_neon.h"
#else
#define SWA_FAST_HAS_LANES 0
#define SWA_FAST_HAS_AVX512_PATH 0
#endif
