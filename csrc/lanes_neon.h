// Lanes on 64-bit ARM, see lanes.h. Every such processor has NEON, whose registers hold 16 bytes:
// two make the 32 of a register here, so that what is summed together is what AVX2 sums together.
// Stores past the caches are left to the processors, which notice long runs of stores by
// themselves.
#pragma once

#include <arm_neon.h>

#define SWA_FAST_LANES

namespace swa_fast {

template <typename Math>
struct Lanes;

template <>
struct Lanes<double> {
  struct Register {
    float64x2_t low, high;
  };
  static constexpr int kCount = 4;
  static constexpr int kParts = 1;

  static inline Register widen(float32x4_t v) {
    return {vcvt_f64_f32(vget_low_f32(v)), vcvt_high_f64_f32(v)};
  }
  static inline Register load(const double* p) { return {vld1q_f64(p), vld1q_f64(p + 2)}; }
  static inline Register load(const float* p) { return widen(vld1q_f32(p)); }
  static inline Register load(const BFloat16* p) {
    const uint16x4_t four = vld1_u16(reinterpret_cast<const uint16_t*>(p));
    return widen(vreinterpretq_f32_u32(vshll_n_u16(four, 16)));
  }
  static inline Register load(const Half* p) {
    const uint16x4_t four = vld1_u16(reinterpret_cast<const uint16_t*>(p));
    return widen(vcvt_f32_f16(vreinterpret_f16_u16(four)));
  }

  static inline void store(double* p, Register v) {
    vst1q_f64(p, v.low);
    vst1q_f64(p + 2, v.high);
  }
  static inline void store(float* p, Register v) {
    vst1q_f32(p, vcvt_high_f32_f64(vcvt_f32_f64(v.low), v.high));
  }
  template <typename Narrow>
  static inline void store(Narrow* p, Register v);
  static inline void stream(double* p, Register v) { store(p, v); }

  static inline Register broadcast(double x) { return {vdupq_n_f64(x), vdupq_n_f64(x)}; }
  static inline Register add(Register a, Register b) {
    return {vaddq_f64(a.low, b.low), vaddq_f64(a.high, b.high)};
  }
  static inline Register sub(Register a, Register b) {
    return {vsubq_f64(a.low, b.low), vsubq_f64(a.high, b.high)};
  }
  static inline Register mul(Register a, Register b) {
    return {vmulq_f64(a.low, b.low), vmulq_f64(a.high, b.high)};
  }
  static inline Register fma(Register a, Register b, Register c) {
    return {vfmaq_f64(c.low, a.low, b.low), vfmaq_f64(c.high, a.high, b.high)};
  }
  static inline Register blend(Register base, Register c, Register a, Register b) {
    return fma(c, sub(b, a), base);
  }
  static inline Register relu(Register a) { return {relu(a.low), relu(a.high)}; }
  static inline float64x2_t relu(float64x2_t a) {
    const float64x2_t zero = vdupq_n_f64(0.0);
    return vbslq_f64(vcltq_f64(a, zero), zero, a);
  }
  static inline Register part(Register a, int) { return a; }
};

template <>
struct Lanes<float> {
  struct Register {
    float32x4_t low, high;
  };
  using Bits = uint16x8_t;  // eight numbers of 16 bits
  static constexpr int kCount = 8;
  static constexpr int kParts = 2;

