// CPU kernel of swa_fast::average_.
//
// Formula: average.h. Layout: every pair is two runs of `numel` elements in the same order (the
// Python front hands over dense tensors only). Bytes per element: sizeof(source) + 2
// sizeof(average), 12 for fp32; bound by memory bandwidth from a few million elements on.
//
// All pairs are laid end to end on one axis of elements and torch's thread pool splits that axis,
// so ten thousand tiny tensors and one large one are divided equally well. The result does not
// depend on where the splits fall: tails go through the same vector arithmetic as full vectors.

#include <algorithm>

#include "blend_cpu.h"

namespace swa_fast {
namespace {

// Below this many elements a second thread costs more than it saves.
constexpr int64_t kGrainElements = 16384;

struct Segment {
  void* average;
  const void* source;
  int64_t begin;  // first element on the common axis
  void (*run)(void*, const void*, int64_t, int64_t, Blend);
  Blend blend;
};

void average_cpu(std::vector<Tensor> averages, std::vector<Tensor> sources, Tensor n_averaged,
                 std::optional<double> decay) {
  check_average_arguments(averages, sources, n_averaged);
  STD_TORCH_CHECK(n_averaged.is_cpu(), "average_.cpu: n_averaged must be on the CPU");
  const int64_t n = *static_cast<const int64_t*>(n_averaged.const_data_ptr());
  const Rule rule(decay);

  std::vector<Segment> segments;
  segments.reserve(averages.size());
  int64_t total = 0;
  for (size_t i = 0; i < averages.size(); ++i) {
    STD_TORCH_CHECK(averages[i].is_cpu() && sources[i].is_cpu(), "average_.cpu: pair ", i,
                    " is not on the CPU");
    const int64_t count = averages[i].numel();
    if (count == 0) continue;
    Segment segment{
        averages[i].mutable_data_ptr(), sources[i].const_data_ptr(), total, nullptr, {}};
    dispatch_floating("average_", averages[i].scalar_type(), [&](auto average) {
      dispatch_floating("average_", sources[i].scalar_type(), [&](auto source) {
        using Average = decltype(average);
        using Source = decltype(source);
        segment.run = average_run<Average, Source>;
        using Math = opmath_t<Average, Source>;
        segment.blend = make_blend<Math>(rule.weight<Math>(n), n == 0);
      });
    });
    segments.push_back(segment);
    total += count;
  }
  if (total == 0) return;

  torch::stable::parallel_for(0, total, kGrainElements, [&](int64_t begin, int64_t end) {
    auto segment = std::upper_bound(segments.begin(), segments.end(), begin,
                                    [](int64_t at, const Segment& s) { return at < s.begin; }) -
                   1;
    for (; begin < end; ++segment) {
      const int64_t stop =
          std::min(end, segment + 1 == segments.end() ? total : (segment + 1)->begin);
      segment->run(segment->average, segment->source, begin - segment->begin, stop - segment->begin,
                   segment->blend);
      begin = stop;
    }
  });
}

}  // namespace
}  // namespace swa_fast

STABLE_TORCH_LIBRARY_IMPL(swa_fast, CPU, m) {
  m.impl("average_.cpu", TORCH_BOX(&swa_fast::average_cpu));
}
