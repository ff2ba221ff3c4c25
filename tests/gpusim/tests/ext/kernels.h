#pragma once
#include <cuda_runtime.h>

#include <cstdint>
constexpr int LERP_MAX = 24, LERP_BLOCKS = 160, LERP_CHUNK = 1024;
struct LerpTable {
  float* dst[LERP_MAX];
  const float* src[LERP_MAX];
  long long n[LERP_MAX];
  unsigned char block_tensor[LERP_BLOCKS];
  int block_chunk[LERP_BLOCKS];
};
void vadd(const float*, const float*, float*, int, cudaStream_t);
void axpy4(const float*, float*, float, int, cudaStream_t);
void lerp(const LerpTable&, int, float, cudaStream_t);
void lerp_table(const long long*, int, float, cudaStream_t);
void welford(const float*, float*, float*, int, int, int, cudaStream_t);
void norm(const float*, float*, float*, int, int, cudaStream_t);
void sumsq(const float*, float*, int, cudaStream_t);
void halfs(const float*, void*, void*, float*, int, cudaStream_t);
void oob(float*, int, cudaStream_t);
void race(float*, cudaStream_t);
void divergent(float*, cudaStream_t);
void mathfn(const float*, float*, double*, int*, int, cudaStream_t);
void local(const float*, float*, int, int, cudaStream_t);