  static inline Register load(const float* p) { return {vld1q_f32(p), vld1q_f32(p + 4)}; }
  static inline Register load(const BFloat16* p) {
    const uint16x8_t eight = vld1q_u16(reinterpret_cast<const uint16_t*>(p));
    return {vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(eight), 16)),
            vreinterpretq_f32_u32(vshll_high_n_u16(eight, 16))};
  }
  static inline Register load(const Half* p) {
    const float16x8_t eight =
        vreinterpretq_f16_u16(vld1q_u16(reinterpret_cast<const uint16_t*>(p)));
    return {vcvt_f32_f16(vget_low_f16(eight)), vcvt_high_f32_f16(eight)};
  }

  static inline void store(float* p, Register v) {
    vst1q_f32(p, v.low);
    vst1q_f32(p + 4, v.high);
  }
  static inline void store(BFloat16* p, Register v) {
    const auto increment = [](float32x4_t x) {
      const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits(x), 16), vdupq_n_u32(1));
      return vaddq_u32(odd, vdupq_n_u32(0x7fff));
    };
    store_rounded(p, v, increment(v.low), increment(v.high));
  }
  static inline void load_pair(const BFloat16* p, Register& even, Register& odd) {
    const uint16_t* const numbers = reinterpret_cast<const uint16_t*>(p);
    const uint32x4_t low = vreinterpretq_u32_u16(vld1q_u16(numbers));
    const uint32x4_t high = vreinterpretq_u32_u16(vld1q_u16(numbers + 8));
    const uint32x4_t upper = vdupq_n_u32(0xffff0000);
    even = {vreinterpretq_f32_u32(vshlq_n_u32(low, 16)),
            vreinterpretq_f32_u32(vshlq_n_u32(high, 16))};
    odd = {vreinterpretq_f32_u32(vandq_u32(low, upper)),
           vreinterpretq_f32_u32(vandq_u32(high, upper))};
  }
  template <bool kStream>
  static inline void store_pair(BFloat16* p, Register even, Register odd) {
    uint16_t* const numbers = reinterpret_cast<uint16_t*>(p);
    const auto both = [](float32x4_t a, float32x4_t b) {
      return vreinterpretq_u16_u32(vsriq_n_u32(rounded(b), rounded(a), 16));
    };
    vst1q_u16(numbers, both(even.low, odd.low));
    vst1q_u16(numbers + 8, both(even.high, odd.high));
  }
  // In the upper halves, to nearest even.
  static inline uint32x4_t rounded(float32x4_t x) {
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits(x), 16), vdupq_n_u32(1));
    const uint32x4_t sum = vaddq_u32(bits(x), vaddq_u32(odd, vdupq_n_u32(0x7fff)));
    return vbslq_u32(vceqq_f32(x, x), sum, vdupq_n_u32(0x7fc00000));
  }
  static inline void store_with(BFloat16* p, Register v, Bits random) {
    store_rounded(p, v, vmovl_u16(vget_low_u16(random)), vmovl_high_u16(random));
  }
  // The upper halves of v's bits plus the increments, at most 0xffff; a NaN stays one.
  static inline void store_rounded(BFloat16* p, Register v, uint32x4_t low, uint32x4_t high) {
    const uint16x8_t rounded = vshrn_high_n_u32(vshrn_n_u32(vaddq_u32(bits(v.low), low), 16),
                                                vaddq_u32(bits(v.high), high), 16);
    const uint16x8_t number =
        vmovn_high_u32(vmovn_u32(vceqq_f32(v.low, v.low)), vceqq_f32(v.high, v.high));
    vst1q_u16(reinterpret_cast<uint16_t*>(p), vbslq_u16(number, rounded, vdupq_n_u16(0x7fc0)));
  }
  static inline void store(Half* p, Register v) {
    const float16x8_t eight = vcvt_high_f16_f32(vcvt_f16_f32(v.low), v.high);
    vst1q_u16(reinterpret_cast<uint16_t*>(p), vreinterpretq_u16_f16(eight));
  }
  template <typename T>
  static inline void stream(T* p, Register v) {
    store(p, v);
  }

  static inline Register broadcast(float x) { return {vdupq_n_f32(x), vdupq_n_f32(x)}; }
  static inline Register add(Register a, Register b) {
    return {vaddq_f32(a.low, b.low), vaddq_f32(a.high, b.high)};
  }
  static inline Register sub(Register a, Register b) {
    return {vsubq_f32(a.low, b.low), vsubq_f32(a.high, b.high)};
  }
  static inline Register mul(Register a, Register b) {
    return {vmulq_f32(a.low, b.low), vmulq_f32(a.high, b.high)};
  }
  static inline Register fma(Register a, Register b, Register c) {
    return {vfmaq_f32(c.low, a.low, b.low), vfmaq_f32(c.high, a.high, b.high)};
  }
  static inline Register blend(Register base, Register c, Register a, Register b) {
    return fma(c, sub(b, a), base);
  }
  static inline Register relu(Register a) { return {relu(a.low), relu(a.high)}; }
  static inline float32x4_t relu(float32x4_t a) {
    const float32x4_t zero = vdupq_n_f32(0.0f);
    return vbslq_f32(vcltq_f32(a, zero), zero, a);
  }
  static inline Lanes<double>::Register part(Register a, int i) {
    return Lanes<double>::widen(i == 0 ? a.low : a.high);
  }

 private:
  static inline uint32x4_t bits(float32x4_t v) { return vreinterpretq_u32_f32(v); }
};

template <typename Narrow>
inline void Lanes<double>::store(Narrow* p, Register v) {
  static_assert(sizeof(Narrow) == 2);
  const float32x4_t four = vcvt_high_f32_f64(vcvt_f32_f64(v.low), v.high);
  Narrow eight[8];
  Lanes<float>::store(eight, {four, four});
  std::memcpy(p, eight, kCount * sizeof(Narrow));
}

constexpr bool cpu_has_lanes() { return true; }

}  // namespace swa_fast
