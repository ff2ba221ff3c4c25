// CPU kernels of swa_fast::update_, swa_fast::swap_ and swa_fast::swag_.
//
// Formula: update.h. Layout: every segment is consecutive in the source and in each average. Bytes
// per element: sizeof(source) + 2 k sizeof(average), 4 + 8 k for k averages in fp32: a piece of the
// source is used for all averages while it is in the first-level cache.
//
// The segments lie end to end on one axis of costs that torch's thread pool splits, so ten thousand
// tiny tensors and one large one are divided equally well.

#include <algorithm>
#include <atomic>

#include "blend_cpu.h"
#include "caches.h"
#include "direct.h"
#include "philox_cpu.h"
#include "update.h"

namespace swa_fast {
namespace {

constexpr int64_t kGrain = 16384;     // elements below which a second thread does not pay
constexpr int64_t kSegmentCost = 64;  // of starting a segment, in elements
constexpr int64_t kCutMultiple = 16;  // segments are cut at multiples of it: whole Philox groups
constexpr int64_t kPiece = 2048;      // elements of the source that all averages use in turn
constexpr int64_t kAhead = 16;        // segments among which short ones are on their way
constexpr int64_t kShort = 512;       // bytes of these at most

int64_t element_bytes(int code) {
  return code == kDouble ? 8 : code == kFloat ? 4 : code == kBytes ? 1 : 2;
}

// The segments of a table, and how to share them among threads.
class Table {
 public:
  // Of the averages, `rows` are used, from `first` on.
  Table(const int64_t* words, int64_t count, int64_t width, int first, int rows)
      : first_(first),
        rows_(rows),
        words_(words),
        width_(width),
        count_(count),
        start_(count_ + 1) {
    for (int64_t i = 0; i < count_; ++i) {
      start_[i + 1] = start_[i] + kSegmentCost + segment(i).count();
    }
  }
  Table(const Tensor& table, int first, int rows)
      : Table(words_of(table), table.size(0), table.size(1), first, rows) {}

  // Calls f(segment, begin, end) for pieces of segments that together cover all elements once. Each
  // thread has a copy of f, which may remember something from one segment to the next.
  template <typename F>
  void for_each(const F& shared) const {
    torch::stable::parallel_for(0, start_[count_], kGrain, [&](int64_t begin, int64_t end) {
      F f = shared;
      const auto after = std::upper_bound(start_.begin(), start_.end(), begin);
      for (int64_t i = after - start_.begin() - 1; i < count_ && start_[i] < end; ++i) {
        prefetch(i + kAhead);
        const int64_t from = cut(i, begin), to = cut(i, end);
        if (from < to) f(segment(i), from, to);
      }
    });
  }

 private:
  static const int64_t* words_of(const Tensor& table) {
    STD_TORCH_CHECK(table.is_cpu(), "update_.cpu: table must be on the CPU");
    return static_cast<const int64_t*>(table.const_data_ptr());
  }

  Segment segment(int64_t i) const { return {words_ + i * width_}; }

  // A short segment that follows soon: tensors that others allocated lie anywhere, and the
  // processor fetches ahead only within one of them. Long ones are left to it, which does it
  // better.
  void prefetch(int64_t i) const {
    if (i >= count_) return;
    const Segment next = segment(i);
    const int64_t read = next.count() * element_bytes(next.source_type());
    const int64_t both = next.count() * element_bytes(next.average_type());
    if (read > kShort || both > kShort) return;
    const char* source = static_cast<const char*>(next.source());
    for (int64_t at = 0; at < read; at += 64) fetch_ahead(source + at);
    for (int row = first_; row < first_ + rows_; ++row) {
      for (int64_t at = 0; at < both; at += 64) fetch_ahead(next.average(row) + at);
    }
  }

  // The element of segment `i` at a place of the axis; both neighbours of a cut compute the same.
  int64_t cut(int64_t i, int64_t place) const {
    const int64_t element = place - start_[i] - kSegmentCost, count = segment(i).count();
    if (element >= count) return count;
    return element <= 0 ? 0 : element - element % kCutMultiple;
  }

