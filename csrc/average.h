// What the CPU and the CUDA averaging kernels share: the rule and the argument checks.
#pragma once

#include <type_traits>

#include "stable_compat.h"

namespace swa_fast {

// Arithmetic type of a pair: fp64 as soon as one side is fp64, else fp32. One conversion at load,
// one rounding at store.
template <typename Average, typename Source>
using opmath_t =
    std::conditional_t<std::is_same_v<Average, double> || std::is_same_v<Source, double>, double,
                       float>;

// average <- source                            if n == 0
// average <- average + w (source - average)    else, w = 1 - decay (EMA) or 1 / (n + 1) (SWA)
struct Rule {
  double one_minus_decay;  // EMA weight; unused for SWA
  bool exponential;

  explicit Rule(std::optional<double> decay)
      : one_minus_decay(1.0 - decay.value_or(0.0)), exponential(decay.has_value()) {}

  template <typename Math>
  C10_HOST_DEVICE Math weight(int64_t n) const {
    return exponential ? static_cast<Math>(one_minus_decay) : Math(1) / static_cast<Math>(n + 1);
  }
};

inline void check_average_arguments(const std::vector<Tensor>& averages,
                                    const std::vector<Tensor>& sources, const Tensor& n_averaged) {
  STD_TORCH_CHECK(averages.size() == sources.size(), "average_: ", averages.size(),
                  " averages but ", sources.size(), " sources");
  STD_TORCH_CHECK(n_averaged.scalar_type() == ScalarType::Long && n_averaged.numel() == 1,
                  "average_: n_averaged must hold one int64");
  for (size_t i = 0; i < averages.size(); ++i) {
    STD_TORCH_CHECK(averages[i].numel() == sources[i].numel(), "average_: pair ", i, " has ",
                    averages[i].numel(), " and ", sources[i].numel(), " elements");
  }
}

}  // namespace swa_fast
