// CUDA kernel of swa_fast::combine_: K weighted sums of r rows.
//
// Formula: combine_cpu.cpp. Layout: every row is consecutive; a thread serves four elements of all
// rows, or two in fp64. Bytes per element: 4 r + 4 K for fp32, bound by memory bandwidth: the sums
// of four outputs stay in registers, and for more outputs a block reads its part of the sources
// again, from the first-level cache. Eight sources are asked for before the first is used.
//
// One launch for up to kMaxSources sources and kMaxOutputs outputs, whose addresses and
// coefficients are its arguments, so nothing is copied and a captured graph keeps them. Of more
// sources the sums so far are kept in memory of the arithmetic type: they are rounded once, too.

#include <cuda_runtime.h>

#include <algorithm>

#include "layout.h"
#include "packed.cuh"
#include "stable_compat.h"

namespace swa_fast {
namespace {

constexpr int kThreads = 256;
constexpr int kResident = 3;  // blocks on a multiprocessor
constexpr int kMaxSources = 24, kMaxOutputs = 16;
constexpr int kTogether = 4;  // outputs whose sums stay in registers
constexpr int kAtOnce = 8;    // sources in flight

// Sources of several types, each read as the code beside its address says.
struct Mixed {};

struct Arguments {
  const void* sources[kMaxSources];
  void* outputs[kMaxOutputs];
  double coefficients[kMaxOutputs][kMaxSources];
  int8_t source_types[kMaxSources], output_types[kMaxOutputs];
  void* sums;     // [outputs, count] of the arithmetic type; unused where this launch sees all
  int64_t count;  // elements of a row
  int source_count, output_count;
  bool first, last;  // of the launches that serve these outputs
};
static_assert(sizeof(Arguments) <= 4096, "kernel arguments");

__device__ __forceinline__ float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
__device__ __forceinline__ double multiply_add(double a, double b, double c) {
  return fma(a, b, c);
}

// kPack elements of all rows, from `at` on.
template <typename Math, typename Source, int kPack>
__device__ __forceinline__ void combine_elements(const Arguments& arguments, int64_t at) {
#pragma unroll 1
  for (int k0 = 0; k0 < arguments.output_count; k0 += kTogether) {
    Math sums[kTogether][kPack];
#pragma unroll
    for (int k = 0; k < kTogether; ++k) {
      const bool kept = !arguments.first && k0 + k < arguments.output_count;
      const Math* from = static_cast<const Math*>(arguments.sums) + (k0 + k) * arguments.count + at;
#pragma unroll
      // A product is a multiply-add to a zero that leaves its sign alone.
      for (int e = 0; e < kPack; ++e) sums[k][e] = kept ? from[e] : Math(-0.0);
    }
#pragma unroll 1
    for (int j0 = 0; j0 < arguments.source_count; j0 += kAtOnce) {
      const auto add = [&](int j, const Math* x) {
#pragma unroll
        for (int k = 0; k < kTogether; ++k) {
          const Math c = static_cast<Math>(arguments.coefficients[k0 + k][j]);
#pragma unroll
          for (int e = 0; e < kPack; ++e) sums[k][e] = multiply_add(c, x[e], sums[k][e]);
        }
      };
      if constexpr (std::is_same_v<Source, Mixed>) {
        Math x[kAtOnce];
#pragma unroll
        for (int u = 0; u < kAtOnce; ++u) {
          if (j0 + u < arguments.source_count) {
            dispatch_code(arguments.source_types[j0 + u], [&](auto type) {
              using T = decltype(type);
              x[u] = static_cast<Math>(static_cast<const T*>(arguments.sources[j0 + u])[at]);
            });
          }
        }
#pragma unroll
        for (int u = 0; u < kAtOnce; ++u) {
          if (j0 + u < arguments.source_count) add(j0 + u, &x[u]);
        }
      } else {
        Memory<Pack<Source, kPack>> packs[kAtOnce];
#pragma unroll
        for (int u = 0; u < kAtOnce; ++u) {
          if (j0 + u < arguments.source_count) {
            packs[u].load(static_cast<const Source*>(arguments.sources[j0 + u]) + at);
          }
        }
#pragma unroll
        for (int u = 0; u < kAtOnce; ++u) {
          if (j0 + u < arguments.source_count) {
            const Pack<Source, kPack> pack = packs[u].unpacked();
            Math x[kPack];
#pragma unroll
            for (int e = 0; e < kPack; ++e) x[e] = static_cast<Math>(pack.element[e]);
            add(j0 + u, x);
          }
        }
      }
    }
#pragma unroll
    for (int k = 0; k < kTogether; ++k) {
      if (k0 + k >= arguments.output_count) break;
      if (!arguments.last) {
        Math* to = static_cast<Math*>(arguments.sums) + (k0 + k) * arguments.count + at;
#pragma unroll
        for (int e = 0; e < kPack; ++e) to[e] = sums[k][e];
        continue;
      }
      dispatch_code(arguments.output_types[k0 + k], [&](auto type) {
        using T = decltype(type);
        // As many accesses of 16 bytes as the elements fill.
        constexpr int kWide = kPackBytes / sizeof(T) < kPack ? kPackBytes / sizeof(T) : kPack;
        T* to = static_cast<T*>(arguments.outputs[k0 + k]) + at;
#pragma unroll
        for (int e = 0; e < kPack; e += kWide) {
          Pack<T, kWide> pack;
#pragma unroll
          for (int i = 0; i < kWide; ++i) pack.element[i] = static_cast<T>(sums[k][e + i]);
          *reinterpret_cast<Pack<T, kWide>*>(to + e) = pack;
        }
      });
    }
  }
}

template <typename Math, typename Source, int kPack>
__global__ void __launch_bounds__(kThreads, kResident)
    combine_kernel(const __grid_constant__ Arguments arguments) {
  const int64_t thread = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t packs = arguments.count / kPack;
  if (thread < packs) {
    combine_elements<Math, Source, kPack>(arguments, thread * kPack);
  } else if (kPack > 1 && packs * kPack + (thread - packs) < arguments.count) {
    // What remains is one element for each of as many threads.
    combine_elements<Math, Source, 1>(arguments, packs * kPack + (thread - packs));
  }
}

struct Rows {
  std::vector<const void*> addresses;
  std::vector<int8_t> types;
  uint64_t places = 0;  // all addresses, one on the other
  bool wide = false;
};

Rows rows_of(const std::vector<Tensor>& tensors, int64_t count, int32_t device, const char* what) {
  Rows rows;
  for (const Tensor& tensor : tensors) {
    STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == device &&
                        tensor.is_contiguous() && tensor.numel() == count,
                    "combine_.cuda: ", what, " must be contiguous on one CUDA device with ", count,
                    " elements");
    dispatch_floating("combine_.cuda", tensor.scalar_type(), [&](auto type) {
      using T = decltype(type);
      rows.types.push_back(std::is_same_v<T, float>      ? kFloat
                           : std::is_same_v<T, double>   ? kDouble
                           : std::is_same_v<T, BFloat16> ? kBfloat16
                                                         : kHalf);
      rows.wide |= std::is_same_v<T, double>;
    });
    rows.addresses.push_back(tensor.const_data_ptr());
    rows.places |= reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
  }
  return rows;
}

template <typename Math, typename Source>
void launch(const Arguments& arguments, bool aligned, cudaStream_t stream) {
  // As many elements as the sums leave registers for.
  constexpr int kPack = std::is_same_v<Source, Mixed> ? 1 : kPackBytes / sizeof(Math);
  const auto run = [&](auto kernel, int64_t threads) {
    const int64_t blocks = (threads + kThreads - 1) / kThreads;
    STD_TORCH_CHECK(blocks <= 0x7fffffff,
                    "combine_.cuda: rows have too many elements: ", arguments.count);
    kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(arguments);
  };
  if (aligned) {
    run(combine_kernel<Math, Source, kPack>, arguments.count / kPack + arguments.count % kPack);
  } else {
    run(combine_kernel<Math, Source, 1>, arguments.count);
  }
  const cudaError_t status = cudaGetLastError();
  STD_TORCH_CHECK(status == cudaSuccess,
                  "combine_.cuda: launch failed: ", cudaGetErrorString(status));
}

template <typename Math>
void launch_for(int source_type, bool mixed, const Arguments& arguments, bool aligned,
                cudaStream_t stream) {
  if (mixed) return launch<Math, Mixed>(arguments, aligned, stream);
  switch (source_type) {
    case kDouble:
      if constexpr (std::is_same_v<Math, double>) {
        return launch<Math, double>(arguments, aligned, stream);
      }
      break;
    case kBfloat16:
      return launch<Math, BFloat16>(arguments, aligned, stream);
    case kHalf:
      return launch<Math, Half>(arguments, aligned, stream);
    default:
      return launch<Math, float>(arguments, aligned, stream);
  }
}

void combine_cuda(std::vector<Tensor> outputs, std::vector<Tensor> sources, Tensor coefficients,
                  bool double_precision) {
  const int64_t k = static_cast<int64_t>(outputs.size()), r = static_cast<int64_t>(sources.size());
  STD_TORCH_CHECK(k > 0 && r > 0, "combine_.cuda: expected at least one output and one source");
  STD_TORCH_CHECK(coefficients.is_cpu() && coefficients.scalar_type() == ScalarType::Double &&
                      coefficients.is_contiguous() && coefficients.dim() == 2 &&
                      coefficients.size(0) == k && coefficients.size(1) == r,
                  "combine_.cuda: coefficients must be fp64 of shape [", k, ", ", r,
                  "] on the CPU");
  const int64_t count = outputs[0].numel();
  const int32_t device = outputs[0].get_device_index();
  const Rows to = rows_of(outputs, count, device, "outputs");
  const Rows from = rows_of(sources, count, device, "sources");
  if (count == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(device);
  const cudaStream_t stream = current_stream(device);
  const bool wide = double_precision || to.wide || from.wide;
  const bool mixed = std::any_of(from.types.begin(), from.types.end(),
                                 [&](int8_t type) { return type != from.types[0]; });
  const bool aligned = (to.places | from.places) % kPackBytes == 0;
  const double* c = static_cast<const double*>(coefficients.const_data_ptr());
  std::optional<Tensor> sums;
  if (r > kMaxSources) {
    sums = torch::stable::new_empty(outputs[0], {std::min<int64_t>(k, kMaxOutputs), count},
                                    wide ? ScalarType::Double : ScalarType::Float);
  }
  Arguments arguments{};
  arguments.count = count;
  arguments.sums = sums ? sums->mutable_data_ptr() : nullptr;
  for (int64_t k0 = 0; k0 < k; k0 += kMaxOutputs) {
    arguments.output_count = static_cast<int>(std::min<int64_t>(kMaxOutputs, k - k0));
    for (int i = 0; i < arguments.output_count; ++i) {
      arguments.outputs[i] = const_cast<void*>(to.addresses[k0 + i]);
      arguments.output_types[i] = to.types[k0 + i];
    }
    for (int64_t j0 = 0; j0 < r; j0 += kMaxSources) {
      arguments.source_count = static_cast<int>(std::min<int64_t>(kMaxSources, r - j0));
      for (int j = 0; j < arguments.source_count; ++j) {
        arguments.sources[j] = from.addresses[j0 + j];
        arguments.source_types[j] = from.types[j0 + j];
        for (int i = 0; i < arguments.output_count; ++i) {
          arguments.coefficients[i][j] = c[(k0 + i) * r + j0 + j];
        }
      }
      arguments.first = j0 == 0;
      arguments.last = j0 + kMaxSources >= r;
      if (wide) {
        launch_for<double>(from.types[0], mixed, arguments, aligned, stream);
      } else {
        launch_for<float>(from.types[0], mixed, arguments, aligned, stream);
      }
    }
  }
}

}  // namespace
}  // namespace swa_fast

STABLE_TORCH_LIBRARY_IMPL(swa_fast, CUDA, m) {
  m.impl("combine_.cuda", TORCH_BOX(&swa_fast::combine_cuda));
}
