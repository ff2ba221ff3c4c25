// CPU kernel of swa_fast::combine_: K weighted sums of r rows.
//
//   output[k][i] = c[k][0] source[0][i] + ... + c[k][r-1] source[r-1][i]
//
// in fp32, or in fp64 when it is asked for or a row is fp64: one product, then fused multiply-adds
// in the order of the sources, rounded to the output's type once. An element's result depends on
// nothing but its own values, so no cut of the rows, thread or tail shows in it.
//
// Bytes per element: 4 r + 4 K for fp32. A piece of every row is summed up in the first-level
// cache, where the sums stay until the last source is read.

#include <algorithm>
#include <vector>

#include "blend_cpu.h"

namespace swa_fast {
namespace {

constexpr int64_t kGrain = 1 << 18;  // elements below which a second thread does not pay
constexpr int64_t kPiece = 512;      // elements whose sums are kept in the first-level cache
constexpr int kGroup = 8;            // outputs that share a reading of the sources

// sum = factor * source, or sum + factor * source.
template <bool kFirst, typename Math, typename Source>
void accumulate_portable(Math* sum, const Source* source, int64_t count, Math factor) {
  for (int64_t i = 0; i < count; ++i) {
    const Math x = static_cast<Math>(source[i]);
    sum[i] = kFirst ? factor * x : std::fma(factor, x, sum[i]);
  }
}

template <typename Output, typename Math>
void store_portable(Output* output, const Math* sum, int64_t count) {
  for (int64_t i = 0; i < count; ++i) output[i] = static_cast<Output>(sum[i]);
}

#if SWA_FAST_HAS_AVX2_PATH

SWA_FAST_AVX2 inline __m256 multiply_add(__m256 a, __m256 b, __m256 c) {
  return _mm256_fmadd_ps(a, b, c);
}
SWA_FAST_AVX2 inline __m256d multiply_add(__m256d a, __m256d b, __m256d c) {
  return _mm256_fmadd_pd(a, b, c);
}

// The sums lie in whole registers: `sum` has room for `count` rounded up.
template <bool kFirst, typename Math, typename Source>
SWA_FAST_AVX2 void accumulate_avx2(Math* sum, const Source* source, int64_t count, Math factor) {
  using L = Lanes<Math>;
  const auto f = L::broadcast(factor);
  const auto step = [&](Math* s, const Source* from) SWA_FAST_AVX2 {
    const auto x = L::load(from);
    L::store(s, kFirst ? f * x : multiply_add(f, x, L::load(s)));
  };
  int64_t i = 0;
  for (; i + L::kCount <= count; i += L::kCount) step(sum + i, source + i);
  if (i < count) {
    Source rest[L::kCount] = {};
    std::memcpy(rest, source + i, (count - i) * sizeof(Source));
    step(sum + i, rest);
  }
}

template <typename Output, typename Math>
SWA_FAST_AVX2 void store_avx2(Output* output, const Math* sum, int64_t count) {
  using L = Lanes<Math>;
  int64_t i = 0;
  for (; i + L::kCount <= count; i += L::kCount) L::store(output + i, L::load(sum + i));
  if (i < count) {
    Output rest[L::kCount];
    L::store(rest, L::load(sum + i));
    std::memcpy(output + i, rest, (count - i) * sizeof(Output));
  }
}

#endif  // SWA_FAST_HAS_AVX2_PATH

template <typename Math, typename Source>
void accumulate(Math* sum, const Source* source, int64_t count, Math factor, bool first) {
#if SWA_FAST_HAS_AVX2_PATH
  if (cpu_has_avx2()) {
    return first ? accumulate_avx2<true>(sum, source, count, factor)
                 : accumulate_avx2<false>(sum, source, count, factor);
  }
#endif
  first ? accumulate_portable<true>(sum, source, count, factor)
        : accumulate_portable<false>(sum, source, count, factor);
}

template <typename Output, typename Math>
void store(Output* output, const Math* sum, int64_t count) {
#if SWA_FAST_HAS_AVX2_PATH
  if (cpu_has_avx2()) return store_avx2(output, sum, count);
#endif
  store_portable(output, sum, count);
}

struct Row {
  char* data;
  ScalarType type;
  int64_t size;  // bytes of an element
};

std::vector<Row> rows_of(const std::vector<Tensor>& tensors, int64_t count, const char* what) {
  std::vector<Row> rows;
  for (const Tensor& tensor : tensors) {
    STD_TORCH_CHECK(tensor.is_cpu() && tensor.is_contiguous() && tensor.numel() == count,
                    "combine_.cpu: ", what, " must be contiguous on the CPU with ", count,
                    " elements each");
    dispatch_floating("combine_.cpu", tensor.scalar_type(), [](auto) {});
    rows.push_back({static_cast<char*>(const_cast<void*>(tensor.const_data_ptr())),
                    tensor.scalar_type(), static_cast<int64_t>(tensor.element_size())});
  }
  return rows;
}

template <typename Math>
void combine(const std::vector<Row>& outputs, const std::vector<Row>& sources, int64_t count,
             const double* coefficients) {
  const int64_t r = sources.size(), k = outputs.size();
  torch::stable::parallel_for(0, count, kGrain, [&](int64_t begin, int64_t end) {
    alignas(32) Math sums[kGroup][kPiece];
    for (int64_t at = begin; at < end; at += kPiece) {
      const int64_t n = std::min(kPiece, end - at);
      for (int64_t group = 0; group < k; group += kGroup) {
        const int64_t members = std::min<int64_t>(kGroup, k - group);
        for (int64_t j = 0; j < r; ++j) {
          dispatch_floating("combine_.cpu", sources[j].type, [&](auto type) {
            // A row of fp64 makes the sums fp64.
            if constexpr (sizeof(type) <= sizeof(Math)) {
              const auto* source =
                  reinterpret_cast<const decltype(type)*>(sources[j].data + at * sources[j].size);
              for (int64_t m = 0; m < members; ++m) {
                const Math factor = static_cast<Math>(coefficients[(group + m) * r + j]);
                accumulate(sums[m], source, n, factor, j == 0);
              }
            }
          });
        }
        for (int64_t m = 0; m < members; ++m) {
          const Row& output = outputs[group + m];
          dispatch_floating("combine_.cpu", output.type, [&](auto type) {
            if constexpr (sizeof(type) <= sizeof(Math)) {
              store(reinterpret_cast<decltype(type)*>(output.data + at * output.size), sums[m], n);
            }
          });
        }
      }
    }
  });
}

void combine_cpu(std::vector<Tensor> outputs, std::vector<Tensor> sources, Tensor coefficients,
                 bool double_precision) {
  const int64_t k = outputs.size(), r = sources.size();
  STD_TORCH_CHECK(k > 0 && r > 0, "combine_.cpu: expected at least one output and one source");
  STD_TORCH_CHECK(coefficients.is_cpu() && coefficients.scalar_type() == ScalarType::Double &&
                      coefficients.is_contiguous() && coefficients.numel() == k * r,
                  "combine_.cpu: coefficients must be fp64 of shape [", k, ", ", r, "] on the CPU");
  const int64_t count = outputs[0].numel();
  const auto to = rows_of(outputs, count, "outputs"), from = rows_of(sources, count, "sources");
  const auto is_double = [](const Row& row) { return row.type == ScalarType::Double; };
  const bool wide = double_precision || std::any_of(to.begin(), to.end(), is_double) ||
                    std::any_of(from.begin(), from.end(), is_double);
  const double* c = static_cast<const double*>(coefficients.const_data_ptr());
  wide ? combine<double>(to, from, count, c) : combine<float>(to, from, count, c);
}

}  // namespace
}  // namespace swa_fast

STABLE_TORCH_LIBRARY_IMPL(swa_fast, CPU, m) {
  m.impl("combine_.cpu", TORCH_BOX(&swa_fast::combine_cpu));
}
