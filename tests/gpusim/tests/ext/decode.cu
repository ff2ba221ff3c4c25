// Kernels that only have to be decodable: the math library, half types, atomics, barriers, device
// calls with structs.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_pipeline.h>

#include <cuda/atomic>
#define U1(f) \
  __global__ void k_##f(float* x) { x[threadIdx.x] = f(x[threadIdx.x]); }
#define D1(f) \
  __global__ void d_##f(double* x) { x[threadIdx.x] = f(x[threadIdx.x]); }
// clang-format off
U1(expf) U1(exp2f) U1(exp10f) U1(expm1f) U1(logf) U1(log2f) U1(log10f) U1(log1pf) U1(sinf)
U1(cosf) U1(tanf) U1(asinf) U1(acosf) U1(atanf) U1(sinhf) U1(coshf) U1(tanhf) U1(erff)
U1(erfcf) U1(erfinvf) U1(lgammaf) U1(tgammaf) U1(cbrtf) U1(sqrtf) U1(rsqrtf) U1(roundf)
U1(nearbyintf) U1(ceilf) U1(floorf) U1(truncf) U1(j0f) U1(normcdff) U1(__expf) U1(__logf)
U1(__sinf) U1(__frsqrt_rn) U1(__fsqrt_rd) U1(logbf)
D1(exp) D1(log) D1(sin) D1(cos) D1(tan) D1(tanh) D1(erf) D1(lgamma) D1(sqrt) D1(rsqrt)
D1(cbrt) D1(atan) D1(log1p) D1(expm1) D1(round) D1(rint) D1(tgamma) D1(acos);
// clang-format on
__global__ void two(float* x, double* d) {
  int i = threadIdx.x;
  x[i] = powf(x[i], x[i + 1]) + fmodf(x[i], 3.f) + atan2f(x[i], x[i + 2]) + hypotf(x[i], 1) +
         ldexpf(x[i], 3) + remainderf(x[i], 2) + nextafterf(x[i], 1);
  d[i] = pow(d[i], d[i + 1]) + fmod(d[i], 3.) + atan2(d[i], 2.) + __dadd_rz(d[i], 1) +
         __ddiv_ru(d[i], 3) + __dsqrt_rd(d[i]) + __fma_rd(d[i], 2, 3);
  int e;
  x[i] += frexpf(x[i], &e) + e;
  float s, c;
  sincosf(x[i], &s, &c);
  x[i] += s * c + isnan(x[i]) + isinf(x[i]) + signbit(x[i]) + ilogbf(x[i]);
  x[i] += __double2float_rd(d[i]) + __ll2float_rz((long long)d[i]) + __float2uint_ru(x[i]) +
          __double2ll_rn(d[i]) + __float2ll_rd(x[i]) + __int_as_float(3) + __hiloint2double(1, 2) +
          __double2loint(d[i]);
}
__global__ void h(__half* a, __half2* b, __nv_bfloat16* c, __nv_bfloat162* d, float* o) {
  int i = threadIdx.x;
  __half x = a[i];
  __half2 y = b[i];
  __nv_bfloat16 z = c[i];
  __nv_bfloat162 w = d[i];
  a[i] = hexp(x) + hlog(x) + hsqrt(x) + hrcp(x) + htanh(x) + hsin(x) + hfloor(x) +
         __hmax(x, a[i + 1]) + __hmin_nan(x, a[i + 2]) + __habs(x) + __hneg(x) + (x / a[i + 4]);
  b[i] = __hfma2_relu(y, y, b[i + 1]) + __hmax2(y, b[i + 2]) + h2exp(y) + __h2div(y, b[i + 3]) +
         __hfma2_sat(y, y, y);
  c[i] = hexp(z) + hlog(z) + z * c[i + 1] + __hmax(z, c[i + 2]) + hrcp(z) + hsqrt(z) +
         (z / c[i + 2]) + htanh(z);
  d[i] = __hfma2(w, w, d[i + 1]) + __hmax2(w, d[i + 2]) + h2exp(w) + __habs2(w) + __hneg2(w) +
         h2rsqrt(w);
  o[i] = __half2float(x) + (x < a[i + 3]) + (z > c[i + 3]) + __hbeq2(y, b[i + 4]) +
         __half2int_rn(x) + __half2ull_rz(x) + (int)__short_as_half(3) + __bfloat162int_rz(z) +
         __half2short_rd(x) + (float)__float2bfloat16_rz(o[i]) + (float)__float2half_ru(o[i]) +
         (float)__double2half((double)o[i]) + __hisnan(x) + (float)__int2half_rn(i) +
         (float)__ull2bfloat16_rn(i);
  __nv_fp8_e4m3 q(o[i]);
  __nv_fp8_e5m2 r(o[i]);
  o[i + 1] = (float)q + (float)r;
  __half2 cm = __heq2(y, b[i + 5]);
  b[i + 1] = cm;
  o[i] += __low2float(__hgtu2(y, b[i]));
  unsigned mm = __hle2_mask(y, b[i + 2]);
  o[i] += mm;
  o[i] += __vadd2(mm, 3) + __vmaxs2(mm, 5) + __vcmpgtu4(mm, 7) + __vabsdiffu4(mm, 9) +
          __vsadu4(mm, 2) + __viaddmax_s32(mm, 3, 4) + __vimax3_s32(mm, 1, 2);
}
__global__ void at(int* a, unsigned long long* b, unsigned short* c, float* f,
                   cuda::atomic<int, cuda::thread_scope_device>* q) {
  __shared__ int s[32];
  __shared__ float sf;
  s[threadIdx.x] = 0;
  atomicAdd(&s[3], 1);
  atomicAdd(&sf, 1.f);
  atomicAdd_block(a, 1);
  atomicAdd_system(a + 1, 2);
  atomicCAS(b, 1ull, 2ull);
  atomicCAS(c, (unsigned short)1, (unsigned short)2);
  atomicMax(b + 1, 3ull);
  atomicSub(a, 3);
  atomicDec((unsigned*)a, 3);
  atomicExch(f, 2.f);
  atomicAnd(a, 3);
  q->fetch_add(1, cuda::memory_order_acq_rel);
  q->load(cuda::memory_order_acquire);
  q->store(2, cuda::memory_order_release);
  int e = 3;
  q->compare_exchange_strong(e, 4);
  atomicAdd((float4*)f, make_float4(1, 2, 3, 4));
  __nanosleep(10);
  __threadfence_block();
  __threadfence_system();
  a[5] = __ldcg(a + 6) + __ldcs(a + 7) + __ldlu(a + 8) + __ldca(a + 1);
  __stwt(a + 2, 3);
  __stcg(a + 4, 3);
  a[7] = __syncthreads_or(a[1]) + __syncthreads_and(a[2]);
  a[9] = __reduce_max_sync(~0u, a[1]) + __reduce_or_sync(~0u, (unsigned)a[1]) + __fns(a[1], 2, 3) +
         __clzll(b[1]) + __popcll(b[2]) + __ffs(a[3]);
  a[11] = __isGlobal(a) + __isShared(s) + __cvta_generic_to_shared(s) + clock() + (int)clock64();
}
__global__ void pipe(const float4* g, float4* o) {
  __shared__ float4 s[64];
  __pipeline_memcpy_async(&s[threadIdx.x], g + threadIdx.x, 16);
  __pipeline_commit();
  __pipeline_wait_prior(0);
  __syncthreads();
  o[threadIdx.x] = s[63 - threadIdx.x];
}
__global__ void i128(__int128* a, long long* b) {
  a[0] = a[1] * a[2] + a[3];
  b[0] = (long long)(a[1] / (b[1] | 1));
}
struct B {
  virtual __device__ float f(float x) { return x; }
};
struct C : B {
  __device__ float f(float x) override { return x * 2; }
};
struct S40 {
  double a[5];
};
__device__ __noinline__ S40 big(S40 s, int k) {
  for (int i = 0; i < 5; i++) s.a[i] *= k;
  return s;
}
__global__ void structs(S40* s, int k) {
  S40 r = big(s[threadIdx.x], k);
  s[threadIdx.x] = r;
}
int main() {}
