// CPU kernel of swa_fast::combine_: K weighted sums of r rows.
//
//   output[k][i] = c[k][0] source[0][i] + ... + c[k][r-1] source[r-1][i]
//
// in fp32, or in fp64 when it is asked for or a row is fp64: one product, then fused multiply-adds
// in the order of the sources, rounded to the output's type once. An element's result depends on
// nothing but its own values, so no cut of the rows, thread or tail shows in it.
//
// Bytes per element: 4 r + 4 K for fp32. Where all rows are fp32 the sums of four outputs stay in
// registers while up to four sources are read, and of more sources in memory of the kernel's own.
// Large outputs are stored past the caches, one at a time. Otherwise a piece of every row is summed
// up in memory of the kernel's own, until the last source is read.

#include <algorithm>
#include <vector>

#include "blend_cpu.h"
#include "caches.h"

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

#if SWA_FAST_HAS_LANES

// The sums lie in whole registers: `sum` has room for `count` rounded up.
template <bool kFirst, typename Math, typename Source>
SWA_FAST_LANES void accumulate_lanes(Math* sum, const Source* source, int64_t count, Math factor) {
  using L = Lanes<Math>;
  const auto f = L::broadcast(factor);
  const auto step = [&](Math* s, const Source* from) SWA_FAST_LANES {
    const auto x = L::load(from);
    L::store(s, kFirst ? L::mul(f, x) : L::fma(f, x, L::load(s)));
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
SWA_FAST_LANES void store_lanes(Output* output, const Math* sum, int64_t count) {
  using L = Lanes<Math>;
  int64_t i = 0;
  for (; i + L::kCount <= count; i += L::kCount) L::store(output + i, L::load(sum + i));
  if (i < count) {
    Output rest[L::kCount];
    L::store(rest, L::load(sum + i));
    std::memcpy(output + i, rest, (count - i) * sizeof(Output));
  }
}

constexpr int64_t kFloats = 1024;  // elements of a piece of rows that are all fp32
constexpr int kOutputs = 4;        // whose sums stay in registers
constexpr int kSources = 4;        // whose factors do

// M sums of R fp32 sources into `to`, after those in `before` unless they are the first. `factors`
// has a row of `stride` for each sum. kStream: past the caches, to one multiple of 32 bytes.
template <int M, int R, bool kFirst, bool kStream>
SWA_FAST_LANES void combine_block(float* const* to, const float* const* before,
                                  const float* const* sources, const float* factors, int64_t stride,
                                  int64_t count) {
  using L = Lanes<float>;
  L::Register f[M][R];
  for (int m = 0; m < M; ++m) {
    for (int j = 0; j < R; ++j) f[m][j] = L::broadcast(factors[m * stride + j]);
  }
  const auto sum = [&](int m, const L::Register* x, const float* earlier) SWA_FAST_LANES {
    L::Register s = kFirst ? L::mul(f[m][0], x[0]) : L::fma(f[m][0], x[0], L::load(earlier));
    for (int j = 1; j < R; ++j) s = L::fma(f[m][j], x[j], s);
    return s;
  };
  int64_t i = 0;
  for (; i + L::kCount <= count; i += L::kCount) {
    L::Register x[R];
    for (int j = 0; j < R; ++j) x[j] = L::load(sources[j] + i);
    for (int m = 0; m < M; ++m) {
      const L::Register s = sum(m, x, before[m] + i);
      kStream ? L::stream(to[m] + i, s) : L::store(to[m] + i, s);
    }
  }
  if (i == count) return;
  const size_t bytes = (count - i) * sizeof(float);
  L::Register x[R];
  float rest[L::kCount] = {};
  for (int j = 0; j < R; ++j) {
    std::memcpy(rest, sources[j] + i, bytes);
    x[j] = L::load(rest);
  }
  for (int m = 0; m < M; ++m) {
    if (!kFirst) std::memcpy(rest, before[m] + i, bytes);
    L::store(rest, sum(m, x, rest));
    std::memcpy(to[m] + i, rest, bytes);
  }
}

// M outputs of any number of sources: of more than are read at once, memory of the kernel's own
// holds the sums so far.
template <int M, bool kStream>
void combine_piece(float* const* outputs, const std::vector<const float*>& sources,
                   const float* factors, int64_t begin, int64_t end) {
  const int64_t r = sources.size();
  alignas(64) float sums[M][kFloats];
  float *kept[M], *to[M];
  for (int m = 0; m < M; ++m) {
    kept[m] = sums[m];
    to[m] = outputs[m] + begin;
  }
  for (int64_t j = 0; j < r; j += kSources) {
    const float* from[kSources];
    const int count = static_cast<int>(std::min<int64_t>(kSources, r - j));
    for (int i = 0; i < count; ++i) from[i] = sources[j + i] + begin;
    const auto run = [&](auto first, auto stream) {
      constexpr bool kFirst = first, kPast = stream;
      const auto block = count == 1   ? combine_block<M, 1, kFirst, kPast>
                         : count == 2 ? combine_block<M, 2, kFirst, kPast>
                         : count == 3 ? combine_block<M, 3, kFirst, kPast>
                                      : combine_block<M, kSources, kFirst, kPast>;
      block(j + kSources < r ? kept : to, kept, from, factors + j, r, end - begin);
    };
    const std::bool_constant<kStream> past;
    const std::false_type no;
    const std::true_type yes;
    if (j + kSources < r) {
      j == 0 ? run(yes, no) : run(no, no);
    } else {
      j == 0 ? run(yes, past) : run(no, past);
    }
  }
}

// All rows fp32.
void combine_floats(const std::vector<float*>& outputs, const std::vector<const float*>& sources,
                    const std::vector<float>& factors, int64_t begin, int64_t end) {
  const int64_t r = sources.size(), k = outputs.size();
  for (int64_t at = begin; at < end; at += kFloats) {
    const int64_t stop = std::min(at + kFloats, end);
    int64_t m = 0;
    for (; m + kOutputs <= k; m += kOutputs) {
      combine_piece<kOutputs, false>(&outputs[m], sources, &factors[m * r], at, stop);
    }
    for (; m < k; ++m) combine_piece<1, false>(&outputs[m], sources, &factors[m * r], at, stop);
  }
}

// The same past the caches. Each output is cut where its own lines of memory begin, for a line that
// is stored in parts is fetched.
void stream_floats(const std::vector<float*>& outputs, const std::vector<const float*>& sources,
                   const std::vector<float>& factors, int64_t begin, int64_t end) {
  constexpr int64_t kLine = 64 / sizeof(float);
  static_assert(kFloats % kLine == 0, "pieces of an output end where its lines do");
  constexpr int64_t kLines = kFloats / kLine;
  const int64_t r = sources.size(), k = outputs.size(), lines = r * kLines;
  for (int64_t at = begin; at < end; at += kFloats) {
    for (int64_t m = 0; m < k; ++m) {
      // The processor follows a row within a page at most, and other rows come between its pieces:
      // each output has its share of the next piece's lines fetched.
      for (int64_t i = m * lines / k; i < (m + 1) * lines / k; ++i) {
        const float* const next = sources[i / kLines] + at + kFloats;
        __builtin_prefetch(next + i % kLines * kLine);
      }
      const int64_t place = reinterpret_cast<intptr_t>(outputs[m] + at) / sizeof(float) % kLine;
      const int64_t line = std::min(end, at + (kLine - place) % kLine);
      const int64_t stop = std::min(end, line + kFloats);
      const int64_t whole = stop - (stop - line) % kLine;
      const auto piece = [&](auto stream, int64_t from, int64_t to) {
        if (from < to) combine_piece<1, stream>(&outputs[m], sources, &factors[m * r], from, to);
      };
      if (at == begin) piece(std::false_type{}, begin, line);
      piece(std::true_type{}, line, whole);
      piece(std::false_type{}, whole, stop);
    }
  }
  end_of_stream();
}

#endif  // SWA_FAST_HAS_LANES

template <typename Math, typename Source>
void accumulate(Math* sum, const Source* source, int64_t count, Math factor, bool first) {
#if SWA_FAST_HAS_LANES
  if (cpu_has_lanes()) {
    return first ? accumulate_lanes<true>(sum, source, count, factor)
                 : accumulate_lanes<false>(sum, source, count, factor);
  }
#endif
  first ? accumulate_portable<true>(sum, source, count, factor)
        : accumulate_portable<false>(sum, source, count, factor);
}

template <typename Output, typename Math>
void store(Output* output, const Math* sum, int64_t count) {
#if SWA_FAST_HAS_LANES
  if (cpu_has_lanes()) return store_lanes(output, sum, count);
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
#if SWA_FAST_HAS_LANES
  const auto is_float = [](const Row& row) { return row.type == ScalarType::Float; };
  const bool floats = std::all_of(to.begin(), to.end(), is_float) &&
                      std::all_of(from.begin(), from.end(), is_float);
  if (floats && !wide && cpu_has_lanes()) {
    std::vector<float*> targets;
    std::vector<const float*> origins;
    for (const Row& row : to) targets.push_back(reinterpret_cast<float*>(row.data));
    for (const Row& row : from) origins.push_back(reinterpret_cast<const float*>(row.data));
    const std::vector<float> factors(c, c + k * r);
    // Beside many sources the lines that a store fetches are a small part of what is read.
    const bool stream =
        2 * k >= r && outlasts_caches(k * count * static_cast<int64_t>(sizeof(float)));
    torch::stable::parallel_for(0, count, kGrain, [&](int64_t begin, int64_t end) {
      const auto run = stream ? stream_floats : combine_floats;
      run(targets, origins, factors, begin, end);
    });
    return;
  }
#endif
  wide ? combine<double>(to, from, count, c) : combine<float>(to, from, count, c);
}

}  // namespace
}  // namespace swa_fast

STABLE_TORCH_LIBRARY_IMPL(swa_fast, CPU, m) {
  m.impl("combine_.cpu", TORCH_BOX(&swa_fast::combine_cpu));
}
