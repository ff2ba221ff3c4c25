#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cassert>

#include "kernels.h"

__global__ void k_vadd(const float* a, const float* b, float* o, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) o[i] = a[i] + b[i];
}
// float4 body and scalar tail
__global__ void k_axpy4(const float* x, float* y, float a, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x, n4 = n / 4;
  if (i < n4) {
    float4 u = reinterpret_cast<const float4*>(x)[i], v = reinterpret_cast<float4*>(y)[i];
    v.x = fmaf(a, u.x, v.x);
    v.y = fmaf(a, u.y, v.y);
    v.z = fmaf(a, u.z, v.z);
    v.w = fmaf(a, u.w, v.w);
    reinterpret_cast<float4*>(y)[i] = v;
  } else if (i - n4 < n % 4 && i >= n4) {
    int j = n4 * 4 + i - n4;
    y[j] = fmaf(a, x[j], y[j]);
  }
}
// multi-tensor lerp, table by value
__global__ void __launch_bounds__(256) k_lerp(LerpTable t, float w) {
  int which = t.block_tensor[blockIdx.x];
  long long base = (long long)t.block_chunk[blockIdx.x] * LERP_CHUNK;
  float* p = t.dst[which];
  const float* q = t.src[which];
  long long n = t.n[which] - base;
  if (n > LERP_CHUNK) n = LERP_CHUNK;
  p += base;
  q += base;
  if (n % 4 == 0 && (((uintptr_t)p | (uintptr_t)q) & 15) == 0) {
    for (int i = threadIdx.x; i < n / 4; i += blockDim.x) {
      float4 a = ((float4*)p)[i];
      const float4 b = __ldg((const float4*)q + i);
      a.x += w * (b.x - a.x);
      a.y += w * (b.y - a.y);
      a.z += w * (b.z - a.z);
      a.w += w * (b.w - a.w);
      ((float4*)p)[i] = a;
    }
  } else {
    for (int i = threadIdx.x; i < n; i += blockDim.x) p[i] += w * (q[i] - p[i]);
  }
}
// multi-tensor lerp, table in device memory: rows {dst, src, n}
__global__ void k_lerp_table(const long long* table, int tensors, float w) {
  for (int t = blockIdx.y; t < tensors; t += gridDim.y) {
    float* p = (float*)table[3 * t];
    const float* q = (const float*)table[3 * t + 1];
    long long n = table[3 * t + 2];
    for (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < n;
         i += (long long)gridDim.x * blockDim.x)
      p[i] += w * (q[i] - p[i]);
  }
}
// per-channel Welford over (N, C, L): shuffles, shared memory, barriers
struct Wf {
  float mean, m2, n;
};
__device__ Wf merge(Wf a, Wf b) {
  float n = a.n + b.n;
  if (n == 0.f) return a;
  float d = b.mean - a.mean;
  return {a.mean + d * (b.n / n), a.m2 + b.m2 + d * d * (a.n * b.n / n), n};
}
__global__ void k_welford(const float* x, float* mean, float* var, int N, int C, int L) {
  int c = blockIdx.x;
  Wf w = {0, 0, 0};
  for (int i = threadIdx.x; i < N * L; i += blockDim.x) {
    float v = x[(size_t)(i / L) * C * L + (size_t)c * L + i % L];
    w.n += 1;
    float d = v - w.mean;
    w.mean += d / w.n;
    w.m2 += d * (v - w.mean);
  }
  for (int o = 16; o; o >>= 1) {
    Wf b = {__shfl_down_sync(~0u, w.mean, o), __shfl_down_sync(~0u, w.m2, o),
            __shfl_down_sync(~0u, w.n, o)};
    w = merge(w, b);
  }
  __shared__ Wf s[32];
  if ((threadIdx.x & 31) == 0) s[threadIdx.x >> 5] = w;
  __syncthreads();
  if (threadIdx.x < 32) {
    w = threadIdx.x < blockDim.x / 32 ? s[threadIdx.x] : Wf{0, 0, 0};
    for (int o = 16; o; o >>= 1) {
      Wf b = {__shfl_down_sync(~0u, w.mean, o), __shfl_down_sync(~0u, w.m2, o),
              __shfl_down_sync(~0u, w.n, o)};
      w = merge(w, b);
    }
    if (threadIdx.x == 0) {
      mean[c] = w.mean;
      var[c] = w.m2 / w.n;
    }
  }
}
// sum of squares: dynamic shared memory, one atomic per block; the last block takes the square root
__device__ unsigned g_done;
__global__ void k_norm(const float* x, float* part, float* out, int n) {
  extern __shared__ float sm[];
  float a = 0;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x)
    a += x[i] * x[i];
  sm[threadIdx.x] = a;
  __syncthreads();
  for (int h = blockDim.x / 2; h; h >>= 1) {
    if (threadIdx.x < h) sm[threadIdx.x] += sm[threadIdx.x + h];
    __syncthreads();
  }
  __shared__ bool last;
  if (threadIdx.x == 0) {
    part[blockIdx.x] = sm[0];
    __threadfence();
    last = atomicAdd(&g_done, 1) == gridDim.x - 1;
  }
  __syncthreads();
  if (last && threadIdx.x == 0) {
    float s = 0;
    for (int i = 0; i < gridDim.x; ++i) s += ((volatile float*)part)[i];
    *out = sqrtf(s);
    g_done = 0;
  }
}
__global__ void k_sumsq(const float* x, float* out, int n) {
  float a = 0;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x)
    a += x[i] * x[i];
  for (int o = 16; o; o >>= 1) a += __shfl_xor_sync(~0u, a, o);
  if ((threadIdx.x & 31) == 0) atomicAdd(out, a);
}
__global__ void k_half(const float* x, __nv_bfloat16* b, __half* h, float* back, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  b[i] = __float2bfloat16(x[i]);
  h[i] = __float2half(x[i]);
  back[i] = __bfloat162float(__hmul(b[i], b[i])) + __half2float(__hfma(h[i], h[i], h[i]));
}
__global__ void k_oob(float* x, int n) { x[n + threadIdx.x - 1] = 1.f; }
__global__ void k_race(float* x) { x[0] = x[0] + 1.f; }
__global__ void k_divergent(float* x) {
  if (threadIdx.x < 16)
    __syncthreads();
  else
    x[threadIdx.x] = 1;
}
__global__ void k_math(const float* x, float* o, double* d, int* iv, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  float v = x[i];
  float* r = o + i * 8;
  r[0] = expf(v);
  r[1] = logf(fabsf(v) + 1e-3f);
  r[2] = tanhf(v);
  r[3] = sinf(v);
  r[4] = 1.f / (1.f + expf(-v));
  r[5] = powf(fabsf(v), 1.5f);
  r[6] = v / 3.f;
  r[7] = rsqrtf(v * v + 1.f);
  d[i] = exp((double)v) / 3.0;
  int k = __float2int_rn(v * 1000.f);
  iv[i * 4] = k / 7;
  iv[i * 4 + 1] = k % 7;
  iv[i * 4 + 2] = __popc(k) + __clz(k);
  iv[i * 4 + 3] = __mulhi(k, 123456789);
}
// a local array indexed at run time, a switch, a noinline call
__device__ __noinline__ float poly(const float* c, float x, int n) {
  float s = 0;
  for (int i = n - 1; i >= 0; --i) s = s * x + c[i];
  return s;
}
__global__ void k_local(const float* x, float* o, int k, int n) {
  int i = threadIdx.x;
  float c[6];
  for (int j = 0; j < 6; ++j) c[(j + k) % 6] = x[j] + i;
  float r = poly(c, 0.5f, n);
  switch (i % 6) {
    case 0:
      r += 1;
      break;
    case 1:
      r *= 2;
      break;
    case 2:
      r -= 3;
      break;
    case 3:
      r = -r;
      break;
    case 4:
      r = r * r;
      break;
    default:
      r = 0;
  }
  o[i] = r;
}