  int first_, rows_;
  const int64_t* words_;
  int64_t width_, count_;
  std::vector<int64_t> start_;  // of each segment on the axis of costs, and the axis' end
};

template <typename F>
void dispatch_code(int code, const F& f) {
  switch (code) {
    case kFloat:
      return f(float{});
    case kDouble:
      return f(double{});
    case kBfloat16:
      return f(BFloat16{});
    case kHalf:
      return f(Half{});
    default:
      STD_TORCH_CHECK(false, "update_.cpu: unknown type code ", code);
  }
}

#if SWA_FAST_HAS_LANES

constexpr int kBlock = 8 * kPhiloxGroups;  // elements that a block of random bits serves
static_assert(kCutMultiple % 8 == 0, "every piece of a segment begins with a group");

template <Mode kMode, typename Source>
SWA_FAST_LANES inline void blend_block(BFloat16* average, const Source* source,
                                       Lanes<float>::Register c,
                                       const Lanes<float>::Bits (&bits)[kPhiloxGroups]) {
  using L = Lanes<float>;
  for (int64_t i = 0; i < kBlock; i += 8) {
    auto x = L::load(source + i);
    if constexpr (kMode != Mode::kCopy) {
      const auto a = L::load(average + i);
      x = L::blend(kMode == Mode::kFromAverage ? a : x, c, a, x);
    }
    L::store_with(average + i, x, bits[i / 8]);
  }
}

// `count` elements, the first of which is the first of `group`.
template <Mode kMode, typename Source>
SWA_FAST_LANES void blend_stochastically_lanes(BFloat16* average, const Source* source,
                                               int64_t count, float coefficient, int64_t seed,
                                               uint64_t group, int64_t n, int row) {
  const auto c = Lanes<float>::broadcast(coefficient);
  Lanes<float>::Bits bits[kPhiloxGroups];
  int64_t i = 0;
  for (; i + kBlock <= count; i += kBlock) {
    philox_groups(seed, group + i / 8, n, row, bits);
    blend_block<kMode>(average + i, source + i, c, bits);
  }
  if (i < count) {
    BFloat16 a[kBlock] = {};
    Source b[kBlock] = {};
    std::memcpy(a, average + i, (count - i) * sizeof(BFloat16));
    std::memcpy(b, source + i, (count - i) * sizeof(Source));
    philox_groups(seed, group + i / 8, n, row, bits);
    blend_block<kMode>(a, b, c, bits);
    std::memcpy(average + i, a, (count - i) * sizeof(BFloat16));
  }
}

#endif  // SWA_FAST_HAS_LANES

class Update {
 public:
  int rows;
  std::optional<int64_t> seed;
  double weight[kMaxAverages] = {};
  int64_t n[kMaxAverages] = {};

  Update(int rows, std::optional<int64_t> seed) : rows(rows), seed(seed) {}

  void operator()(Segment segment, int64_t begin, int64_t end) {
    if (segment.average_type() == kBytes) {
      const char* source = static_cast<const char*>(segment.source());
      for (int row = 0; row < rows; ++row) {
        copy_bytes(segment.average(row) + begin, source + begin, end - begin);
      }
      return;
    }
    choose(segment);
    const int64_t step = rows == 1 ? end - begin : kPiece;
    for (int64_t at = begin; at < end; at += step) {
      const int64_t count = std::min(end - at, step);
      for (int row = 0; row < rows; ++row) {
        const Step& chosen = steps_[row];
        if (chosen.stochastically != nullptr) {
          (this->*chosen.stochastically)(segment, row, at, at + count, chosen.rule);
        } else if (chosen.kernel != nullptr) {
          chosen.kernel(segment.average(row) + at * average_size_,
                        static_cast<const char*>(segment.source()) + at * source_size_, count,
                        chosen.rule.coefficient);
        }
      }
    }
  }

 private:
  using Stochastically = void (Update::*)(Segment, int, int64_t, int64_t, Blend) const;

  // What is done for an average to segments of one kind: nothing, where the weight is 0.
  struct Step {
    BlendKernel kernel = nullptr;
    Stochastically stochastically = nullptr;
    Blend rule{};
  };

  // Counters are eight bytes, of which a model has as many as BatchNorm layers.
  static void copy_bytes(char* to, const char* from, int64_t count) {
    if (count == 8) {
      std::memcpy(to, from, 8);
    } else {
      std::memcpy(to, from, count);
    }
  }

