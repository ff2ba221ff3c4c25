// Instruction handlers (everything but control and memory checks) and the binder that selects them.
#include <immintrin.h>

#include <algorithm>
#include <cfenv>
#include <cmath>

#include "ptx.h"

namespace gs {

// ---------------------------------------------------------------- bit-level floats
static inline float f_of(uint32_t b) {
  float f;
  memcpy(&f, &b, 4);
  return f;
}
static inline uint32_t b_of(float f) {
  uint32_t b;
  memcpy(&b, &f, 4);
  return b;
}
static inline double d_of(uint64_t b) {
  double f;
  memcpy(&f, &b, 8);
  return f;
}
static inline uint64_t b_of(double f) {
  uint64_t b;
  memcpy(&b, &f, 8);
  return b;
}
static inline float flush(float x) {
  uint32_t b = b_of(x);
  return f_of((b & 0x7f800000u) ? b : b & 0x80000000u);
}
template <int FL>
static inline float fin(float x) {
  return (FL & 1) ? flush(x) : x;
}
template <int FL>
static inline float fout(float r) {
  if (FL & 1) r = flush(r);
  if (FL & 2) {
    r = r > 0.f ? r : 0.f;
    return r < 1.f ? r : 1.f;
  }
  return r != r ? f_of(0x7fffffffu) : r;
}
// round a double to a small binary format, one rounding.  man: explicit mantissa bits, emin:
// exponent of the smallest normal, emax: largest exponent.  rm: 0 rn, 1 rz, 2 rm, 3 rp, 4 rna.
// Returns exponent/mantissa bits with sign.
static uint32_t round_small(double x, int man, int emin, int emax, int rm, bool satfinite,
                            uint32_t nan_bits, uint32_t inf_bits, uint32_t max_bits,
                            uint32_t sign_bit) {
  uint64_t b = b_of(x);
  uint32_t sign = (b >> 63) ? sign_bit : 0;
  if (x != x) return nan_bits;
  if (std::isinf(x)) return sign | (satfinite ? max_bits : inf_bits);
  if (x == 0) return sign;
  double ax = std::fabs(x);
  int e;
  std::frexp(ax, &e);
  --e;                              // ax = 1.f * 2^e
  int q = std::max(e, emin) - man;  // exponent of one unit
  double s = std::ldexp(ax, -q);    // exact: scaling by a power of two
  double fl = std::floor(s), fr = s - fl;
  bool up = false;
  if (rm == 0)
    up = fr > 0.5 || (fr == 0.5 && std::fmod(fl, 2.0) == 1.0);
  else if (rm == 4)
    up = fr >= 0.5;
  else if (rm == 2)
    up = sign && fr > 0;
  else if (rm == 3)
    up = !sign && fr > 0;
  uint64_t n = (uint64_t)fl + up;
  // n * 2^q -> bits
  int ex = q + man;  // exponent field base
  if (n >= (2ull << man)) {
    n >>= 1;
    ++ex;
  }
  if (n >= (1ull << man)) {
    if (ex > emax) {
      if (satfinite || rm == 1 || (rm == 2 && !sign) || (rm == 3 && sign)) return sign | max_bits;
      return sign | inf_bits;
    }
    return sign | (uint32_t)(((uint64_t)(ex - emin + 1) << man) | (n & ((1ull << man) - 1)));
  }
  return sign | (uint32_t)n;
}
static inline uint16_t to_half(double x, int rm = 0, bool sat = false) {
  return (uint16_t)round_small(x, 10, -14, 15, rm, sat, 0x7fff, 0x7c00, 0x7bff, 0x8000);
}
static inline uint16_t to_bf(double x, int rm = 0, bool sat = false) {
  return (uint16_t)round_small(x, 7, -126, 127, rm, sat, 0x7fff, 0x7f80, 0x7f7f, 0x8000);
}
static inline uint16_t half_rn(float x) {
  if (x != x) return 0x7fff;
  return (uint16_t)_cvtss_sh(x, 0);
}
static inline uint16_t bf_rn(float x) {
  if (x != x) return 0x7fff;
  uint32_t b = b_of(x);
  return (uint16_t)((b + 0x7fff + (b >> 16 & 1)) >> 16);
}
static inline float from_half(uint16_t h) { return _cvtsh_ss(h); }
static inline float from_bf(uint16_t h) { return f_of((uint32_t)h << 16); }
static uint32_t e4m3(double x) {
  uint32_t r = round_small(x, 3, -6, 8, 0, true, 0x7f, 0x7e, 0x7e, 0x80);
  if ((r & 0x7f) == 0x7f && x == x) r = (r & 0x80) | 0x7e;
  return r;
}
static uint32_t e5m2(double x) {
  return round_small(x, 2, -14, 15, 0, true, 0x7f, 0x7b, 0x7b, 0x80);
}
static float from_e5m2(uint32_t b) { return from_half((uint16_t)(b << 8)); }
static float from_e4m3(uint32_t b) {
  int e = b >> 3 & 15, m = b & 7;
  if (e == 15 && m == 7) return f_of(0x7fffffff);
  float v = e ? std::ldexp(1.f + m / 8.f, e - 7) : std::ldexp(m / 8.f, -6);
  return (b & 0x80) ? -v : v;
}
// a*b + c with one rounding to odd in double, so that a later rounding to a small format is exact
static double fma_odd(double a, double b, double c) {
  double p = a * b;  // exact for f16/bf16 inputs
  double s = p + c;
  if (std::isnan(s) || std::isinf(s)) return s;
  double bb = s - p, err = (p - (s - bb)) + (c - bb);
  if (err != 0) {
    uint64_t u = b_of(s);
    if (!(u & 1)) {
      if ((err > 0) == (s > 0))
        u |= 1;
      else
        u -= 1;
      s = d_of(u | 1);
    }
  }
  return s;
}

// ---------------------------------------------------------------- generic loops
template <class D, class A, class F>
static inline void map1(Warp& w, const Inst& I, uint32_t m, F f) {
  A ta[32];
  const A* a = src<A>(w, I.a, ta);
  Dst<D> d(w, I.d, m);
  if (m == ~0u)
    for (int l = 0; l < 32; ++l) d.p[l] = f(a[l]);
  else
    GS_LANES(m, l) d.p[l] = f(a[l]);
}
template <class D, class A, class B, class F>
static inline void map2(Warp& w, const Inst& I, uint32_t m, F f) {
  A ta[32];
  const A* a = src<A>(w, I.a, ta);
  B tb[32];
  const B* b = src<B>(w, I.b, tb);
  Dst<D> d(w, I.d, m);
  if (m == ~0u)
    for (int l = 0; l < 32; ++l) d.p[l] = f(a[l], b[l]);
  else
    GS_LANES(m, l) d.p[l] = f(a[l], b[l]);
}
template <class D, class A, class B, class C, class F>
static inline void map3(Warp& w, const Inst& I, uint32_t m, F f) {
  A ta[32];
  const A* a = src<A>(w, I.a, ta);
  B tb[32];
  const B* b = src<B>(w, I.b, tb);
  C tc[32];
  const C* c = src<C>(w, I.c, tc);
  Dst<D> d(w, I.d, m);
  if (m == ~0u)
    for (int l = 0; l < 32; ++l) d.p[l] = f(a[l], b[l], c[l]);
  else
    GS_LANES(m, l) d.p[l] = f(a[l], b[l], c[l]);
}
#define H1(D, A, EXPR)                                       \
  [](Warp& w, const Inst& I, uint32_t m) {                   \
    map1<D, A>(w, I, m, [](A a) -> D { return (D)(EXPR); }); \
  }
#define H2(D, A, B, EXPR)                                            \
  [](Warp& w, const Inst& I, uint32_t m) {                           \
    map2<D, A, B>(w, I, m, [](A a, B b) -> D { return (D)(EXPR); }); \
  }
#define H3(D, A, B, C, EXPR)                                                 \
  [](Warp& w, const Inst& I, uint32_t m) {                                   \
    map3<D, A, B, C>(w, I, m, [](A a, B b, C c) -> D { return (D)(EXPR); }); \
  }

// One handler for each combination of .ftz (1) and .sat (2), chosen by `fl` where the macro stands.
#define F32_1(FL, ...)                          \
  (Fn)[](Warp & w, const Inst& I, uint32_t m) { \
    map1<float, float>(w, I, m, [](float a) {   \
      a = fin<FL>(a);                           \
      return fout<FL>(__VA_ARGS__);             \
    });                                         \
  }
#define F32_2(FL, ...)                                        \
  (Fn)[](Warp & w, const Inst& I, uint32_t m) {               \
    map2<float, float, float>(w, I, m, [](float a, float b) { \
      a = fin<FL>(a);                                         \
      b = fin<FL>(b);                                         \
      return fout<FL>(__VA_ARGS__);                           \
    });                                                       \
  }
#define F32_3(FL, ...)                                                        \
  (Fn)[](Warp & w, const Inst& I, uint32_t m) {                               \
    map3<float, float, float, float>(w, I, m, [](float a, float b, float c) { \
      a = fin<FL>(a);                                                         \
      b = fin<FL>(b);                                                         \
      c = fin<FL>(c);                                                         \
      return fout<FL>(__VA_ARGS__);                                           \
    });                                                                       \
  }
#define BY_FLAGS(OP, ...)         \
  (fl == 0   ? OP(0, __VA_ARGS__) \
   : fl == 1 ? OP(1, __VA_ARGS__) \
   : fl == 2 ? OP(2, __VA_ARGS__) \
             : OP(3, __VA_ARGS__))
#define FLAGS_F32_1(...) BY_FLAGS(F32_1, __VA_ARGS__)
#define FLAGS_F32_2(...) BY_FLAGS(F32_2, __VA_ARGS__)
#define FLAGS_F32_3(...) BY_FLAGS(F32_3, __VA_ARGS__)

// integer operations over one type
template <class T>
struct Bits {
  static const int n = sizeof(T) * 8;
};
template <class T>
static T mulhi(T a, T b) {
  return (T)(((__int128)a * (__int128)b) >> Bits<T>::n);
}
template <>
uint64_t mulhi<uint64_t>(uint64_t a, uint64_t b) {
  return (uint64_t)(((unsigned __int128)a * b) >> 64);
}
template <class T>
static T idiv(T a, T b) {
  if (b == 0) return (T) ~(T)0;
  if (is_signed_int<T>::v && b == (T)-1) return (T)(0 - (typename std::make_unsigned<T>::type)a);
  return a / b;
}
template <class T>
static T irem(T a, T b) {
  if (b == 0) return a;
  if (is_signed_int<T>::v && b == (T)-1) return 0;
  return a % b;
}
template <class T>
static T shl(T a, uint32_t n) {
  return n >= (uint32_t)Bits<T>::n ? 0 : (T)((typename std::make_unsigned<T>::type)a << n);
}
template <class T>
static T shr(T a, uint32_t n) {
  if (n >= (uint32_t)Bits<T>::n) return is_signed_int<T>::v && a < 0 ? (T)-1 : 0;
  return a >> n;
}
template <class T>
static T uabs(T a) {
  return a < 0 ? (T)(0 - (typename std::make_unsigned<T>::type)a) : a;
}

template <class T>
static Fn int2(std::string_view b, bool hi) {
  typedef typename std::make_unsigned<T>::type U;
  if (b == "add") return H2(T, T, T, (U)((U)a + (U)b));
  if (b == "sub") return H2(T, T, T, (U)((U)a - (U)b));
  if (b == "mul" && !hi) return H2(T, T, T, (U)((uint64_t)(U)a * (uint64_t)(U)b));
  if (b == "mul") return H2(T, T, T, mulhi<T>(a, b));
  if (b == "div") return H2(T, T, T, idiv<T>(a, b));
  if (b == "rem") return H2(T, T, T, irem<T>(a, b));
  if (b == "min") return H2(T, T, T, std::min(a, b));
  if (b == "max") return H2(T, T, T, std::max(a, b));
  if (b == "and") return H2(T, T, T, (a & b));
  if (b == "or") return H2(T, T, T, (a | b));
  if (b == "xor") return H2(T, T, T, (a ^ b));
  if (b == "shl") return H2(T, T, uint32_t, shl<T>(a, b));
  if (b == "shr") return H2(T, T, uint32_t, shr<T>(a, b));
  return nullptr;
}
template <class T>
static Fn int1(std::string_view b) {
  typedef typename std::make_unsigned<T>::type U;
  if (b == "neg") return H1(T, T, (U)(0 - (U)a));
  if (b == "abs") return H1(T, T, uabs<T>(a));
  if (b == "not") return H1(T, T, ~a);
  if (b == "cnot") return H1(T, T, (a == 0));
  return nullptr;
}
template <class T>
static Fn int3(std::string_view b, bool hi) {
  typedef typename std::make_unsigned<T>::type U;
  if (b == "mad" && !hi)
    return H3(T, T, T, T, (U)((uint64_t)(U)a * (uint64_t)(U)b + (uint64_t)(U)c));
  if (b == "mad") return H3(T, T, T, T, (U)((U)mulhi<T>(a, b) + (U)c));
  if (b == "sad") return H3(T, T, T, T, (U)((U)c + (a < b ? (U)b - (U)a : (U)a - (U)b)));
  return nullptr;
}
#define INT_SWITCH(t, CALL) \
  switch (t) {              \
    case U16:               \
    case B16:               \
      r = CALL(uint16_t);   \
      break;                \
    case S16:               \
      r = CALL(int16_t);    \
      break;                \
    case U32:               \
    case B32:               \
      r = CALL(uint32_t);   \
      break;                \
    case S32:               \
      r = CALL(int32_t);    \
      break;                \
    case U64:               \
    case B64:               \
      r = CALL(uint64_t);   \
      break;                \
    case S64:               \
      r = CALL(int64_t);    \
      break;                \
    case U8:                \
    case B8:                \
      r = CALL(uint8_t);    \
      break;                \
    case S8:                \
      r = CALL(int8_t);     \
      break;                \
    default:                \
      break;                \
  }

// ---------------------------------------------------------------- floats with an explicit rounding
// mode (scalar, MXCSR)
template <class T>
__attribute__((noinline)) static T rounded(int op, T a_, T b_, T c_) {
  volatile T a = a_, b = b_, c = c_;
  volatile T r = 0;
  switch (op) {
    case 0:
      r = a + b;
      break;
    case 1:
      r = a - b;
      break;
    case 2:
      r = a * b;
      break;
    case 3:
      r = sizeof(T) == 4 ? (T)__builtin_fmaf((float)a, (float)b, (float)c)
                         : (T)__builtin_fma((double)a, (double)b, (double)c);
      break;
    case 4:
      r = a / b;
      break;
    case 5:
      r = std::sqrt((T)a);
      break;
    case 6:
      r = (T)1 / a;
      break;
  }
  return r;
}
template <class T>
static void h_rounded(Warp& w, const Inst& I, uint32_t m) {  // sub: operation, imm: 1 rz 2 rm 3 rp
  T ta[32], tb[32], tc[32];
  const T *a = src<T>(w, I.a, ta), *b = I.b.off >= 0 ? src<T>(w, I.b, tb) : a,
          *c = I.c.off >= 0 ? src<T>(w, I.c, tc) : a;
  unsigned old = _mm_getcsr();
  static const unsigned mode[4] = {0x0000, 0x6000, 0x2000, 0x4000};
  Dst<T> d(w, I.d, m);
  bool ftz = I.flags & FL_FTZ;
  GS_LANES(m, l) {
    T x = a[l], y = b[l], z = c[l];
    if (ftz && sizeof(T) == 4) {
      x = flush(x);
      y = flush(y);
      z = flush(z);
    }
    _mm_setcsr((old & ~0x6000u) | mode[I.imm & 3]);
    T r = rounded<T>(I.sub, x, y, z);
    _mm_setcsr(old);
    if (sizeof(T) == 4) {
      float f = (float)r;
      f = ftz ? fout<1>(f) : fout<0>(f);
      if (I.flags & FL_SAT) f = fout<2>(f);
      r = f;
    }
    d.p[l] = r;
  }
}

// ---------------------------------------------------------------- min/max
static inline float fmin32(float a, float b) {
  if (a != a) return b;
  if (b != b) return a;
  if (a == b) return f_of(b_of(a) | b_of(b));
  return a < b ? a : b;
}
static inline float fmax32(float a, float b) {
  if (a != a) return b;
  if (b != b) return a;
  if (a == b) return f_of(b_of(a) & b_of(b));
  return a > b ? a : b;
}
static inline float fmin32n(float a, float b) { return a != a ? a : b != b ? b : fmin32(a, b); }
static inline float fmax32n(float a, float b) { return a != a ? a : b != b ? b : fmax32(a, b); }
static inline double fmin64(double a, double b) {
  if (a != a) return b;
  if (b != b) return a;
  if (a == b) return std::signbit(a) ? a : b;
  return a < b ? a : b;
}
static inline double fmax64(double a, double b) {
  if (a != a) return b;
  if (b != b) return a;
  if (a == b) return std::signbit(a) ? b : a;
  return a > b ? a : b;
}

// ---------------------------------------------------------------- half types: H traits
struct HF {
  static float up(uint16_t x) { return from_half(x); }
  static uint16_t dn(float x) { return half_rn(x); }
  static uint16_t dnd(double x) { return to_half(x); }
  static bool sub(uint16_t x) { return !(x & 0x7c00); }
};
struct HB {
  static float up(uint16_t x) { return from_bf(x); }
  static uint16_t dn(float x) { return bf_rn(x); }
  static uint16_t dnd(double x) { return to_bf(x); }
  static bool sub(uint16_t x) { return !(x & 0x7f80); }
};
enum HOp { HO_ADD, HO_SUB, HO_MUL, HO_FMA, HO_MIN, HO_MAX, HO_NEG, HO_ABS, HO_EX2, HO_TANH };
template <class H>
static uint16_t hop(int op, uint32_t fl, uint16_t a, uint16_t b, uint16_t c) {
  if (fl & FL_FTZ) {
    if (H::sub(a)) a &= 0x8000;
    if (H::sub(b)) b &= 0x8000;
    if (H::sub(c)) c &= 0x8000;
  }
  float x = H::up(a), y = H::up(b), z = H::up(c);
  uint16_t r;
  switch (op) {
    case HO_ADD:
      r = H::dn(x + y);
      break;
    case HO_SUB:
      r = H::dn(x - y);
      break;
    case HO_MUL:
      r = H::dn(x * y);
      break;
    case HO_FMA:
      r = H::dnd(fma_odd(x, y, z));
      break;
    case HO_MIN:
      r = H::dn((fl & FL_NAN) ? fmin32n(x, y) : fmin32(x, y));
      break;
    case HO_MAX:
      r = H::dn((fl & FL_NAN) ? fmax32n(x, y) : fmax32(x, y));
      break;
    case HO_NEG:
      r = a ^ 0x8000;
      break;
    case HO_ABS:
      r = a & 0x7fff;
      break;
    case HO_EX2:
      r = H::dnd(std::exp2((double)x));
      break;
    default:
      r = H::dnd(std::tanh((double)x));
      break;
  }
  if ((fl & FL_FTZ) && H::sub(r)) r &= 0x8000;
  if (fl & FL_RELU) {
    float v = H::up(r);
    if (v == v && (r & 0x8000)) r = 0;
  }
  if (fl & FL_SAT) {
    float v = H::up(r);
    v = v > 0 ? v : 0;
    r = H::dn(v < 1 ? v : 1);
  }
  return r;
}
template <class H>
static void h_half(Warp& w, const Inst& I, uint32_t m) {
  GS_LANES(m, l)
  wr(w, I.d, l,
     hop<H>(I.sub, I.flags, (uint16_t)rd(w, I.a, l), I.b.off >= 0 ? (uint16_t)rd(w, I.b, l) : 0,
            I.c.off >= 0 ? (uint16_t)rd(w, I.c, l) : 0));
}
template <class H>
static void h_half2(Warp& w, const Inst& I, uint32_t m) {
  GS_LANES(m, l) {
    uint32_t a = (uint32_t)rd(w, I.a, l), b = I.b.off >= 0 ? (uint32_t)rd(w, I.b, l) : 0,
             c = I.c.off >= 0 ? (uint32_t)rd(w, I.c, l) : 0;
    wr(w, I.d, l,
       hop<H>(I.sub, I.flags, (uint16_t)a, (uint16_t)b, (uint16_t)c) |
           (uint32_t)hop<H>(I.sub, I.flags, a >> 16, b >> 16, c >> 16) << 16);
  }
}
// packed f32x2 and 16-bit integer pairs
static void h_f32x2(Warp& w, const Inst& I, uint32_t m) {
  GS_LANES(m, l) {
    uint64_t a = rd(w, I.a, l), b = rd(w, I.b, l), c = I.c.off >= 0 ? rd(w, I.c, l) : 0, r = 0;
    for (int h = 0; h < 2; ++h) {
      float x = f_of((uint32_t)(a >> 32 * h)), y = f_of((uint32_t)(b >> 32 * h)),
            z = f_of((uint32_t)(c >> 32 * h)), v;
      if (I.flags & FL_FTZ) {
        x = flush(x);
        y = flush(y);
        z = flush(z);
      }
      v = I.sub == 0 ? x + y : I.sub == 1 ? x - y : I.sub == 2 ? x * y : __builtin_fmaf(x, y, z);
      v = (I.flags & FL_FTZ) ? fout<1>(v) : fout<0>(v);
      r |= (uint64_t)b_of(v) << 32 * h;
    }
    wr(w, I.d, l, r);
  }
}
static void h_i16x2(Warp& w, const Inst& I,
                    uint32_t m) {  // sub 0 add, 1 min, 2 max; flag signed, relu
  GS_LANES(m, l) {
    uint32_t a = (uint32_t)rd(w, I.a, l), b = (uint32_t)rd(w, I.b, l), r = 0;
    for (int h = 0; h < 2; ++h) {
      uint16_t x = a >> 16 * h, y = b >> 16 * h, v;
      if (I.sub == 0)
        v = x + y;
      else if (I.flags & FL_SIGNED) {
        int16_t p = x, q = y, z = I.sub == 1 ? std::min(p, q) : std::max(p, q);
        if ((I.flags & FL_RELU) && z < 0) z = 0;
        v = z;
      } else
        v = I.sub == 1 ? std::min(x, y) : std::max(x, y);
      r |= (uint32_t)v << 16 * h;
    }
    wr(w, I.d, l, r);
  }
}

// ---------------------------------------------------------------- comparison
enum Cmp { EQ, NE, LT, LE, GT, GE, EQU, NEU, LTU, LEU, GTU, GEU, NUM, NANC };
template <class T>
static inline bool cmp(int c, T a, T b) {
  switch (c) {
    case EQ:
      return a == b;
    case NE:
      return (a < b) || (a > b);
    case LT:
      return a < b;
    case LE:
      return a <= b;
    case GT:
      return a > b;
    case GE:
      return a >= b;
    case EQU:
      return !((a < b) || (a > b));
    case NEU:
      return a != b;
    case LTU:
      return !(a >= b);
    case LEU:
      return !(a > b);
    case GTU:
      return !(a <= b);
    case GEU:
      return !(a < b);
    case NUM:
      return a == a && b == b;
    default:
      return a != a || b != b;
  }
}
static int cmp_parse(std::string_view s, bool isfloat) {
  static const char* n[] = {"eq",  "ne",  "lt",  "le",  "gt",  "ge",  "equ",
                            "neu", "ltu", "leu", "gtu", "geu", "num", "nan"};
  for (int i = 0; i < 14; ++i)
    if (s == n[i]) return i;
  if (s == "lo") return LT;
  if (s == "ls") return LE;
  if (s == "hi") return GT;
  if (s == "hs") return GE;
  return -1;
}
// sub: comparison; imm: 0 none, 1 and, 2 or, 3 xor with predicate c; d2: complement
template <class T>
static void h_setp(Warp& w, const Inst& I, uint32_t m) {
  T ta[32], tb[32];
  const T *a = src<T>(w, I.a, ta), *b = src<T>(w, I.b, tb);
  uint8_t* d = w.R + I.d.off;
  if (m == ~0u && I.imm == 0 && I.d2.off < 0 && !(I.flags & FL_FTZ)) {
    switch (I.sub) {
      case EQ:
        for (int l = 0; l < 32; ++l) d[l] = a[l] == b[l];
        return;
      case NE:
        if (T(0.5) == T(0)) {
          for (int l = 0; l < 32; ++l) d[l] = a[l] != b[l];
          return;
        }
        break;
      case LT:
        for (int l = 0; l < 32; ++l) d[l] = a[l] < b[l];
        return;
      case LE:
        for (int l = 0; l < 32; ++l) d[l] = a[l] <= b[l];
        return;
      case GT:
        for (int l = 0; l < 32; ++l) d[l] = a[l] > b[l];
        return;
      case GE:
        for (int l = 0; l < 32; ++l) d[l] = a[l] >= b[l];
        return;
    }
  }
  GS_LANES(m, l) {
    T x = a[l], y = b[l];
    if (sizeof(T) == 4 && T(0.5) != T(0) && (I.flags & FL_FTZ)) {
      x = (T)flush((float)x);
      y = (T)flush((float)y);
    }
    bool r = cmp<T>(I.sub, x, y), q = !r;
    if (I.imm) {
      bool c = (bool)(w.R + I.c.off)[l] != I.c.neg;
      r = I.imm == 1 ? r && c : I.imm == 2 ? r || c : r != c;
      q = I.imm == 1 ? q && c : I.imm == 2 ? q || c : q != c;
    }
    if (I.d.off >= 0) d[l] = r;
    if (I.d2.off >= 0) (w.R + I.d2.off)[l] = q;
  }
}
template <class H>
static void h_setp_half(Warp& w, const Inst& I, uint32_t m) {
  GS_LANES(m, l) {
    uint32_t a = (uint32_t)rd(w, I.a, l), b = (uint32_t)rd(w, I.b, l);
    int n = I.size == 4 ? 2 : 1;
    for (int h = 0; h < n; ++h) {
      bool r = cmp<float>(I.sub, H::up((uint16_t)(a >> 16 * h)), H::up((uint16_t)(b >> 16 * h))),
           q = !r;
      bool c = I.imm ? (bool)(w.R + I.c.off)[l] != I.c.neg : false;
      if (I.imm) {
        r = I.imm == 1 ? r && c : I.imm == 2 ? r || c : r != c;
        q = I.imm == 1 ? q && c : I.imm == 2 ? q || c : q != c;
      }
      if (h == 0) {
        if (I.d.off >= 0) (w.R + I.d.off)[l] = r;
        if (n == 1 && I.d2.off >= 0) (w.R + I.d2.off)[l] = q;
      } else if (I.d2.off >= 0)
        (w.R + I.d2.off)[l] = r;
    }
  }
}
// set.cmp{.bool}.dtype.stype: vec: dtype (0 int -> all ones, 1 f32 -> 1.0, 2 f16, 3 bf16, 4 f16x2,
// 5 bf16x2)
static void h_set(Warp& w, const Inst& I, uint32_t m) {
  Ty st = (Ty)I.size;
  GS_LANES(m, l) {
    uint64_t a = rd(w, I.a, l), b = rd(w, I.b, l);
    auto one = [&](uint64_t x, uint64_t y) {
      switch (st) {
        case F32: {
          float p = f_of((uint32_t)x), q = f_of((uint32_t)y);
          if (I.flags & FL_FTZ) {
            p = flush(p);
            q = flush(q);
          }
          return cmp<float>(I.sub, p, q);
        }
        case F64:
          return cmp<double>(I.sub, d_of(x), d_of(y));
        case F16:
        case F16X2:
          return cmp<float>(I.sub, from_half((uint16_t)x), from_half((uint16_t)y));
        case BF16:
        case BF16X2:
          return cmp<float>(I.sub, from_bf((uint16_t)x), from_bf((uint16_t)y));
        case S16:
          return cmp<int16_t>(I.sub, (int16_t)x, (int16_t)y);
        case S32:
          return cmp<int32_t>(I.sub, (int32_t)x, (int32_t)y);
        case S64:
          return cmp<int64_t>(I.sub, (int64_t)x, (int64_t)y);
        default: {
          int n = ty_size(st);
          uint64_t mk = n == 8 ? ~0ull : (1ull << 8 * n) - 1;
          return cmp<uint64_t>(I.sub, x & mk, y & mk);
        }
      }
    };
    auto comb = [&](bool r) {
      if (!I.imm) return r;
      bool c = (bool)(w.R + I.c.off)[l] != I.c.neg;
      return I.imm == 1 ? r && c : I.imm == 2 ? r || c : r != c;
    };
    bool r0 = comb(one(a, b));
    uint64_t v = 0;
    if (st == F16X2 || st == BF16X2) {
      bool r1 = comb(one(a >> 16, b >> 16));
      uint32_t t = I.vec == 4 ? 0x3c00 : I.vec == 5 ? 0x3f80 : 0xffff;
      v = (r0 ? t : 0) | (r1 ? t << 16 : 0);
    } else
      v = r0 ? (I.vec == 1   ? 0x3f800000u
                : I.vec == 2 ? 0x3c00u
                : I.vec == 3 ? 0x3f80u
                             : 0xffffffffu)
             : 0;
    wr(w, I.d, l, v);
  }
}
template <class T>
static void h_selp(Warp& w, const Inst& I, uint32_t m) {
  T ta[32], tb[32];
  const T *a = src<T>(w, I.a, ta), *b = src<T>(w, I.b, tb);
  const uint8_t* p = w.R + I.c.off;
  Dst<T> d(w, I.d, m);
  bool neg = I.c.neg;
  if (m == ~0u)
    for (int l = 0; l < 32; ++l) d.p[l] = (p[l] != 0) != neg ? a[l] : b[l];
  else
    GS_LANES(m, l) d.p[l] = (p[l] != 0) != neg ? a[l] : b[l];
}
static void h_slct(Warp& w, const Inst& I, uint32_t m) {  // sub 1: c is f32
  GS_LANES(m, l) {
    uint32_t c = (uint32_t)rd(w, I.c, l);
    bool ge;
    if (I.sub) {
      float f = f_of(c);
      if (I.flags & FL_FTZ) f = flush(f);
      ge = f >= 0;
    } else
      ge = (int32_t)c >= 0;
    wr(w, I.d, l, rd(w, ge ? I.a : I.b, l));
  }
}
// predicate logic
static void h_pred2(Warp& w, const Inst& I, uint32_t m) {
  const uint8_t *a = w.R + I.a.off, *b = w.R + I.b.off;
  uint8_t* d = w.R + I.d.off;
  GS_LANES(m, l) {
    bool x = (bool)a[l] != I.a.neg, y = (bool)b[l] != I.b.neg;
    d[l] = I.sub == 0 ? x && y : I.sub == 1 ? x || y : x != y;
  }
}
static void h_pred1(Warp& w, const Inst& I, uint32_t m) {
  GS_LANES(m, l)(w.R + I.d.off)[l] = ((w.R + I.a.off)[l] != 0) != (I.sub != 0) != I.a.neg;
}

// ---------------------------------------------------------------- moves
static void h_mov(Warp& w, const Inst& I, uint32_t m) {
  if (I.d.size == I.a.size && m == ~0u && !I.a.neg) {
    memcpy(w.R + I.d.off, w.R + I.a.off, 32 * I.d.size);
    return;
  }
  if (I.d.size == 16) {
    GS_LANES(m, l) memcpy(w.R + I.d.off + 16 * l, w.R + I.a.off + 16 * l, 16);
    return;
  }
  GS_LANES(m, l) wr(w, I.d, l, rd(w, I.a, l));
}
static void h_pack(Warp& w, const Inst& I, uint32_t m) {  // d = {ops...}
  GS_LANES(m, l) {
    unsigned __int128 v = 0;
    int sh = 0;
    for (auto& o : I.ops) {
      v |= (unsigned __int128)rd(w, o, l) << sh;
      sh += 8 * o.size;
    }
    if (I.d.size == 16)
      memcpy(w.R + I.d.off + 16 * l, &v, 16);
    else
      wr(w, I.d, l, (uint64_t)v);
  }
}
static void h_unpack(Warp& w, const Inst& I, uint32_t m) {  // {ops...} = a
  GS_LANES(m, l) {
    unsigned __int128 v = 0;
    if (I.a.size == 16)
      memcpy(&v, w.R + I.a.off + 16 * l, 16);
    else
      v = rd(w, I.a, l);
    for (auto& o : I.ops) {
      int n = I.size;
      uint64_t x = (uint64_t)v;
      if (n < 8) x &= (1ull << 8 * n) - 1;
      if (o.off >= 0) wr(w, o, l, x);
      v >>= 8 * n;
    }
  }
}
static void h_clock(Warp& w, const Inst& I, uint32_t m) {
  ++g_clock;
  GS_LANES(m, l) wr(w, I.d, l, g_clock >> (I.sub ? 32 : 0));
}
static void h_nop(Warp&, const Inst&, uint32_t) {}
static void h_zero(Warp& w, const Inst& I, uint32_t m) { GS_LANES(m, l) wr(w, I.d, l, 0); }

// ---------------------------------------------------------------- bit manipulation
static void h_lop3(Warp& w, const Inst& I, uint32_t m) {
  uint32_t lut = (uint32_t)I.imm;
  GS_LANES(m, l) {
    uint32_t a = (uint32_t)rd(w, I.a, l), b = (uint32_t)rd(w, I.b, l), c = (uint32_t)rd(w, I.c, l),
             r = 0;
    if (lut & 1) r |= ~a & ~b & ~c;
    if (lut & 2) r |= ~a & ~b & c;
    if (lut & 4) r |= ~a & b & ~c;
    if (lut & 8) r |= ~a & b & c;
    if (lut & 16) r |= a & ~b & ~c;
    if (lut & 32) r |= a & ~b & c;
    if (lut & 64) r |= a & b & ~c;
    if (lut & 128) r |= a & b & c;
    wr(w, I.d, l, r);
  }
}
static void h_prmt(Warp& w, const Inst& I, uint32_t m) {  // sub: mode
  GS_LANES(m, l) {
    uint64_t v = (uint64_t)(uint32_t)rd(w, I.b, l) << 32 | (uint32_t)rd(w, I.a, l);
    uint32_t s = (uint32_t)rd(w, I.c, l), r = 0;
    for (int i = 0; i < 4; ++i) {
      uint32_t sel;
      switch (I.sub) {
        case 0:
          sel = s >> 4 * i & 15;
          break;
        case 1:
          sel = ((s & 3) + i) & 7;
          break;  // f4e
        case 2:
          sel = ((s & 3) - i) & 7;
          break;  // b4e
        case 3:
          sel = s & 3;
          break;  // rc8
        case 4:
          sel = std::max<uint32_t>(i, s & 3);
          break;  // ecl
        case 5:
          sel = std::min<uint32_t>(i, s & 3);
          break;  // ecr
        default:
          sel = (s & 1) * 2 + (i & 1);
          break;  // rc16
      }
      uint32_t by = (uint32_t)(v >> 8 * (sel & 7)) & 255;
      if (I.sub == 0 && (sel & 8)) by = (by & 128) ? 255 : 0;
      r |= by << 8 * i;
    }
    wr(w, I.d, l, r);
  }
}
static void h_shf(Warp& w, const Inst& I, uint32_t m) {  // sub: bit0 right, bit1 clamp
  GS_LANES(m, l) {
    uint64_t v = (uint64_t)(uint32_t)rd(w, I.b, l) << 32 | (uint32_t)rd(w, I.a, l);
    uint32_t n = (uint32_t)rd(w, I.c, l);
    n = (I.sub & 2) ? std::min<uint32_t>(n, 32) : n & 31;
    wr(w, I.d, l, (I.sub & 1) ? (uint32_t)(v >> n) : (uint32_t)((v << n) >> 32));
  }
}
static void h_bfe(Warp& w, const Inst& I, uint32_t m) {
  int msb = I.size * 8 - 1;
  GS_LANES(m, l) {
    uint64_t a = rd(w, I.a, l);
    uint32_t pos = rd(w, I.b, l) & 255, len = rd(w, I.c, l) & 255;
    bool sg = (I.flags & FL_SIGNED);
    uint64_t sbit = (!sg || len == 0) ? 0 : a >> std::min<uint32_t>(pos + len - 1, msb) & 1, r = 0;
    for (int i = 0; i <= msb; ++i) {
      uint64_t bit = (i < (int)len && pos + i <= (uint32_t)msb) ? a >> (pos + i) & 1 : sbit;
      r |= bit << i;
    }
    wr(w, I.d, l, r);
  }
}
static void h_bfi(Warp& w, const Inst& I, uint32_t m) {  // a into b at c, length e
  int bits = I.size * 8;
  GS_LANES(m, l) {
    uint64_t a = rd(w, I.a, l), b = rd(w, I.b, l);
    uint32_t pos = rd(w, I.c, l) & 255, len = rd(w, I.e, l) & 255;
    for (uint32_t i = 0; i < len && pos + i < (uint32_t)bits; ++i)
      b = (b & ~(1ull << (pos + i))) | (a >> i & 1) << (pos + i);
    wr(w, I.d, l, b);
  }
}
static uint32_t bfind(uint64_t a, int bits, bool sg, bool amt) {
  if (bits == 32) a = sg ? (uint64_t)(int64_t)(int32_t)a : (uint32_t)a;
  if (sg && (int64_t)a < 0) a = ~a;
  if (bits == 32) a = (uint32_t)a;
  if (!a) return ~0u;
  uint32_t p = 63 - __builtin_clzll(a);
  return amt ? bits - 1 - p : p;
}
static void h_bfind(Warp& w, const Inst& I, uint32_t m) {
  GS_LANES(m, l) wr(w, I.d, l, bfind(rd(w, I.a, l), I.size * 8, I.flags & FL_SIGNED, I.sub));
}
static void h_fns(Warp& w, const Inst& I, uint32_t m) {
  GS_LANES(m, l) {
    uint32_t mask = (uint32_t)rd(w, I.a, l), base = (uint32_t)rd(w, I.b, l);
    int32_t off = (int32_t)rd(w, I.c, l);
    uint32_t r = ~0u;
    if (off == 0) {
      if (base < 32 && (mask >> base & 1)) r = base;
    } else {
      int32_t pos = base, cnt = std::abs(off) - 1, inc = off > 0 ? 1 : -1;
      while (pos >= 0 && pos < 32) {
        if (mask >> pos & 1) {
          if (!cnt) {
            r = pos;
            break;
          }
          --cnt;
        }
        pos += inc;
      }
    }
    wr(w, I.d, l, r);
  }
}
static uint32_t brev32(uint32_t x) {
  uint32_t r = 0;
  for (int i = 0; i < 32; ++i) r |= (x >> i & 1) << (31 - i);
  return r;
}
static void h_dp4a(Warp& w, const Inst& I,
                   uint32_t m) {  // flags: bit0 a signed, bit1 b signed (in sub)
  GS_LANES(m, l) {
    uint32_t a = (uint32_t)rd(w, I.a, l), b = (uint32_t)rd(w, I.b, l);
    int64_t r = (int64_t)rd(w, I.c, l);
    for (int i = 0; i < 4; ++i) {
      int x = (I.sub & 1) ? (int8_t)(a >> 8 * i) : (uint8_t)(a >> 8 * i),
          y = (I.sub & 2) ? (int8_t)(b >> 8 * i) : (uint8_t)(b >> 8 * i);
      r += x * y;
    }
    wr(w, I.d, l, (uint64_t)r);
  }
}
static void h_vabsdiff4(Warp& w, const Inst& I,
                        uint32_t m) {  // sub: bit0 a signed, bit1 b signed, bit2 accumulate
  GS_LANES(m, l) {
    uint32_t a = (uint32_t)rd(w, I.a, l), b = (uint32_t)rd(w, I.b, l), r = 0,
             sum = (uint32_t)rd(w, I.c, l);
    for (int i = 0; i < 4; ++i) {
      int x = (I.sub & 1) ? (int8_t)(a >> 8 * i) : (uint8_t)(a >> 8 * i),
          y = (I.sub & 2) ? (int8_t)(b >> 8 * i) : (uint8_t)(b >> 8 * i);
      uint32_t d = x < y ? y - x : x - y;
      r |= (d & 255) << 8 * i;
      sum += d;
    }
    wr(w, I.d, l, (I.sub & 4) ? sum : r);
  }
}
// add.cc and friends.  The carry flag of a lane lives in a scratch register (I.e).  sub: 0 add 1
// sub 2 madlo 3 madhi; imm bit0: carry in, bit1: carry out
static void h_carry(Warp& w, const Inst& I, uint32_t m) {
  int bits = I.size * 8;
  uint64_t mk = bits == 64 ? ~0ull : (1ull << bits) - 1;
  GS_LANES(m, l) {
    uint64_t a = rd(w, I.a, l) & mk, b = rd(w, I.b, l) & mk,
             ci = (I.imm & 1) ? (w.R + I.e.off)[l] : 0;
    unsigned __int128 r;
    bool co;
    if (I.sub == 1) {
      r = (unsigned __int128)a - b - ci;
      co = (unsigned __int128)a < (unsigned __int128)b + ci;
    } else {
      if (I.sub >= 2) {
        unsigned __int128 p = (unsigned __int128)a * b;
        if (I.flags & FL_SIGNED)
          p = (unsigned __int128)((__int128)(bits == 32 ? (int64_t)(int32_t)a : (int64_t)a) *
                                  (bits == 32 ? (int64_t)(int32_t)b : (int64_t)b));
        a = (uint64_t)(I.sub == 3 ? p >> bits : p) & mk;
        b = rd(w, I.c, l) & mk;
      }
      r = (unsigned __int128)a + b + ci;
      co = (r >> bits) & 1;
    }
    if (I.imm & 2) (w.R + I.e.off)[l] = co;
    wr(w, I.d, l, (uint64_t)r & mk);
  }
}

// ---------------------------------------------------------------- conversions
// sub: source type, size: destination type, imm: rounding (0 none/rn 1 rz 2 rm 3 rp 4 rna; +8: to
// an integral value), flags
static double round_int(double x, int rm) {
  switch (rm & 7) {
    case 1:
      return std::trunc(x);
    case 2:
      return std::floor(x);
    case 3:
      return std::ceil(x);
    default:
      return std::nearbyint(x);
  }
}
static void h_cvt(Warp& w, const Inst& I, uint32_t m) {
  Ty dt = (Ty)I.size, st = (Ty)I.sub;
  int rm = (int)I.imm;
  GS_LANES(m, l) {
    uint64_t raw = rd(w, I.a, l);
    bool isf = false;
    double f = 0;
    __int128 n = 0;
    switch (st) {
      case U8:
      case B8:
        n = (uint8_t)raw;
        break;
      case S8:
        n = (int8_t)raw;
        break;
      case U16:
      case B16:
        n = (uint16_t)raw;
        break;
      case S16:
        n = (int16_t)raw;
        break;
      case U32:
      case B32:
        n = (uint32_t)raw;
        break;
      case S32:
        n = (int32_t)raw;
        break;
      case U64:
      case B64:
        n = raw;
        break;
      case S64:
        n = (int64_t)raw;
        break;
      case F32: {
        float x = f_of((uint32_t)raw);
        if (I.flags & FL_FTZ) x = flush(x);
        f = x;
        isf = true;
        break;
      }
      case F64:
        f = d_of(raw);
        isf = true;
        break;
      case F16:
        f = from_half((uint16_t)raw);
        isf = true;
        break;
      case BF16:
        f = from_bf((uint16_t)raw);
        isf = true;
        break;
      default:
        break;
    }
    uint64_t out = 0;
    bool sgn = false;
    int osz = ty_size(dt);
    auto sat_int = [&](__int128 v, __int128 lo, __int128 hi) {
      return v < lo ? lo : v > hi ? hi : v;
    };
    switch (dt) {
      case U8:
      case S8:
      case U16:
      case S16:
      case U32:
      case S32:
      case U64:
      case S64:
      case B8:
      case B16:
      case B32:
      case B64: {
        sgn = dt == S8 || dt == S16 || dt == S32 || dt == S64;
        int bits = osz * 8;
        __int128 lo = sgn ? -((__int128)1 << (bits - 1)) : 0,
                 hi = sgn ? ((__int128)1 << (bits - 1)) - 1 : ((__int128)1 << bits) - 1;
        if (isf) {
          if (f != f)
            n = (st == F64 || bits == 64)
                    ? (bits == 64 ? (__int128)1 << 63
                                  : (bits == 32 ? (sgn ? lo : (__int128)1 << 31) : 0))
                    : 0;
          else {
            double r = round_int(f, rm);
            if (r >= 1.7e38)
              n = hi;
            else if (r <= -1.7e38)
              n = lo;
            else
              n = sat_int((__int128)r, lo, hi);
          }
        } else if (I.flags & FL_SAT)
          n = sat_int(n, lo, hi);
        out = (uint64_t)n;
        if (bits < 64) {
          out &= (1ull << bits) - 1;
          if (sgn) out = (uint64_t)((int64_t)(out << (64 - bits)) >> (64 - bits));
        }
        break;
      }
      case F32: {
        float r;
        if (isf) {
          if (rm & 8) {
            r = (float)round_int(f, rm & 7);
          } else if (st == F64) {
            if ((rm & 7) == 0)
              r = (float)f;
            else if (f != f)
              r = f_of(0x7fffffff);
            else {
              uint32_t b = round_small(f, 23, -126, 127, rm & 7, false, 0x7fffffff, 0x7f800000,
                                       0x7f7fffff, 0x80000000);
              r = f_of(b);
            }
          } else
            r = (float)f;
        } else {
          if ((rm & 7) == 0)
            r = n < 0 || n <= INT64_MAX ? (float)(int64_t)n : (float)(uint64_t)n;
          else {
            unsigned old = _mm_getcsr();
            static const unsigned mode[4] = {0, 0x6000, 0x2000, 0x4000};
            _mm_setcsr((old & ~0x6000u) | mode[rm & 3]);
            volatile int64_t sv = (int64_t)n;
            volatile uint64_t uv = (uint64_t)n;
            volatile float vr;
            if (n < 0 || n <= INT64_MAX)
              vr = (float)sv;
            else
              vr = (float)uv;
            r = vr;
            _mm_setcsr(old);
          }
        }
        if (I.flags & FL_SAT) r = fout<2>(r);
        if (I.flags & FL_FTZ) r = flush(r);
        if ((I.flags & FL_RELU) && r < 0) r = 0;
        if (r != r) r = f_of(0x7fffffff);
        out = b_of(r);
        break;
      }
      case F64: {
        double r = isf ? ((rm & 8) ? round_int(f, rm & 7) : f)
                       : (n < 0 || n <= INT64_MAX ? (double)(int64_t)n : (double)(uint64_t)n);
        if (!isf && (rm & 7)) {
          unsigned old = _mm_getcsr();
          static const unsigned mode[4] = {0, 0x6000, 0x2000, 0x4000};
          _mm_setcsr((old & ~0x6000u) | mode[rm & 3]);
          volatile int64_t sv = (int64_t)n;
          volatile double vr = (double)sv;
          r = vr;
          _mm_setcsr(old);
        }
        if (I.flags & FL_SAT) r = r > 0 ? (r < 1 ? r : 1) : 0;
        out = b_of(r);
        break;
      }
      case F16:
      case BF16: {
        double v = isf ? ((rm & 8) ? round_int(f, rm & 7) : f) : (double)(int64_t)n;
        if (!isf && n > INT64_MAX) v = (double)(uint64_t)n;
        if ((I.flags & FL_RELU) && v < 0) v = 0;
        if (I.flags & FL_SAT) v = v > 0 ? (v < 1 ? v : 1) : 0;
        int r7 = (rm & 8) ? 0 : rm & 7;
        out = dt == F16 ? to_half(v, r7, I.flags & FL_NAN) : to_bf(v, r7, I.flags & FL_NAN);
        if ((I.flags & FL_FTZ) && dt == F16 && st == F16 && !(out & 0x7c00)) out &= 0x8000;
        break;
      }
      case TF32: {
        uint32_t b = round_small(f, 10, -126, 127, rm == 0 ? 0 : rm & 7, false, 0x7fffffff >> 13,
                                 0xff << 10, 0x7f7fffff >> 13, 1u << 18);
        if ((I.flags & FL_RELU) && f < 0) b = 0;
        out = (uint64_t)b << 13;
        break;
      }
      default:
        break;
    }
    wr(w, I.d, l, out);
  }
}
// cvt.rn.{f16x2,bf16x2,e4m3x2,e5m2x2}.f32 d, a, b and narrow/wide packed forms.  c: random bits for
// .rs
static void h_cvt2(Warp& w, const Inst& I, uint32_t m) {
  Ty dt = (Ty)I.size, st = (Ty)I.sub;
  GS_LANES(m, l) {
    uint64_t out = 0;
    if (st == F32) {
      float hi = f_of((uint32_t)rd(w, I.a, l)), lo = f_of((uint32_t)rd(w, I.b, l));
      if (I.flags & FL_FTZ) {
        hi = flush(hi);
        lo = flush(lo);
      }
      if (I.flags & FL_RELU) {
        if (hi < 0) hi = 0;
        if (lo < 0) lo = 0;
      }
      int rm = (int)I.imm & 7;
      bool sf = I.flags & FL_NAN;
      if (I.c.off >= 0) {  // stochastic: add random bits below the kept mantissa, then truncate
        uint32_t rb = (uint32_t)rd(w, I.c, l);
        int drop = dt == BF16X2 ? 16 : 13;
        auto rs = [&](float x, uint32_t r) {
          if (!std::isfinite(x)) return x;
          return f_of((b_of(x) + (r & ((1u << drop) - 1))) & ~((1u << drop) - 1));
        };
        hi = rs(hi, drop == 16 ? rb >> 16 : (rb >> 16) & 0x1fff);
        lo = rs(lo, rb & ((1u << drop) - 1));
        rm = 1;
      }
      if (dt == F16X2)
        out = to_half(lo, rm, sf) | (uint32_t)to_half(hi, rm, sf) << 16;
      else if (dt == BF16X2)
        out = to_bf(lo, rm, sf) | (uint32_t)to_bf(hi, rm, sf) << 16;
      else if (dt == E4M3X2)
        out = e4m3(lo) | e4m3(hi) << 8;
      else
        out = e5m2(lo) | e5m2(hi) << 8;
    } else {
      uint32_t a = (uint32_t)rd(w, I.a, l);
      if (st == F16X2) {
        double lo = from_half((uint16_t)a), hi = from_half(a >> 16);
        if (I.flags & FL_RELU) {
          if (lo < 0) lo = 0;
          if (hi < 0) hi = 0;
        }
        out = dt == E4M3X2 ? e4m3(lo) | e4m3(hi) << 8 : e5m2(lo) | e5m2(hi) << 8;
      } else {
        float lo = st == E4M3X2 ? from_e4m3(a & 255) : from_e5m2(a & 255),
              hi = st == E4M3X2 ? from_e4m3(a >> 8 & 255) : from_e5m2(a >> 8 & 255);
        out = half_rn(lo) | (uint32_t)half_rn(hi) << 16;
      }
    }
    wr(w, I.d, l, out);
  }
}

// ---------------------------------------------------------------- warp-level
static void h_shfl(Warp& w, const Inst& I,
                   uint32_t m) {  // sub: 0 up 1 down 2 bfly 3 idx; d2: predicate
  uint32_t a[32], out[32];
  for (int l = 0; l < 32; ++l) a[l] = (uint32_t)rd(w, I.a, l);
  uint32_t grp = m;
  GS_LANES(m, l) {
    uint32_t b = (uint32_t)rd(w, I.b, l) & 31, c = (uint32_t)rd(w, I.c, l), cv = c & 31,
             seg = c >> 8 & 31;
    uint32_t maxl = (l & seg) | (cv & ~seg), minl = l & seg;
    bool p;
    int32_t j;
    switch (I.sub) {
      case 0:
        j = (int32_t)l - (int32_t)b;
        p = j >= (int32_t)maxl;
        break;
      case 1:
        j = l + b;
        p = j <= (int32_t)maxl;
        break;
      case 2:
        j = l ^ b;
        p = j <= (int32_t)maxl;
        break;
      default:
        j = minl | (b & ~seg);
        p = j <= (int32_t)maxl;
        break;
    }
    if (!p) j = l;
    if (!(grp >> (j & 31) & 1) && p)
      report(w, I, l,
             "shfl.sync reads lane " + std::to_string(j) +
                 ", which does not take part (undefined value)",
             719, false);
    out[l] = a[j & 31];
    if (I.d2.off >= 0) (w.R + I.d2.off)[l] = p;
  }
  GS_LANES(m, l) wr(w, I.d, l, out[l]);
}
static void h_vote(Warp& w, const Inst& I, uint32_t m) {  // sub: 0 all 1 any 2 uni 3 ballot
  uint32_t b = 0;
  GS_LANES(m, l) if ((bool)(w.R + I.a.off)[l] != I.a.neg) b |= 1u << l;
  uint64_t v = I.sub == 0 ? b == m : I.sub == 1 ? b != 0 : I.sub == 2 ? b == m || b == 0 : b;
  GS_LANES(m, l) wr(w, I.d, l, v);
}
static void h_match(Warp& w, const Inst& I, uint32_t m) {  // sub: 0 any 1 all
  uint64_t mk = I.size == 8 ? ~0ull : 0xffffffffull;
  GS_LANES(m, l) {
    uint32_t r = 0;
    GS_LANES(m, k) if ((rd(w, I.a, k) & mk) == (rd(w, I.a, l) & mk)) r |= 1u << k;
    if (I.sub) {
      bool all = r == m;
      r = all ? m : 0;
      if (I.d2.off >= 0) (w.R + I.d2.off)[l] = all;
    }
    wr(w, I.d, l, r);
  }
}
static void h_redux(Warp& w, const Inst& I,
                    uint32_t m) {  // sub: 0 add 1 min 2 max 3 and 4 or 5 xor; size = Ty
  uint32_t r = 0;
  bool first = true;
  Ty t = (Ty)I.size;
  GS_LANES(m, l) {
    uint32_t x = (uint32_t)rd(w, I.a, l);
    if (first) {
      r = x;
      first = false;
      continue;
    }
    switch (I.sub) {
      case 0:
        r += x;
        break;
      case 1:
        r = t == S32   ? (uint32_t)std::min((int32_t)r, (int32_t)x)
            : t == F32 ? b_of(fmin32(f_of(r), f_of(x)))
                       : std::min(r, x);
        break;
      case 2:
        r = t == S32   ? (uint32_t)std::max((int32_t)r, (int32_t)x)
            : t == F32 ? b_of(fmax32(f_of(r), f_of(x)))
                       : std::max(r, x);
        break;
      case 3:
        r &= x;
        break;
      case 4:
        r |= x;
        break;
      default:
        r ^= x;
    }
  }
  GS_LANES(m, l) wr(w, I.d, l, r);
}
static void h_activemask(Warp& w, const Inst& I, uint32_t m) {
  GS_LANES(m, l) wr(w, I.d, l, w.group);
}
static void h_elect(Warp& w, const Inst& I, uint32_t m) {
  uint32_t f = __builtin_ctz(m);
  GS_LANES(m, l) {
    if (I.d.off >= 0) wr(w, I.d, l, f);
    if (I.d2.off >= 0) (w.R + I.d2.off)[l] = l == f;
  }
}

// ---------------------------------------------------------------- atomics: size = Ty, sub = op,
// vec, ops = sources, d..: results in ops2 (targets unused)
enum AOp { A_ADD, A_MIN, A_MAX, A_AND, A_OR, A_XOR, A_EXCH, A_CAS, A_INC, A_DEC };
static uint64_t atom_op(Ty t, int op, uint64_t o, uint64_t b, uint64_t c, uint32_t fl) {
  switch (op) {
    case A_AND:
      return o & b;
    case A_OR:
      return o | b;
    case A_XOR:
      return o ^ b;
    case A_EXCH:
      return b;
    case A_CAS: {
      int n = ty_size(t);
      uint64_t mk = n == 8 ? ~0ull : (1ull << 8 * n) - 1;
      return (o & mk) == (b & mk) ? c : o;
    }
    case A_INC:
      return (uint32_t)o >= (uint32_t)b ? 0 : (uint32_t)o + 1;
    case A_DEC:
      return (uint32_t)o == 0 || (uint32_t)o > (uint32_t)b ? (uint32_t)b : (uint32_t)o - 1;
  }
  switch (t) {
    case F32: {
      float x = f_of((uint32_t)o), y = f_of((uint32_t)b);
      if (fl & FL_FTZ) {
        x = flush(x);
        y = flush(y);
      }
      float r = op == A_ADD ? x + y : op == A_MIN ? fmin32(x, y) : fmax32(x, y);
      if (fl & FL_FTZ) r = flush(r);
      return b_of(r != r ? f_of(0x7fffffff) : r);
    }
    case F64: {
      double x = d_of(o), y = d_of(b);
      return b_of(op == A_ADD ? x + y : op == A_MIN ? fmin64(x, y) : fmax64(x, y));
    }
    case F16:
      return hop<HF>(op == A_ADD   ? HO_ADD
                     : op == A_MIN ? HO_MIN
                                   : HO_MAX,
                     0, (uint16_t)o, (uint16_t)b, 0);
    case BF16:
      return hop<HB>(op == A_ADD   ? HO_ADD
                     : op == A_MIN ? HO_MIN
                                   : HO_MAX,
                     0, (uint16_t)o, (uint16_t)b, 0);
    case F16X2:
    case BF16X2: {
      Ty h = t == F16X2 ? F16 : BF16;
      return (atom_op(h, op, o & 0xffff, b & 0xffff, 0, 0) & 0xffff) |
             (atom_op(h, op, o >> 16 & 0xffff, b >> 16 & 0xffff, 0, 0) & 0xffff) << 16;
    }
    case S32:
      return op == A_ADD ? (uint32_t)(o + b)
                         : (uint32_t)(op == A_MIN ? std::min((int32_t)o, (int32_t)b)
                                                  : std::max((int32_t)o, (int32_t)b));
    case U32:
    case B32:
      return op == A_ADD   ? (uint32_t)(o + b)
             : op == A_MIN ? std::min((uint32_t)o, (uint32_t)b)
                           : std::max((uint32_t)o, (uint32_t)b);
    case S64:
      return op == A_ADD ? o + b
                         : (uint64_t)(op == A_MIN ? std::min((int64_t)o, (int64_t)b)
                                                  : std::max((int64_t)o, (int64_t)b));
    default:
      return op == A_ADD ? o + b : op == A_MIN ? std::min(o, b) : std::max(o, b);
  }
}
// a: address; ops[0..vec): sources; c: cas value; targets: offsets of the result slots
static void h_atom(Warp& w, const Inst& I, uint32_t m) {
  uint8_t* p[32];
  Ty t = (Ty)I.size;
  int n = ty_size(t);
  atom_addresses(w, I, m, n * I.vec, p);
  GS_LANES(m, l) for (int v = 0; v < I.vec; ++v) {
    uint64_t o = 0;
    memcpy(&o, p[l] + v * n, n);
    uint64_t b = rd(w, I.ops[v], l), c = I.c.off >= 0 ? rd(w, I.c, l) : 0;
    uint64_t r = atom_op(t, I.sub, o, b, c, I.flags);
    memcpy(p[l] + v * n, &r, n);
    if (I.d.off >= 0) {
      Opn d = v == 0 ? I.d : Opn{(int32_t)I.targets[v], I.d.size, false};
      if (t == S32 && d.size == 8) o = (uint64_t)(int64_t)(int32_t)o;
      wr(w, d, l, o);
    }
  }
}

// ================================================================ binder
void bind(Builder& B, Inst& I, const std::vector<std::string_view>& op, std::vector<Operand>& A) {
  std::string_view b = op[0];
  auto has = [&](std::string_view s) {
    for (size_t i = 1; i < op.size(); ++i)
      if (op[i] == s) return true;
    return false;
  };
  Ty t = T_NONE, t2 = T_NONE;  // last and last-but-one type
  for (size_t i = 1; i < op.size(); ++i) {
    Ty x = ty_parse(op[i]);
    if (x) {
      t2 = t;
      t = x;
    }
  }
  int fl = (has("ftz") ? 1 : 0) | (has("sat") ? 2 : 0);
  I.flags = (has("ftz") ? FL_FTZ : 0) | (has("sat") ? FL_SAT : 0) | (has("NaN") ? FL_NAN : 0) |
            (has("relu") ? FL_RELU : 0);
  int rm = has("rz") ? 1 : has("rm") ? 2 : has("rp") ? 3 : 0;
  auto need = [&](size_t n) {
    if (A.size() < n) B.fail("too few operands");
  };
  auto dreg = [&](const Operand& o, int sz) {
    return o.k == Operand::SINK ? B.scratch(sz) : B.reg(o, sz);
  };
  auto abc = [&](int n) {  // d and n sources of type t
    need(n + 1);
    I.d = dreg(A[0], ty_size(t));
    I.a = B.typed(A[1], t);
    if (n > 1) I.b = B.typed(A[2], t);
    if (n > 2) I.c = B.typed(A[3], t);
  };
  auto ok = [&](Fn f) {
    I.fn = f;
    if (!f) B.fail("instruction not implemented");
  };
  bool isint = (t >= B8 && t <= B64) || (t >= U8 && t <= S64);
  bool half = t == F16 || t == F16X2 || t == BF16 || t == BF16X2;
  Fn r = nullptr;

  // ---- packed forms shared by several base ops
  auto half_op = [&](int o, int n) {
    abc(n);
    I.sub = (uint8_t)o;
    ok(t == F16 ? h_half<HF> : t == BF16 ? h_half<HB> : t == F16X2 ? h_half2<HF> : h_half2<HB>);
  };
  auto rounded_op = [&](int o, int n) {
    abc(n);
    I.sub = (uint8_t)o;
    I.imm = rm;
    ok(t == F32 ? h_rounded<float> : h_rounded<double>);
  };

  if (b == "add" || b == "sub" || b == "mul" || b == "fma" || b == "mad") {
    int o = b == "add" ? 0 : b == "sub" ? 1 : b == "mul" ? 2 : 3, n = o == 3 ? 3 : 2;
    if ((b == "add" || b == "sub" || b == "mad") && has("cc")) goto carry;
    if (half) return half_op(o == 0 ? HO_ADD : o == 1 ? HO_SUB : o == 2 ? HO_MUL : HO_FMA, n);
    if (t == F32X2) {
      abc(n);
      I.sub = (uint8_t)o;
      return ok(h_f32x2);
    }
    if (t == U16X2 || t == S16X2) {
      abc(2);
      I.sub = 0;
      return ok(h_i16x2);
    }
    if (t == F32 && t2 && t2 != F32 && (t2 == F16 || t2 == BF16))
      B.fail("mixed-precision arithmetic is not implemented");
    if ((t == F32 || t == F64) && rm) return rounded_op(o, n);
    if (t == F32) {
      abc(n);
      if (o == 0) return ok(FLAGS_F32_2(a + b));
      if (o == 1) return ok(FLAGS_F32_2(a - b));
      if (o == 2) return ok(FLAGS_F32_2(a * b));
      return ok(FLAGS_F32_3(__builtin_fmaf(a, b, c)));
    }
    if (t == F64) {
      abc(n);
      if (o == 0) return ok(H2(double, double, double, a + b));
      if (o == 1) return ok(H2(double, double, double, a - b));
      if (o == 2) return ok(H2(double, double, double, a* b));
      return ok(H3(double, double, double, double, __builtin_fma(a, b, c)));
    }
    if (!isint) B.fail("instruction not implemented");
    if (has("wide")) {
      need(n + 1);
      int ws = 2 * ty_size(t);
      I.d = dreg(A[0], ws);
      I.a = B.typed(A[1], t);
      I.b = B.typed(A[2], t);
      if (o == 3) {
        I.c = B.reg(A[3], ws);
        ok(t == U16   ? (Fn)H3(uint32_t, uint16_t, uint16_t, uint32_t, (uint32_t)a* b + c)
           : t == S16 ? (Fn)H3(int32_t, int16_t, int16_t, int32_t, (int32_t)a* b + c)
           : t == U32
               ? (Fn)H3(uint64_t, uint32_t, uint32_t, uint64_t, (uint64_t)a* b + c)
               : (Fn)H3(uint64_t, int32_t, int32_t, uint64_t, (uint64_t)((int64_t)a * b) + c));
      } else
        ok(t == U16   ? (Fn)H2(uint32_t, uint16_t, uint16_t, (uint32_t)a* b)
           : t == S16 ? (Fn)H2(int32_t, int16_t, int16_t, (int32_t)a* b)
           : t == U32 ? (Fn)H2(uint64_t, uint32_t, uint32_t, (uint64_t)a* b)
                      : (Fn)H2(int64_t, int32_t, int32_t, (int64_t)a* b));
      return;
    }
    abc(n);
    if (has("sat") && t == S32 && o < 2)
      return ok(
          o == 0
              ? (Fn)H2(int32_t, int32_t, int32_t,
                       std::max<int64_t>(INT32_MIN, std::min<int64_t>(INT32_MAX, (int64_t)a + b)))
              : (Fn)H2(int32_t, int32_t, int32_t,
                       std::max<int64_t>(INT32_MIN, std::min<int64_t>(INT32_MAX, (int64_t)a - b))));
    bool hi = has("hi");
    if (n == 2) {
#define X(T) int2<T>(b, hi)
      INT_SWITCH(t, X)
#undef X
    } else {
#define X(T) int3<T>(b, hi)
      INT_SWITCH(t, X)
#undef X
    }
    return ok(r);
  }
  if (b == "addc" || b == "subc" || b == "madc") {
  carry:
    I.sub = b.substr(0, 3) == "add" ? 0 : b.substr(0, 3) == "sub" ? 1 : has("hi") ? 3 : 2;
    abc(I.sub >= 2 ? 3 : 2);
    I.e = B.sreg("%gpusim_carry");
    I.e.size = 1;
    I.imm = (b.size() == 4 ? 1 : 0) | (has("cc") ? 2 : 0);
    I.size = (uint8_t)ty_size(t);
    if (t == S32 || t == S64) I.flags |= FL_SIGNED;
    return ok(h_carry);
  }
  if (b == "mul24" || b == "mad24") {
    abc(b == "mul24" ? 2 : 3);
    if (has("hi")) B.fail("instruction not implemented");
    if (b == "mul24")
      return ok(t == S32 ? (Fn)H2(uint32_t, int32_t, int32_t,
                                  (uint32_t)((int64_t)(a << 8 >> 8) * (b << 8 >> 8)))
                         : (Fn)H2(uint32_t, uint32_t, uint32_t, (a & 0xffffff) * (b & 0xffffff)));
    return ok(t == S32 ? (Fn)H3(uint32_t, int32_t, int32_t, uint32_t,
                                (uint32_t)((int64_t)(a << 8 >> 8) * (b << 8 >> 8)) + c)
                       : (Fn)H3(uint32_t, uint32_t, uint32_t, uint32_t,
                                (a & 0xffffff) * (b & 0xffffff) + c));
  }
  if (b == "sad") {
    abc(3);
#define X(T) int3<T>(b, false)
    INT_SWITCH(t, X)
#undef X
    return ok(r);
  }
  if (b == "div" || b == "rem") {
    if (t == F32) {
      if (rm) return rounded_op(4, 2);
      abc(2);
      return ok(FLAGS_F32_2(a / b));  // .approx and .full are computed correctly rounded
    }
    if (t == F64) {
      if (rm) return rounded_op(4, 2);
      abc(2);
      return ok(H2(double, double, double, a / b));
    }
    abc(2);
#define X(T) int2<T>(b, false)
    INT_SWITCH(t, X)
#undef X
    return ok(r);
  }
  if (b == "min" || b == "max") {
    bool mn = b == "min";
    if (A.size() == 4) B.fail("three-input min/max is not implemented");
    if (half) return half_op(mn ? HO_MIN : HO_MAX, 2);
    abc(2);
    if (has("xorsign")) B.fail("instruction not implemented");
    if (t == F32) {
      if (has("NaN")) return ok(mn ? FLAGS_F32_2(fmin32n(a, b)) : FLAGS_F32_2(fmax32n(a, b)));
      return ok(mn ? FLAGS_F32_2(fmin32(a, b)) : FLAGS_F32_2(fmax32(a, b)));
    }
    if (t == F64)
      return ok(mn ? (Fn)H2(double, double, double, fmin64(a, b))
                   : (Fn)H2(double, double, double, fmax64(a, b)));
    if (t == U16X2 || t == S16X2) {
      I.sub = mn ? 1 : 2;
      if (t == S16X2) I.flags |= FL_SIGNED;
      return ok(h_i16x2);
    }
    if (t == S32 && has("relu"))
      return ok(mn ? (Fn)H2(int32_t, int32_t, int32_t, std::max(0, std::min(a, b)))
                   : (Fn)H2(int32_t, int32_t, int32_t, std::max(0, std::max(a, b))));
#define X(T) int2<T>(b, false)
    INT_SWITCH(t, X)
#undef X
    return ok(r);
  }
  if (b == "neg" || b == "abs" || b == "not" || b == "cnot") {
    if (half) return half_op(b == "neg" ? HO_NEG : HO_ABS, 1);
    if (t == PRED) {
      need(2);
      I.d = dreg(A[0], 1);
      I.a = B.reg(A[1], 1);
      I.sub = 1;
      return ok(h_pred1);
    }
    abc(1);
    if (t == F32)
      return ok(b == "neg" ? ((fl & 1) ? (Fn)H1(float, float, flush(-a))
                                       : (Fn)H1(uint32_t, uint32_t, (a ^ 0x80000000u)))
                           : ((fl & 1) ? (Fn)H1(float, float, flush(f_of(b_of(a) & 0x7fffffff)))
                                       : (Fn)H1(uint32_t, uint32_t, (a & 0x7fffffffu))));
    if (t == F64)
      return ok(b == "neg" ? (Fn)H1(uint64_t, uint64_t, (a ^ (1ull << 63)))
                           : (Fn)H1(uint64_t, uint64_t, (a & ~(1ull << 63))));
#define X(T) int1<T>(b)
    INT_SWITCH(t, X)
#undef X
    return ok(r);
  }
  if (b == "and" || b == "or" || b == "xor") {
    if (t == PRED) {
      need(3);
      I.d = dreg(A[0], 1);
      I.a = B.reg(A[1], 1);
      I.b = B.reg(A[2], 1);
      I.sub = b == "and" ? 0 : b == "or" ? 1 : 2;
      return ok(h_pred2);
    }
    abc(2);
#define X(T) int2<T>(b, false)
    INT_SWITCH(t, X)
#undef X
    return ok(r);
  }
  if (b == "shl" || b == "shr") {
    need(3);
    I.d = dreg(A[0], ty_size(t));
    I.a = B.typed(A[1], t);
    I.b = B.reg(A[2], 4);
#define X(T) int2<T>(b, false)
    INT_SWITCH(t, X)
#undef X
    return ok(r);
  }
  if (b == "rcp" || b == "sqrt" || b == "rsqrt" || b == "sin" || b == "cos" || b == "lg2" ||
      b == "ex2" || b == "tanh") {
    if (half)
      return half_op(b == "ex2"    ? HO_EX2
                     : b == "tanh" ? HO_TANH
                                   : (B.fail("instruction not implemented"), 0),
                     1);
    if (rm && (b == "rcp" || b == "sqrt")) return rounded_op(b == "rcp" ? 6 : 5, 1);
    abc(1);
    if (t == F64) {
      // rcp.approx.ftz.f64 and rsqrt.approx.f64: seeds for Newton iterations, about 20 bits
      if (has("approx")) {
        if (b == "rcp") return ok(H1(double, double, d_of(b_of(1.0 / a) & ~0xffffffffull)));
        return ok(H1(double, double, 1.0 / std::sqrt(a)));
      }
      return ok(b == "rcp"    ? (Fn)H1(double, double, 1.0 / a)
                : b == "sqrt" ? (Fn)H1(double, double, std::sqrt(a))
                              : nullptr);
    }
    if (b == "rcp") return ok(FLAGS_F32_1(1.0f / a));
    if (b == "sqrt") return ok(FLAGS_F32_1(std::sqrt(a)));
    if (b == "rsqrt") return ok(FLAGS_F32_1((float)(1.0 / std::sqrt((double)a))));
    if (b == "sin") return ok(FLAGS_F32_1((float)std::sin((double)a)));
    if (b == "cos") return ok(FLAGS_F32_1((float)std::cos((double)a)));
    if (b == "lg2") return ok(FLAGS_F32_1((float)std::log2((double)a)));
    if (b == "ex2") return ok(FLAGS_F32_1((float)std::exp2((double)a)));
    return ok(FLAGS_F32_1((float)std::tanh((double)a)));
  }
  if (b == "copysign") {
    abc(2);
    return ok(t == F32
                  ? (Fn)H2(uint32_t, uint32_t, uint32_t, (a & 0x80000000u) | (b & 0x7fffffffu))
                  : (Fn)H2(uint64_t, uint64_t, uint64_t, (a & (1ull << 63)) | (b & ~(1ull << 63))));
  }
  if (b == "testp") {
    need(2);
    I.d = B.reg(A[0], 1);
    I.a = B.typed(A[1], t);
    if (t == F64)
      return ok(has("finite")       ? (Fn)H1(uint8_t, double, std::isfinite(a))
                : has("infinite")   ? (Fn)H1(uint8_t, double, std::isinf(a))
                : has("number")     ? (Fn)H1(uint8_t, double, a == a)
                : has("notanumber") ? (Fn)H1(uint8_t, double, a != a)
                : has("normal")
                    ? (Fn)H1(uint8_t, double, std::isnormal(a))
                    : (Fn)H1(uint8_t, double, a != 0 && std::isfinite(a) && !std::isnormal(a)));
    return ok(has("finite")       ? (Fn)H1(uint8_t, float, std::isfinite(a))
              : has("infinite")   ? (Fn)H1(uint8_t, float, std::isinf(a))
              : has("number")     ? (Fn)H1(uint8_t, float, a == a)
              : has("notanumber") ? (Fn)H1(uint8_t, float, a != a)
              : has("normal")
                  ? (Fn)H1(uint8_t, float, std::isnormal(a))
                  : (Fn)H1(uint8_t, float, a != 0 && std::isfinite(a) && !std::isnormal(a)));
  }
  if (b == "popc" || b == "clz" || b == "brev" || b == "bfind") {
    need(2);
    I.d = dreg(A[0], b == "brev" ? ty_size(t) : 4);
    I.a = B.typed(A[1], t);
    I.size = (uint8_t)ty_size(t);
    bool q = ty_size(t) == 8;
    if (b == "popc")
      return ok(q ? (Fn)H1(uint32_t, uint64_t, __builtin_popcountll(a))
                  : (Fn)H1(uint32_t, uint32_t, __builtin_popcount(a)));
    if (b == "clz")
      return ok(q ? (Fn)H1(uint32_t, uint64_t, a ? __builtin_clzll(a) : 64)
                  : (Fn)H1(uint32_t, uint32_t, a ? __builtin_clz(a) : 32));
    if (b == "brev")
      return ok(q ? (Fn)H1(uint64_t, uint64_t,
                           (uint64_t)brev32((uint32_t)a) << 32 | brev32((uint32_t)(a >> 32)))
                  : (Fn)H1(uint32_t, uint32_t, brev32(a)));
    if (t == S32 || t == S64) I.flags |= FL_SIGNED;
    I.sub = has("shiftamt");
    return ok(h_bfind);
  }
  if (b == "fns") {
    need(4);
    I.d = dreg(A[0], 4);
    I.a = B.reg(A[1], 4);
    I.b = B.reg(A[2], 4);
    I.c = B.reg(A[3], 4);
    return ok(h_fns);
  }
  if (b == "bfe") {
    need(4);
    I.d = dreg(A[0], ty_size(t));
    I.a = B.typed(A[1], t);
    I.b = B.reg(A[2], 4);
    I.c = B.reg(A[3], 4);
    I.size = (uint8_t)ty_size(t);
    if (t == S32 || t == S64) I.flags |= FL_SIGNED;
    return ok(h_bfe);
  }
  if (b == "bfi") {
    need(5);
    I.d = dreg(A[0], ty_size(t));
    I.a = B.typed(A[1], t);
    I.b = B.typed(A[2], t);
    I.c = B.reg(A[3], 4);
    I.e = B.reg(A[4], 4);
    I.size = (uint8_t)ty_size(t);
    return ok(h_bfi);
  }
  if (b == "bmsk") {
    need(3);
    I.d = dreg(A[0], 4);
    I.a = B.reg(A[1], 4);
    I.b = B.reg(A[2], 4);
    return ok(
        H2(uint32_t, uint32_t, uint32_t, (a >= 32 ? 0u : (b >= 32 ? ~0u : (1u << b) - 1) << a)));
  }
  if (b == "szext") {
    need(3);
    I.d = dreg(A[0], 4);
    I.a = B.reg(A[1], 4);
    I.b = B.reg(A[2], 4);
    return ok(t == S32 ? (Fn)H2(int32_t, int32_t, uint32_t,
                                b >= 32  ? a
                                : b == 0 ? 0
                                         : (int32_t)((uint32_t)a << (32 - b)) >> (32 - b))
                       : (Fn)H2(uint32_t, uint32_t, uint32_t, b >= 32 ? a : a & ((1u << b) - 1)));
  }
  if (b == "lop3") {
    if (A.size() != 5) B.fail("lop3 with a predicate result is not implemented");
    I.d = dreg(A[0], 4);
    I.a = B.reg(A[1], 4);
    I.b = B.reg(A[2], 4);
    I.c = B.reg(A[3], 4);
    I.imm = (int64_t)A[4].bits;
    return ok(h_lop3);
  }
  if (b == "prmt") {
    need(4);
    I.d = dreg(A[0], 4);
    I.a = B.reg(A[1], 4);
    I.b = B.reg(A[2], 4);
    I.c = B.reg(A[3], 4);
    I.sub = has("f4e")    ? 1
            : has("b4e")  ? 2
            : has("rc8")  ? 3
            : has("ecl")  ? 4
            : has("ecr")  ? 5
            : has("rc16") ? 6
                          : 0;
    return ok(h_prmt);
  }
  if (b == "shf") {
    need(4);
    I.d = dreg(A[0], 4);
    I.a = B.reg(A[1], 4);
    I.b = B.reg(A[2], 4);
    I.c = B.reg(A[3], 4);
    I.sub = (has("r") ? 1 : 0) | (has("clamp") ? 2 : 0);
    return ok(h_shf);
  }
  if (b == "vabsdiff4") {
    need(4);
    I.d = dreg(A[0], 4);
    I.a = B.reg(A[1], 4);
    I.b = B.reg(A[2], 4);
    I.c = B.reg(A[3], 4);
    I.sub = (t2 == S32 ? 1 : 0) | (t == S32 ? 2 : 0) | (has("add") ? 4 : 0);
    return ok(h_vabsdiff4);
  }
  if (b == "dp4a") {
    need(4);
    I.d = dreg(A[0], 4);
    I.a = B.reg(A[1], 4);
    I.b = B.reg(A[2], 4);
    I.c = B.reg(A[3], 4);
    I.sub = (t2 == S32 ? 1 : 0) | (t == S32 ? 2 : 0);
    return ok(h_dp4a);
  }

  // ---- comparison and selection
  if (b == "setp" || b == "set") {
    bool isf = t == F32 || t == F64 || half;
    I.sub = 0;
    int c = -1;
    for (size_t i = 1; i < op.size() && c < 0; ++i) c = cmp_parse(op[i], isf);
    if (c < 0) B.fail("unknown comparison");
    I.sub = (uint8_t)c;
    I.imm = has("and") ? 1 : has("or") ? 2 : has("xor") ? 3 : 0;
    need(3);
    I.a = B.typed(A[1], t);
    I.b = B.typed(A[2], t);
    if (I.imm) {
      need(4);
      I.c = B.reg(A[3], 1);
    }
    if (b == "set") {
      I.d = dreg(A[0], 4);
      I.size = (uint8_t)t;
      I.vec = t2 == F32      ? 1
              : t2 == F16    ? 2
              : t2 == BF16   ? 3
              : t2 == F16X2  ? 4
              : t2 == BF16X2 ? 5
                             : 0;
      return ok(h_set);
    }
    I.d = dreg(A[0], 1);
    if (!A[0].v.empty()) I.d2 = dreg(A[0].v[0], 1);
    if (half) {
      I.size = (uint8_t)ty_size(t);
      return ok(t == F16 || t == F16X2 ? h_setp_half<HF> : h_setp_half<HB>);
    }
    if (t == F32) return ok(h_setp<float>);
    if (t == F64) return ok(h_setp<double>);
#define X(T) h_setp<T>
    INT_SWITCH(t, X)
#undef X
    return ok(r);
  }
  if (b == "selp") {
    need(4);
    I.d = dreg(A[0], ty_size(t));
    I.a = B.typed(A[1], t);
    I.b = B.typed(A[2], t);
    I.c = B.reg(A[3], 1);
    int s = ty_size(t);
    return ok(s == 1   ? h_selp<uint8_t>
              : s == 2 ? h_selp<uint16_t>
              : s == 4 ? h_selp<uint32_t>
                       : h_selp<uint64_t>);
  }
  if (b == "slct") {
    need(4);
    I.d = dreg(A[0], ty_size(t2));
    I.a = B.typed(A[1], t2);
    I.b = B.typed(A[2], t2);
    I.c = B.typed(A[3], t);
    I.sub = t == F32;
    return ok(h_slct);
  }

  // ---- moves and conversions
  if (b == "mov") {
    need(2);
    I.kind = K_MOVE;
    if (A[0].k == Operand::VEC && A[1].k == Operand::VEC) B.fail("vector to vector move");
    if (A[1].k == Operand::VEC) {
      I.d = B.reg(A[0], ty_size(t));
      int es = ty_size(t) / (int)A[1].v.size();
      for (auto& o : A[1].v) {
        Opn x = o.k == Operand::IMM ? B.cst(o.bits, es) : B.reg(o, es);
        x.size = x.size;
        I.ops.push_back(x);
      }
      for (auto& x : I.ops)
        if (x.size != es) B.fail("pack with a register of another size");
      return ok(h_pack);
    }
    if (A[0].k == Operand::VEC) {
      I.unpacks = true;
      I.a = B.reg(A[1], ty_size(t));
      I.size = (uint8_t)(ty_size(t) / A[0].v.size());
      for (auto& o : A[0].v) {
        if (o.k == Operand::SINK)
          I.ops.push_back(Opn());
        else
          I.ops.push_back(B.reg(o, I.size));
      }
      return ok(h_unpack);
    }
    I.d = B.reg(A[0], ty_size(t));
    if (A[1].k == Operand::REG && A[1].s.compare(0, 6, "%clock") == 0) {
      I.sub = A[1].s == "%clock_hi";
      return ok(h_clock);
    }
    if (A[1].k == Operand::REG && A[1].s.compare(0, 12, "%globaltimer") == 0) {
      I.sub = A[1].s == "%globaltimer_hi";
      return ok(h_clock);
    }
    if (t == PRED) {
      I.a = B.reg(A[1], 1);
      return ok(h_pred1);
    }
    I.a = B.typed(A[1], t);
    return ok(h_mov);
  }
  if (b == "cvt") {
    need(2);
    if (t == F32X2 || t2 == T_NONE) B.fail("conversion not implemented");
    int irm = has("rni") ? 8 : has("rzi") ? 9 : has("rmi") ? 10 : has("rpi") ? 11 : 0;
    if (has("satfinite"))
      I.flags |= FL_NAN;
    else
      I.flags &= ~FL_NAN;
    bool packed = t2 == F16X2 || t2 == BF16X2 || t2 == E4M3X2 || t2 == E5M2X2;
    I.d = dreg(A[0], ty_size(t2));
    if (packed) {
      I.size = (uint8_t)t2;
      I.sub = (uint8_t)t;
      I.imm = rm;
      I.a = B.typed(A[1], t);
      if (t == F32) {
        need(3);
        I.b = B.typed(A[2], t);
        if (has("rs")) {
          need(4);
          I.c = B.reg(A[3], 4);
        }
      }
      return ok(h_cvt2);
    }
    if (has("rs")) B.fail("scalar stochastic rounding is not implemented");
    I.size = (uint8_t)t2;
    I.sub = (uint8_t)t;
    I.a = B.typed(A[1], t);
    I.imm = irm ? irm : has("rna") ? 4 : rm;
    if (t == F32 && t2 == S32 && (irm & 7) == 1 && !fl)
      return ok(H1(int32_t, float,
                   a != a                ? 0
                   : a >= 2147483648.0f  ? INT32_MAX
                   : a <= -2147483648.0f ? INT32_MIN
                                         : (int32_t)a));
    if (t == F32 && t2 == BF16 && !rm && !I.flags) return ok(H1(uint16_t, float, bf_rn(a)));
    if (t == F32 && t2 == F16 && !rm && !I.flags) return ok(H1(uint16_t, float, half_rn(a)));
    if (t == F16 && t2 == F32 && !I.flags) return ok(H1(float, uint16_t, fout<0>(from_half(a))));
    if (t == BF16 && t2 == F32 && !I.flags) return ok(H1(float, uint16_t, fout<0>(from_bf(a))));
    if (t == F32 && t2 == F64 && !I.flags) return ok(H1(double, float, a));
    if (t == F64 && t2 == F32 && !rm && !I.flags) return ok(H1(float, double, fout<0>((float)a)));
    if (t == S32 && t2 == S64) return ok(H1(int64_t, int32_t, a));
    if (t == U32 && t2 == U64) return ok(H1(uint64_t, uint32_t, a));
    if ((t == U64 || t == S64) && (t2 == U32 || t2 == S32) && !fl)
      return ok(H1(uint32_t, uint64_t, (uint32_t)a));
    if (t == S32 && t2 == F32 && !rm && !irm) return ok(H1(float, int32_t, (float)a));
    if (t == U32 && t2 == F32 && !rm && !irm) return ok(H1(float, uint32_t, (float)a));
    return ok(h_cvt);
  }
  if (b == "cvta") {
    need(2);
    I.kind = K_MOVE;
    I.d = dreg(A[0], ty_size(t));
    I.a = B.reg(A[1], ty_size(t));
    I.sub = has("to");
    I.space = has("shared") ? SP_SHARED : has("local") ? SP_LOCAL : SP_GLOBAL;
    if (I.space == SP_GLOBAL) return ok(h_mov);
    return ok(cvta);
  }
  if (b == "isspacep") {
    need(2);
    I.d = B.reg(A[0], 1);
    I.a = B.reg(A[1], 8);
    I.space = has("shared")  ? SP_SHARED
              : has("local") ? SP_LOCAL
              : has("param") ? SP_PARAM
                             : SP_GLOBAL;
    return ok(isspacep);
  }
  if (b == "mapa" || b == "getctarank") {  // clusters of one block
    need(2);
    if (b == "getctarank") {
      I.d = dreg(A[0], 4);
      return ok(h_zero);
    }
    I.d = dreg(A[0], ty_size(t));
    I.a = B.reg(A[1], ty_size(t));
    return ok(h_mov);
  }

  // ---- memory
  auto space = [&] {
    for (size_t i = 1; i < op.size(); ++i) {
      if (op[i] == "global") return SP_GLOBAL;
      if (op[i].substr(0, 6) == "shared") return SP_SHARED;
      if (op[i] == "local") return SP_LOCAL;
      if (op[i].substr(0, 5) == "param") return SP_PARAM;
      if (op[i] == "const") return SP_CONST;
    }
    return SP_GENERIC;
  };
  auto sem = [&] {
    if (has("volatile") || has("relaxed") || has("mmio")) I.flags |= FL_VOL;
    if (has("acquire") || has("acq_rel")) I.flags |= FL_ACQ;
    if (has("release") || has("acq_rel")) I.flags |= FL_REL;
  };
  if (b == "ld" || b == "ldu" || b == "st") {
    need(2);
    bool load = b != "st";
    I.kind = load ? K_LD : K_ST;
    if (has("nc")) I.flags |= FL_NC;
    Operand& M = load ? A[1] : A[0];
    Operand& V = load ? A[0] : A[1];
    I.space = space();
    sem();
    bool par = I.space == SP_PARAM;
    B.mem(I, M, par);
    if (par && I.space == SP_PARAM && !load) B.fail("store to kernel parameters");
    int vec = has("v2") ? 2 : has("v4") ? 4 : has("v8") ? 8 : 1, es = ty_size(t);
    I.size = (uint8_t)es;
    I.vec = (uint8_t)vec;
    if (t == S8 || t == S16 || t == S32 || t == S64) I.flags |= FL_SIGNED;
    if (vec > 1) {
      if (V.k != Operand::VEC || (int)V.v.size() != vec) B.fail("vector operand expected");
      for (auto& o : V.v) I.ops.push_back(load ? dreg(o, es) : B.typed(o, t));
    } else {
      Operand& o = V.k == Operand::VEC ? V.v[0] : V;
      I.ops.push_back(load ? dreg(o, es) : B.typed(o, t));
    }
    return ok(load ? ld_fn(es, vec) : st_fn(es, vec));
  }
  if (b == "ldmatrix" || b == "stmatrix") {
    need(2);
    const bool load = b == "ldmatrix";
    if (!has("m8n8") || !has("b16")) B.fail("matrices of another shape or type");
    I.kind = load ? K_LD : K_ST;
    I.space = SP_SHARED;
    I.sub = has("trans");
    I.vec = has("x4") ? 4 : has("x2") ? 2 : 1;
    B.mem(I, A[load ? 1 : 0], false);
    Operand& V = A[load ? 0 : 1];
    if (V.k == Operand::VEC && (int)V.v.size() != I.vec) B.fail("as many registers as matrices");
    if (V.k != Operand::VEC && I.vec > 1) B.fail("vector operand expected");
    for (int v = 0; v < I.vec; ++v) {
      Operand& o = V.k == Operand::VEC ? V.v[v] : V;
      I.ops.push_back(load ? dreg(o, 4) : B.reg(o, 4));
      if (I.ops[v].size != 4) B.fail("registers of 32 bits expected");
    }
    I.e = B.cst(~0u, 4);
    I.ctl = C_WSYNC;
    return ok(matrices);
  }
  if (b == "atom" || b == "red") {
    if (op.size() > 1 && op[1] == "async") B.fail("instruction not implemented");
    I.space = space();
    sem();
    I.kind = K_ATOM;
    bool at = b == "atom";
    size_t k = at ? 1 : 0;
    need(k + 2);
    B.mem(I, A[k], false);
    static const std::pair<const char*, int> names[] = {
        {"add", A_ADD}, {"min", A_MIN},   {"max", A_MAX}, {"and", A_AND}, {"or", A_OR},
        {"xor", A_XOR}, {"exch", A_EXCH}, {"cas", A_CAS}, {"inc", A_INC}, {"dec", A_DEC}};
    int o = -1;
    for (auto& n : names)
      if (has(n.first)) o = n.second;
    if (o < 0) B.fail("unknown atomic operation");
    if (t == B128) B.fail("128-bit atomics are not implemented");
    I.sub = (uint8_t)o;
    I.size = (uint8_t)t;
    I.vec = has("v2") ? 2 : has("v4") ? 4 : has("v8") ? 8 : 1;
    if (I.vec > 1) {
      for (auto& x : A[k + 1].v) I.ops.push_back(B.typed(x, t));
      if (at) {
        I.targets.resize(I.vec);
        for (int v = 0; v < I.vec; ++v) {
          Opn d = dreg(A[0].v[v], ty_size(t));
          if (!v) I.d = d;
          I.targets[v] = (uint32_t)d.off;
        }
      }
    } else {
      I.ops.push_back(B.typed(A[k + 1], t));
      if (o == A_CAS) {
        need(k + 3);
        I.c = B.typed(A[k + 2], t);
      }
      if (at) I.d = dreg(A[0], ty_size(t));
    }
    return ok(h_atom);
  }
  if (b == "cp" && op.size() > 1 && op[1] == "async") {
    if (has("wait_group") || has("wait_all")) I.kind = K_FENCE;
    if (has("commit_group") || I.kind == K_FENCE) return ok(h_nop);
    I.kind = K_ASYNC;
    if (has("bulk") || has("mbarrier")) B.fail("bulk copies and mbarriers are not implemented");
    need(3);
    Inst t1, t2i;
    t1.space = SP_SHARED;
    t2i.space = SP_GLOBAL;
    B.mem(t1, A[0], false);
    B.mem(t2i, A[1], false);
    I.a = t1.a;
    I.imm = t1.imm;
    I.b = t2i.a;
    I.target = (uint32_t)(int32_t)t2i.imm;
    I.size = (uint8_t)A[2].bits;
    if (A.size() > 3 && !(A.size() == 4 && has("L2") && false)) {
      if (A[3].k == Operand::IMM || A[3].k == Operand::REG) I.c = B.reg(A[3], 4);
      if (I.c.size == 8) I.c = Opn();
    }
    return ok(cp_async);
  }
  if (b == "prefetch" || b == "prefetchu" || b == "applypriority" || b == "discard" ||
      b == "griddepcontrol" || b == "pmevent" || b == "setmaxnreg")
    return ok(h_nop);
  if (b == "createpolicy") {
    need(1);
    I.d = dreg(A[0], 8);
    return ok(h_zero);
  }

  // ---- synchronization
  if (b == "membar" || b == "fence") {
    if (has("cta") || (b == "fence" && has("proxy"))) return ok(h_nop);
    I.kind = K_FENCE;
    return ok(fence_event);
  }
  if (b == "nanosleep") {
    I.fn = h_nop;
    I.ctl = C_YIELD;
    return;
  }
  if ((b == "bar" || b == "barrier") && (has("warp"))) {
    need(1);
    I.e = B.reg(A[0], 4);
    I.ctl = C_WSYNC;
    return ok(h_nop);
  }
  if (b == "barrier" && has("cluster")) {
    if (has("arrive")) return ok(h_nop);
    I.ctl = C_BAR;
    I.a = B.cst(15, 4);
    I.imm = -1;
    return ok(h_nop);
  }
  if (b == "bar" || b == "barrier") {
    I.ctl = C_BAR;
    if (b == "bar" || has("aligned")) I.flags |= FL_ALIGNED;
    if (has("red")) {
      need(3);
      I.sub = 2;
      I.imm = has("popc") ? 1 : has("and") ? 2 : 3;
      I.d = dreg(A[0], I.imm == 1 ? 4 : 1);
      I.a = B.reg(A[1], 4);
      if (A.size() == 4) {
        I.b = B.reg(A[2], 4);
        I.c = B.reg(A[3], 1);
      } else
        I.c = B.reg(A[2], 1);
      return ok(h_nop);
    }
    I.sub = has("arrive") ? 1 : 0;
    need(1);
    I.a = B.reg(A[0], 4);
    if (A.size() > 1) I.b = B.reg(A[1], 4);
    return ok(h_nop);
  }
  if (b == "shfl") {
    if (!has("sync")) B.fail("shfl without .sync is not supported on this architecture");
    need(5);
    I.d = dreg(A[0], 4);
    if (!A[0].v.empty()) I.d2 = dreg(A[0].v[0], 1);
    I.a = B.typed(A[1], B32);
    I.b = B.reg(A[2], 4);
    I.c = B.reg(A[3], 4);
    I.e = B.reg(A[4], 4);
    I.sub = has("up") ? 0 : has("down") ? 1 : has("bfly") ? 2 : 3;
    I.ctl = C_WSYNC;
    return ok(h_shfl);
  }
  if (b == "vote") {
    if (!has("sync")) B.fail("vote without .sync is not supported on this architecture");
    need(3);
    I.sub = has("all") ? 0 : has("any") ? 1 : has("uni") ? 2 : 3;
    I.d = dreg(A[0], I.sub == 3 ? 4 : 1);
    I.a = B.reg(A[1], 1);
    I.e = B.reg(A[2], 4);
    I.ctl = C_WSYNC;
    return ok(h_vote);
  }
  if (b == "match") {
    need(3);
    I.d = dreg(A[0], 4);
    if (!A[0].v.empty()) I.d2 = dreg(A[0].v[0], 1);
    I.a = B.typed(A[1], t);
    I.e = B.reg(A[2], 4);
    I.sub = has("all");
    I.size = (uint8_t)ty_size(t);
    I.ctl = C_WSYNC;
    return ok(h_match);
  }
  if (b == "redux") {
    need(3);
    I.d = dreg(A[0], 4);
    I.a = B.typed(A[1], t);
    I.e = B.reg(A[2], 4);
    I.size = (uint8_t)t;
    I.sub = has("add") ? 0 : has("min") ? 1 : has("max") ? 2 : has("and") ? 3 : has("or") ? 4 : 5;
    I.ctl = C_WSYNC;
    return ok(h_redux);
  }
  if (b == "activemask") {
    need(1);
    I.d = dreg(A[0], 4);
    return ok(h_activemask);
  }
  if (b == "elect") {
    need(2);
    I.d = dreg(A[0], 4);
    if (!A[0].v.empty()) I.d2 = dreg(A[0].v[0], 1);
    I.e = B.reg(A[1], 4);
    I.ctl = C_WSYNC;
    return ok(h_elect);
  }
  B.fail("instruction not implemented");
}
}  // namespace gs