#define GRID(n) dim3(((n) + 255) / 256), 256, 0, s
void vadd(const float* a, const float* b, float* o, int n, cudaStream_t s) {
  k_vadd<<<GRID(n)>>>(a, b, o, n);
}
void axpy4(const float* x, float* y, float a, int n, cudaStream_t s) {
  k_axpy4<<<GRID(n / 4 + n % 4)>>>(x, y, a, n);
}
void lerp(const LerpTable& t, int blocks, float w, cudaStream_t s) {
  k_lerp<<<blocks, 256, 0, s>>>(t, w);
}
void lerp_table(const long long* t, int n, float w, cudaStream_t s) {
  k_lerp_table<<<dim3(4, n), 128, 0, s>>>(t, n, w);
}
void welford(const float* x, float* m, float* v, int N, int C, int L, cudaStream_t s) {
  k_welford<<<C, 128, 0, s>>>(x, m, v, N, C, L);
}
void norm(const float* x, float* part, float* o, int n, int blocks, cudaStream_t s) {
  k_norm<<<blocks, 256, 256 * 4, s>>>(x, part, o, n);
}
void sumsq(const float* x, float* o, int n, cudaStream_t s) { k_sumsq<<<8, 256, 0, s>>>(x, o, n); }
void halfs(const float* x, void* b, void* h, float* back, int n, cudaStream_t s) {
  k_half<<<GRID(n)>>>(x, (__nv_bfloat16*)b, (__half*)h, back, n);
}
void oob(float* x, int n, cudaStream_t s) { k_oob<<<1, 32, 0, s>>>(x, n); }
void race(float* x, cudaStream_t s) { k_race<<<4, 1, 0, s>>>(x); }
void divergent(float* x, cudaStream_t s) { k_divergent<<<1, 32, 0, s>>>(x); }
void mathfn(const float* x, float* o, double* d, int* iv, int n, cudaStream_t s) {
  k_math<<<GRID(n)>>>(x, o, d, iv, n);
}
void local(const float* x, float* o, int k, int n, cudaStream_t s) {
  k_local<<<1, 64, 0, s>>>(x, o, k, n);
}