  // The steps for segments of these types, which are mostly those of the segment before.
  void choose(Segment segment) {
    const int average_type = segment.average_type(), source_type = segment.source_type();
    const int kind = (average_type << 8 | source_type) << 1 | segment.copied();
    if (kind == kind_) return;
    kind_ = kind;
    average_size_ = element_bytes(average_type);
    source_size_ = element_bytes(source_type);
    dispatch_code(average_type, [&](auto average) {
      dispatch_code(source_type, [&](auto source) {
        for (int row = 0; row < rows; ++row) {
          steps_[row] = step<decltype(average), decltype(source)>(row, segment.copied());
        }
      });
    });
  }

  template <typename Average, typename Source>
  Step step(int row, bool copied) const {
    using Math = opmath_t<Average, Source>;
    const double w = copied ? 1.0 : weight[row];
    if (w == 0.0) return {};
    const Blend rule = make_blend<Math>(static_cast<Math>(w), w == 1.0);
    if constexpr (std::is_same_v<Average, BFloat16> && std::is_same_v<Math, float>) {
      if (seed && !copied) return {nullptr, &Update::blend_stochastically<Source>, rule};
    }
    return {blend_kernel<Average, Source>(rule.mode), nullptr, rule};
  }

  template <typename Source>
  void blend_stochastically(Segment segment, int row, int64_t begin, int64_t end,
                            Blend rule) const {
    BFloat16* average = reinterpret_cast<BFloat16*>(segment.average(row));
    const Source* source = static_cast<const Source*>(segment.source());
    const int64_t first = segment.place();
#if SWA_FAST_HAS_LANES
    if (cpu_has_lanes()) {
      const auto vectorised =
          rule.mode == Mode::kCopy          ? blend_stochastically_lanes<Mode::kCopy, Source>
          : rule.mode == Mode::kFromAverage ? blend_stochastically_lanes<Mode::kFromAverage, Source>
                                            : blend_stochastically_lanes<Mode::kFromSource, Source>;
      return vectorised(average + begin, source + begin, end - begin,
                        static_cast<float>(rule.coefficient), *seed,
                        static_cast<uint64_t>(first + begin) / 8, n[row], row);
    }
#endif
    for (int64_t eight = begin; eight < end; eight += 8) {
      const Philox random(*seed, static_cast<uint64_t>(first + eight) / 8, n[row], row);
      for (int64_t i = eight; i < std::min(end, eight + 8); ++i) {
        const float x = rule.apply(static_cast<float>(average[i]), static_cast<float>(source[i]));
        average[i] = round_stochastically(x, random.bits(static_cast<int>(i - eight)));
      }
    }
  }

