// Instruction-level checks against the host: CUB, cooperative groups, grid sync, atomics, locks,
// votes, integer and float arithmetic, inline PTX. Prints one line per mismatch.
#include <cooperative_groups.h>
#include <cooperative_groups/reduce.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cub/cub.cuh>
#include <cuda/functional>
#include <vector>
namespace cg = cooperative_groups;
__global__ void cubk(const float* x, float* o, int* oi, int n) {
  typedef cub::BlockReduce<float, 256> BR;
  typedef cub::BlockScan<int, 256> BS;
  __shared__ typename BR::TempStorage t;
  __shared__ typename BS::TempStorage s;
  float v = threadIdx.x < n ? x[threadIdx.x] : 0;
  float r = BR(t).Sum(v);
  if (threadIdx.x == 0) o[0] = r;
  int e;
  BS(s).ExclusiveSum((int)threadIdx.x, e);
  oi[threadIdx.x] = e;
  __syncthreads();
  float mx = BR(t).Reduce(v, cuda::maximum<>{});
  if (threadIdx.x == 0) o[1] = mx;
}
__global__ void gs(int* x) {
  cg::grid_group g = cg::this_grid();
  for (int it = 0; it < 5; it++) {
    if (threadIdx.x == 0) x[blockIdx.x] += it + 1;
    g.sync();
    int v = 0;
    if (threadIdx.x == 0) v = x[(blockIdx.x + 1) % gridDim.x];
    g.sync();
    if (threadIdx.x == 0) x[blockIdx.x] += v;
    g.sync();
  }
}
__global__ void cgk(const float* x, float* o) {
  auto b = cg::this_thread_block();
  auto w = cg::tiled_partition<32>(b);
  auto q = cg::tiled_partition<8>(b);
  float s = cg::reduce(w, x[threadIdx.x], cg::plus<float>());
  float s8 = cg::reduce(q, x[threadIdx.x], cg::greater<float>());
  o[threadIdx.x] = s + s8;
  int i = cg::reduce(w, (int)threadIdx.x, cg::plus<int>());
  o[threadIdx.x + blockDim.x] = i;
}
__global__ void atom(int* i, unsigned* u, float* f, double* d, unsigned long long* l, __half2* h,
                     __nv_bfloat162* b, int* lock) {
  int t = threadIdx.x + blockIdx.x * blockDim.x;
  atomicAdd(i, t);
  atomicMax(i + 1, t);
  atomicMin(i + 2, -t);
  atomicInc(u, 10);
  atomicXor(u + 1, t);
  atomicOr(u + 2, 1u << (t & 31));
  atomicAdd(f, 1.5f);
  atomicAdd(d, 0.25);
  atomicAdd(l, (unsigned long long)t << 20);
  atomicAdd(h, __half2half2(__float2half(1.f)));
  atomicAdd(b, __bfloat162bfloat162(__float2bfloat16(1.f)));
  // spin lock within a warp (independent thread scheduling)
  bool done = false;
  while (!done) {
    if (atomicCAS(lock, 0, 1) == 0) {
      volatile int* c = lock + 1;
      *c = *c + 1;
      __threadfence();
      atomicExch(lock, 0);
      done = true;
    }
  }
  atomicExch(i + 3, t);
}
__global__ void matchk(int* o) {
  unsigned m = __match_any_sync(~0u, threadIdx.x % 5);
  int p;
  unsigned a = __match_all_sync(~0u, 7, &p);
  o[threadIdx.x] = m;
  o[32 + threadIdx.x] = a + p;
  o[64 + threadIdx.x] = __ballot_sync(~0u, threadIdx.x & 1);
  o[96 + threadIdx.x] = __reduce_add_sync(~0u, threadIdx.x);
  o[128 + threadIdx.x] = __any_sync(~0u, threadIdx.x == 3);
  if (threadIdx.x < 7) o[160 + threadIdx.x] = __shfl_sync(0x7f, threadIdx.x * 2, 6 - threadIdx.x);
  o[192 + threadIdx.x] = __syncthreads_count(threadIdx.x < 9);
  o[224 + threadIdx.x] = __shfl_up_sync(~0u, threadIdx.x, 3, 8);
  unsigned am = __activemask();
  o[256 + threadIdx.x] = am;
}
__global__ void ints(const int* a, const long long* b, long long* o, int n) {
  int i = threadIdx.x;
  if (i >= n) return;
  long long* r = o + i * 24;
  int x = a[i];
  long long y = b[i];
  unsigned ux = x;
  unsigned long long uy = y;
  r[0] = y / (x | 1);
  r[1] = y % (x | 1);
  r[2] = uy / (ux | 1);
  r[3] = __umul64hi(uy, uy * 3);
  r[4] = __mul64hi(y, y * 3);
  r[5] = __brev(x);
  r[6] = __brevll(y);
  r[7] = __ffs(x);
  r[8] = __ffsll(y);
  r[9] = __byte_perm(x, (int)y, 0x5140);
  r[10] = __funnelshift_l(x, (int)y, x & 31);
  r[11] = __funnelshift_rc(x, (int)y, 35);
  r[12] = __dp4a(x, (int)y, 3);
  r[13] = y >> (x & 63);
  r[14] = uy << (x & 63);
  r[15] = (short)x * (short)y;
  r[16] = (signed char)x;
  r[17] = __usad(x, (int)y, 5);
  r[18] = max(min(x, 100), -100);
  r[19] = abs(x);
  r[20] = __hadd(x, (int)y);
  r[21] = (x >> 3) ^ (ux >> 5) ^ ~x;
  r[22] = (long long)(float)y;
  r[23] = (unsigned char)(x >> 8) + (unsigned short)y;
}
__global__ void flts(const float* a, const float* b, const float* c, float* o, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  float* r = o + i * 24;
  float x = a[i], y = b[i], z = c[i];
  r[0] = x + y;
  r[1] = x * y;
  r[2] = fmaf(x, y, z);
  r[3] = x / y;
  r[4] = sqrtf(x);
  r[5] = __fadd_rz(x, y);
  r[6] = __fmul_ru(x, y);
  r[7] = __fmaf_rd(x, y, z);
  r[8] = __frcp_rn(x);
  r[9] = fminf(x, y);
  r[10] = fmaxf(x, y);
  r[11] = rintf(x);
  r[12] = floorf(x);
  r[13] = truncf(x);
  r[14] = __float2half_rn(x);
  r[15] = __bfloat162float(__float2bfloat16_rn(y));
  r[16] = (float)(int)x;
  r[17] = (float)(double)x * y;
  r[18] = __saturatef(x);
  r[19] = fmodf(x, y);
  r[20] = copysignf(x, y);
  r[21] = x - y;
  r[22] = __bfloat162float(__hadd(__float2bfloat16(x), __float2bfloat16(y)));
  r[23] = __half2float(__hmul(__float2half(x), __float2half(y)));
}
__constant__ float cc[4] = {1, 2, 3, 4};
__device__ float gv[3] = {5, 6, 7};
__global__ void consts(float* o, int k) {
  o[0] = cc[k] + gv[k - 1];
  gv[k - 1] = 9;
}
__global__ void asmk(const float* x, float* o, unsigned* u) {
  float a, b, c, d;
  asm volatile("ld.global.nc.L1::no_allocate.v4.f32 {%0,%1,%2,%3}, [%4];"
               : "=f"(a), "=f"(b), "=f"(c), "=f"(d)
               : "l"(x));
  asm volatile("st.global.cs.v4.f32 [%0], {%1,%2,%3,%4};" ::"l"(o), "f"(d), "f"(c), "f"(b), "f"(a)
               : "memory");
  asm volatile(
      "{ .reg .pred p; .reg .b32 t; setp.gt.f32 p, %1, 0f00000000; @p mov.b32 t, 7; @!p mov.b32 t, "
      "9; add.u32 %0, t, 1; }"
      : "=r"(u[0])
      : "f"(a));
  unsigned r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(a), "f"(b));
  u[1] = r;
  asm("lop3.b32 %0, %1, %2, %3, 0xE8;" : "=r"(r) : "r"(u[0]), "r"(u[1]), "r"(0x0ff0));
  u[2] = r;
  u[3] = clock() > 0;
}
#define CK(c) \
  if (!(c)) printf("FAIL line %d: %s\n", __LINE__, #c)
template <class T>
struct D {
  T* p;
  size_t n;
  D(size_t n_) : n(n_) {
    cudaMalloc(&p, n * sizeof(T));
    cudaMemset(p, 0, n * sizeof(T));
  }
  D(std::vector<T> v) : D(v.size()) {
    cudaMemcpy(p, v.data(), n * sizeof(T), cudaMemcpyHostToDevice);
  }
  std::vector<T> h() {
    std::vector<T> v(n);
    cudaMemcpy(v.data(), p, n * sizeof(T), cudaMemcpyDeviceToHost);
    return v;
  }
};
static bool same(float a, float b) { return (a != a && b != b) || memcmp(&a, &b, 4) == 0; }
int main() {
  {
    std::vector<float> x(256);
    float s = 0, m = -1e9;
    for (int i = 0; i < 256; i++) {
      x[i] = (i * 37 % 101) * 0.5f;
      s += x[i];
      m = fmaxf(m, x[i]);
    }
    D<float> dx(x), o(2);
    D<int> oi(256);
    cubk<<<1, 256>>>(dx.p, o.p, oi.p, 256);
    auto r = o.h();
    auto q = oi.h();
    CK(r[0] == s && r[1] == m);
    for (int i = 0; i < 256; i++) CK(q[i] == i * (i - 1) / 2);
    D<float> co(512);
    cgk<<<1, 256>>>(dx.p, co.p);
    auto v = co.h();
    float ws = 0, w8 = -1;
    for (int i = 0; i < 32; i++) ws += x[i];
    for (int i = 0; i < 8; i++) w8 = fmaxf(w8, x[i]);
    CK(v[0] == ws + w8);
    CK(v[256 + 33] == 32 * 32 + 31 * 16);
  }
  {
    D<int> x(16);
    void* a[] = {&x.p};
    auto e = cudaLaunchCooperativeKernel((void*)gs, dim3(16), dim3(64), a, 0, 0);
    CK(e == 0);
    auto r = x.h();
    std::vector<long> ref(16, 0);
    for (int it = 0; it < 5; it++) {
      for (auto& v : ref) v += it + 1;
      auto c = ref;
      for (int i = 0; i < 16; i++) ref[i] += c[(i + 1) % 16];
    }
    for (int i = 0; i < 16; i++) CK(r[i] == ref[i]);
  }
  {
    D<int> i(4);
    D<unsigned> u(3);
    D<float> f(1);
    D<double> d(1);
    D<unsigned long long> l(1);
    D<__half2> h(1);
    D<__nv_bfloat162> b(1);
    D<int> lk(2);
    atom<<<3, 64>>>(i.p, u.p, f.p, d.p, l.p, h.p, b.p, lk.p);
    auto a = i.h();
    CK(a[0] == 191 * 96);
    CK(a[1] == 191);
    CK(a[2] == -191);
    CK(u.h()[2] == ~0u);
    CK(u.h()[0] == 192 % 11);
    CK(f.h()[0] == 288.f);
    CK(d.h()[0] == 48.0);
    CK(l.h()[0] == ((191ull * 96) << 20));
    auto k = lk.h();
    CK(k[0] == 0 && k[1] == 192);
    CK(__low2float(h.h()[0]) == 192);
    CK(__high2float(b.h()[0]) == 192);
  }
  {
    D<int> o(320);
    matchk<<<1, 32>>>(o.p);
    auto v = o.h();
    for (int i = 0; i < 32; i++) {
      unsigned m = 0;
      for (int j = 0; j < 32; j++)
        if (j % 5 == i % 5) m |= 1u << j;
      CK((unsigned)v[i] == m);
      CK(v[32 + i] == 0);
      CK(v[64 + i] == (int)0xaaaaaaaa);
      CK(v[96 + i] == 496);
      CK(v[128 + i] == 1);
      if (i < 7) CK(v[160 + i] == (6 - i) * 2);
      CK(v[192 + i] == 9);
      CK(v[224 + i] == ((i % 8) >= 3 ? i - 3 : i));
      CK(v[256 + i] == -1);
    }
  }
  {
    int n = 200;
    std::vector<int> a(n);
    std::vector<long long> b(n);
    uint64_t s = 88172645463325252ull;
    auto rn = [&] {
      s ^= s << 13;
      s ^= s >> 7;
      s ^= s << 17;
      return s;
    };
    for (int i = 0; i < n; i++) {
      a[i] = (int)rn() >> (rn() % 31);
      b[i] = (long long)rn() >> (rn() % 63);
    }
    D<int> da(a);
    D<long long> db(b), o(n * 24);
    ints<<<1, 256>>>(da.p, db.p, o.p, n);
    auto v = o.h();
    for (int i = 0; i < n; i++) {
      auto* r = &v[i * 24];
      int x = a[i];
      long long y = b[i];
      unsigned ux = x;
      unsigned long long uy = y;
      CK(r[0] == y / (x | 1));
      CK(r[1] == y % (x | 1));
      CK((unsigned long long)r[2] == uy / (ux | 1));
      CK((unsigned long long)r[3] ==
         (unsigned long long)(((unsigned __int128)uy * (uy * 3)) >> 64));
      CK(r[4] == (long long)(((__int128)y * (long long)(uy * 3)) >> 64));
      CK(r[7] == __builtin_ffs(x));
      CK(r[8] == __builtin_ffsll(y));
      CK(r[13] == y >> (x & 63));
      CK((unsigned long long)r[14] == uy << (x & 63));
      CK(r[15] == (short)x * (short)y);
      CK(r[16] == (signed char)x);
      CK(r[18] == std::max(std::min(x, 100), -100));
      CK(r[21] == (long long)((x >> 3) ^ (ux >> 5) ^ ~x));
      CK(r[22] == (long long)(float)y || (float)y >= 9.2e18f);
      CK(r[23] == (unsigned char)(x >> 8) + (unsigned short)y);
      unsigned br = 0;
      for (int k = 0; k < 32; k++) br |= (ux >> k & 1) << (31 - k);
      CK((unsigned)r[5] == br);
      int dp = 3;
      for (int k = 0; k < 4; k++) dp += (signed char)(x >> 8 * k) * (signed char)((int)y >> 8 * k);
      CK((int)r[12] == dp);
    }
  }
  {
    int n = 4000;
    std::vector<float> a(n), b(n), c(n);
    uint64_t s = 1234567;
    auto rn = [&] {
      s ^= s << 13;
      s ^= s >> 7;
      s ^= s << 17;
      return (uint32_t)(s >> 16);
    };
    auto rf = [&](int i) {
      if (i % 3) {
        return ((int)rn() % 100000) * 0.0137f;
      }
      uint32_t u = rn();
      float f;
      memcpy(&f, &u, 4);
      return f;
    };
    for (int i = 0; i < n; i++) {
      a[i] = rf(i);
      b[i] = rf(i + 1);
      c[i] = rf(i + i / 7);
    }
    D<float> da(a), db(b), dc(c), o(n * 24);
    flts<<<16, 256>>>(da.p, db.p, dc.p, o.p, n);
    auto v = o.h();
    for (int i = 0; i < n; i++) {
      auto* r = &v[i * 24];
      float x = a[i], y = b[i], z = c[i];
      CK(same(r[0], x + y));
      CK(same(r[1], x * y));
      CK(same(r[2], fmaf(x, y, z)));
      if (!same(r[3], x / y)) printf("div %a %a -> %a want %a\n", x, y, r[3], x / y);
      if (!same(r[4], sqrtf(x))) printf("sqrt %a -> %a want %a\n", x, r[4], sqrtf(x));
      CK(same(r[8], 1.f / x));
      CK(same(r[11], rintf(x)));
      CK(same(r[12], floorf(x)));
      CK(same(r[13], truncf(x)));
      CK(same(r[15], __bfloat162float(__float2bfloat16_rn(y))));
      CK(same(r[21], x - y));
      CK(same(r[20], copysignf(x, y)));
      if (fabsf(x) < 1e9f) CK(r[16] == (float)(int)x);
      CK(same(r[14], __half2float(__float2half_rn(x))));
      if (fabsf(x / y) < 1e6) CK(same(r[19], fmodf(x, y)));
    }
  }
  {
    D<float> o(1);
    consts<<<1, 1>>>(o.p, 2);
    CK(o.h()[0] == 9);
    float g[3];
    cudaMemcpyFromSymbol(g, gv, 12);
    CK(g[1] == 9);
    float n4[4] = {8, 8, 8, 8};
    cudaMemcpyToSymbol(cc, n4, 16);
    consts<<<1, 1>>>(o.p, 3);
    CK(o.h()[0] == 15);
  }
  {
    D<float> x(std::vector<float>{1, 2, 3, 4}), o(4);
    D<unsigned> u(4);
    asmk<<<1, 1>>>(x.p, o.p, u.p);
    auto v = o.h();
    CK(v[0] == 4 && v[3] == 1);
    auto w = u.h();
    CK(w[0] == 8 && w[1] == 0x3f804000 && w[3] == 1);
  }
  printf("done: %s\n", cudaGetErrorString(cudaDeviceSynchronize()));
}