  int kind_ = -1;  // of the segments that the rest is for
  int64_t average_size_ = 0, source_size_ = 0;
  Step steps_[kMaxAverages];
};

template <typename T>
bool all_finite(const void* data, int64_t begin, int64_t end) {
  using Bits = typename Exponent<T>::Bits;
  const char* bytes = static_cast<const char*>(data) + begin * sizeof(T);
  bool bad = false;
  for (int64_t i = 0; i < end - begin; ++i) {
    Bits bits;
    std::memcpy(&bits, bytes + i * sizeof(T), sizeof(T));
    bad |= (bits & Exponent<T>::kMask) == Exponent<T>::kMask;
  }
  return !bad;
}

// Everything after the question whether an update is due.
void update_all(const Table& segments, Update update, int64_t* n, int64_t* counters,
                const WeightRule* rules, bool skip_nonfinite) {
  if (skip_nonfinite) {
    std::atomic<bool> finite{true};
    segments.for_each([&](Segment segment, int64_t begin, int64_t end) {
      if (segment.copied()) return;
      dispatch_code(segment.source_type(), [&](auto source) {
        if (!all_finite<decltype(source)>(segment.source(), begin, end)) finite = false;
      });
    });
    if (!finite) {
      ++counters[kSkipped];
      return;
    }
  }
  for (int row = 0; row < update.rows; ++row) {
    update.n[row] = n[row];
    update.weight[row] = rules[row].weight(n[row]);
  }
  segments.for_each(update);
  if (counters == nullptr) return;
  for (int row = 0; row < update.rows; ++row) ++n[row];
}

void update_cpu(std::vector<Tensor> /*averages*/, std::vector<Tensor> /*sources*/,
                Tensor n_averaged, std::optional<Tensor> counters, Tensor rules, Tensor table,
                int64_t /*pairs*/, std::optional<int64_t> seed, bool skip_nonfinite,
                int64_t /*short_segments*/, std::optional<Tensor> found_inf,
                std::optional<Tensor> steps, int64_t every, int64_t offset) {
  const Update update(check_update_arguments(n_averaged, counters, rules, table), seed);
  STD_TORCH_CHECK(n_averaged.is_cpu() && (!counters || counters->is_cpu()),
                  "update_.cpu: n_averaged and counters must be on the CPU");
  STD_TORCH_CHECK(counters || !skip_nonfinite, "update_.cpu: skip_nonfinite needs counters");
  const Table segments(table, 0, update.rows);
  const Gate gate = make_gate(found_inf, steps, every, offset, counters, n_averaged);

  if (gate.skipped()) return;
  const bool due = gate.due();
  if (gate.steps != nullptr) ++*gate.steps;
  if (!due) return;
  update_all(segments, update, static_cast<int64_t*>(n_averaged.mutable_data_ptr()),
             counters ? static_cast<int64_t*>(counters->mutable_data_ptr()) : nullptr,
             static_cast<const WeightRule*>(rules.const_data_ptr()), skip_nonfinite);
}

class UpdateOfTable final : public DirectUpdate {
 public:
  explicit UpdateOfTable(const DirectArguments& arguments)
      : arguments_(arguments),
        segments_(arguments.table, arguments.segments, kSegmentHeader + arguments.averages, 0,
                  arguments.averages) {}

  void run() override {
    update_all(segments_, Update(arguments_.averages, arguments_.seed), arguments_.n_averaged,
               arguments_.counters, reinterpret_cast<const WeightRule*>(arguments_.rules),
               arguments_.skip_nonfinite);
  }

 private:
  const DirectArguments arguments_;
  const Table segments_;
};

void swap_cpu(std::vector<Tensor> /*averages*/, std::vector<Tensor> /*sources*/, Tensor table,
              int64_t row, int64_t /*short_segments*/) {
  check_swap_arguments(table, row);
  Table(table, static_cast<int>(row), 1).for_each([&](Segment segment, int64_t begin, int64_t end) {
    const int64_t size = element_bytes(segment.source_type());
    char* average = segment.average(static_cast<int>(row));
    char* source = static_cast<char*>(const_cast<void*>(segment.source()));
    std::swap_ranges(average + begin * size, average + end * size, source + begin * size);
  });
}

// One element: the mean moves, the squared deviations from it grow (Welford), and how far the
// source is from the new mean is what a column holds.
template <typename Average, typename Source>
void swag_portable(Average* mean, Average* squares, Average* column, const Source* source,
                   int64_t count, Blend rule) {
  for (int64_t i = 0; i < count; ++i) {
    const Average x = static_cast<Average>(source[i]), old = mean[i];
    mean[i] = rule.apply(old, x);
    column[i] = x - mean[i];
    squares[i] = rule.mode == Mode::kCopy ? Average(0) : std::fma(x - old, column[i], squares[i]);
  }
}

#if SWA_FAST_HAS_LANES

template <Mode kMode, typename Average, typename Source>
SWA_FAST_LANES inline void swag_vector(Average* mean, Average* squares, Average* column,
                                       const Source* source, typename Lanes<Average>::Register c) {
  using L = Lanes<Average>;
  const auto x = L::load(source);
  const auto old = L::load(mean);
  const auto now =
      kMode == Mode::kCopy ? x : L::blend(kMode == Mode::kFromAverage ? old : x, c, old, x);
  L::store(mean, now);
  L::store(column, L::sub(x, now));
  L::store(squares, kMode == Mode::kCopy ? L::broadcast(0)
                                         : L::blend(L::load(squares), L::sub(x, old), now, x));
}

template <Mode kMode, typename Average, typename Source>
SWA_FAST_LANES void swag_lanes(Average* mean, Average* squares, Average* column,
                               const Source* source, int64_t count, double coefficient) {
  using L = Lanes<Average>;
  const auto c = L::broadcast(static_cast<Average>(coefficient));
  int64_t i = 0;
  for (; i + L::kCount <= count; i += L::kCount) {
    swag_vector<kMode>(mean + i, squares + i, column + i, source + i, c);
  }
  if (i < count) {
    Average rows[3][L::kCount] = {};
    Source b[L::kCount] = {};
    Average* const memory[] = {mean + i, squares + i, column + i};
    for (int row = 0; row < 3; ++row) {
      std::memcpy(rows[row], memory[row], (count - i) * sizeof(Average));
    }
    std::memcpy(b, source + i, (count - i) * sizeof(Source));
    swag_vector<kMode>(rows[0], rows[1], rows[2], b, c);
    for (int row = 0; row < 3; ++row) {
      std::memcpy(memory[row], rows[row], (count - i) * sizeof(Average));
    }
  }
}

#endif  // SWA_FAST_HAS_LANES

template <typename Average, typename Source>
void swag_range(Segment segment, int64_t begin, int64_t end, double weight, int column_row) {
  const auto row = [&](int index) {
    return reinterpret_cast<Average*>(segment.average(index)) + begin;
  };
  Average* mean = row(kSwagMean);
  Average* squares = row(kSwagSquares);
  Average* column = row(column_row);
  const Source* source = static_cast<const Source*>(segment.source()) + begin;
  const Blend rule = make_blend<Average>(static_cast<Average>(weight), weight == 1.0);
#if SWA_FAST_HAS_LANES
  if (cpu_has_lanes()) {
    const auto vectorised = rule.mode == Mode::kCopy ? swag_lanes<Mode::kCopy, Average, Source>
                            : rule.mode == Mode::kFromAverage
                                ? swag_lanes<Mode::kFromAverage, Average, Source>
                                : swag_lanes<Mode::kFromSource, Average, Source>;
    return vectorised(mean, squares, column, source, end - begin, rule.coefficient);
  }
#endif
  swag_portable(mean, squares, column, source, end - begin, rule);
}

// 4 + 8 + 8 + 4 bytes per fp32 element.
void swag_cpu(std::vector<Tensor> /*averages*/, std::vector<Tensor> /*sources*/, Tensor n_averaged,
              Tensor counters, Tensor table, int64_t pairs, int64_t columns,
              int64_t /*short_segments*/, std::optional<Tensor> found_inf,
              std::optional<Tensor> steps, int64_t every, int64_t offset) {
  check_swag_arguments(n_averaged, counters, table, pairs, columns);
  STD_TORCH_CHECK(n_averaged.is_cpu(), "swag_.cpu: n_averaged must be on the CPU");
  const Gate gate = make_gate(found_inf, steps, every, offset, counters, n_averaged);
  const Table segments(table, kSwagMean, 2);
  if (gate.skipped()) return;
  const bool due = gate.due();
  if (gate.steps != nullptr) ++*gate.steps;
  if (!due) return;
  int64_t& n = *static_cast<int64_t*>(n_averaged.mutable_data_ptr());
  const double weight = 1.0 / static_cast<double>(n + 1);
  const int column = kSwagDeviations + static_cast<int>(n % columns);
  segments.for_each([&](Segment segment, int64_t begin, int64_t end) {
    if (segment.average_type() == kDouble) {
      return swag_range<double, double>(segment, begin, end, weight, column);
    }
    dispatch_code(segment.source_type(), [&](auto source) {
      if constexpr (!std::is_same_v<decltype(source), double>) {
        swag_range<float, decltype(source)>(segment, begin, end, weight, column);
      }
    });
  });
  ++n;
}

}  // namespace

std::unique_ptr<DirectUpdate> make_direct_update(const DirectArguments& arguments) {
  return std::make_unique<UpdateOfTable>(arguments);
}

}  // namespace swa_fast

STABLE_TORCH_LIBRARY_IMPL(swa_fast, CPU, m) {
  m.impl("update_.cpu", TORCH_BOX(&swa_fast::update_cpu));
  m.impl("swap_.cpu", TORCH_BOX(&swa_fast::swap_cpu));
  m.impl("swag_.cpu", TORCH_BOX(&swa_fast::swag_cpu));
}
