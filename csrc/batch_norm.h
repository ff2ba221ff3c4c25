// What the CPU and the CUDA kernels of swa_fast::batch_norm_collect and swa_fast::batch_norm_merge_
// share: shapes, the arithmetic of a channel, the argument checks.
//
// Statistics of a channel of m values come from one read, as shifted sums on two levels. Groups of
// at most kGroup values are summed in the arithmetic type around a pivot g, the mean of the group's
// first b <= kPivot values,
//
//   s1 = sum (x - g)        s2 = sum (x - g)^2
//
// and groups in fp64 around the channel's first value p, with q = g - p (for fp64 input, where this
// level is no finer than the other, p is the mean of the channel's first values instead):
//
//   first = sum (x - p) = sum over groups of  k q + s1
//   second = sum (x - p)^2 = sum over groups of  s2 + q (k q + 2 s1)
//
//   mean = p + first / m        M2 = second - first^2 / m
//
// b (g - mean of the group)^2 is at most the group's sum of squares around its mean, so s2 is at
// most 1 + k / b <= 9 times that sum: whatever the data, the subtraction costs no more than 9 times
// the error of a sum of 64 squares in the arithmetic type, and m roundings of fp64. The bound does
// not involve mean / std, unlike that of E[x^2] - E[x]^2. Around one p, sums of parts of a channel
// merge by addition.
#pragma once

#include <cmath>

#include "layout.h"
#include "stable_compat.h"

namespace swa_fast {

constexpr int kGroup = 64;
constexpr int kPivot = 8;

// Arithmetic type of an input.
template <typename T>
using statistics_t = opmath_t<T, T>;

// The input as the kernels see it: n samples of c channels of s values, or with channels_last n * s
// rows of c channels. With s = 1 the two are the same memory, and rows are the faster view.
struct Activations {
  int64_t n, c, s;
  bool channels_last;

  C10_HOST_DEVICE int64_t values() const { return n * s; }
};

// Values of the first sample, or rows, that a channel's pivot p is the mean of.
template <typename T>
C10_HOST_DEVICE inline int64_t pivot_values(const Activations& shape) {
  if constexpr (std::is_same_v<statistics_t<T>, double>) {
    const int64_t available = shape.channels_last ? shape.values() : shape.s;
    return available < kPivot ? available : kPivot;
  }
  return 1;
}

template <typename T>
C10_HOST_DEVICE inline double channel_pivot(const T* x, const Activations& shape, int64_t channel) {
  const int64_t stride = shape.channels_last ? shape.c : 1;
  const T* const first = x + (shape.channels_last ? channel : channel * shape.s);
  const int64_t count = pivot_values<T>(shape);
  double sum = 0.0;
  for (int64_t i = 0; i < count; ++i) {
    sum += static_cast<double>(static_cast<statistics_t<T>>(first[i * stride]));
  }
  return count == 1 ? sum : sum / static_cast<double>(count);
}

// Sums over a part of a channel, around the channel's pivot.
struct Sums {
  double first, second;

  C10_HOST_DEVICE void add(double value) {
    first += value;
    second += value * value;
  }
  C10_HOST_DEVICE void add(const Sums& other) {
    first += other.first;
    second += other.second;
  }
  // A group of k values around its pivot, which is `q` from the channel's.
  C10_HOST_DEVICE void add_group(double q, double k, double s1, double s2) {
    first += k * q + s1;
    second += s2 + q * (k * q + 2.0 * s1);
  }
};

struct Moments {
  double mean, m2;
};

C10_HOST_DEVICE inline Moments moments(const Sums& sums, double pivot, double m) {
  const double shift = sums.first / m;
  const double m2 = sums.second - sums.first * shift;
  // Written so that NaN stays.
  return {pivot + shift, m2 < 0.0 ? 0.0 : m2};
}

// y = scale (x - centre) + offset. The centre is the mean rounded to the arithmetic type and the
// offset makes up for the rounding, so a large mean costs no digits.
template <typename Math>
struct Coefficients {
  Math centre, scale, offset;
};

template <typename Math>
C10_HOST_DEVICE inline Coefficients<Math> coefficients(const Moments& statistics, double m,
                                                       double eps, double weight, double bias) {
  const Math centre = static_cast<Math>(statistics.mean);
  const double scale = weight / sqrt(statistics.m2 / m + eps);
  const double offset = bias - (statistics.mean - static_cast<double>(centre)) * scale;
  return {centre, static_cast<Math>(scale), static_cast<Math>(offset)};
}

// An optional vector of one of the four dtypes, read element by element as fp64.
struct AffineVector {
  const void* data;
  ScalarType type;

  C10_HOST_DEVICE double at(int64_t i, double absent) const {
    if (data == nullptr) return absent;
    switch (type) {
      case ScalarType::Double:
        return static_cast<const double*>(data)[i];
      case ScalarType::BFloat16:
        return static_cast<float>(static_cast<const BFloat16*>(data)[i]);
      case ScalarType::Half:
        return static_cast<float>(static_cast<const Half*>(data)[i]);
      default:
        return static_cast<const float*>(data)[i];
    }
  }
};

// A column of `batch`, [kBatchRows, c] with `row_stride` elements between rows.
struct BatchColumns {
  double* data;
  int64_t row_stride;

  C10_HOST_DEVICE void store(int64_t channel, const Activations& shape,
                             const Moments& statistics) const {
    double* column = data + channel;
    column[kBatchValues * row_stride] = static_cast<double>(shape.values());
    column[kBatchSamples * row_stride] = static_cast<double>(shape.n);
    column[kBatchMean * row_stride] = statistics.mean;
    column[kBatchM2 * row_stride] = statistics.m2;
  }
};

// The formulas are in swa_fast/_ops.py, batch_norm_merge_. Column `i` of `total` of both tensors.
C10_HOST_DEVICE inline void merge_channel(double* accumulators, double* batch, int64_t total,
                                          int64_t i, int estimator) {
  const double m = batch[kBatchValues * total + i];
  if (!(m > 0.0)) return;
  const double samples = batch[kBatchSamples * total + i];
  const double mean = batch[kBatchMean * total + i];
  const double m2 = batch[kBatchM2 * total + i];
  const double variance = m > 1.0 ? m2 / (m - 1.0) : m2;
  double* const a = accumulators + i;

  const double values_before = a[kValues * total];
  const double samples_before = a[kSamples * total];
  const double uses = a[kBatches * total] + 1.0;
  const double delta = mean - a[kMean * total];
  if (estimator == kPooled) {
    const double share = m / (values_before + m);
    a[kMean * total] += share * delta;
    a[kSpread * total] += m2 + delta * delta * values_before * share;
  } else {
    const double share = estimator == kTorch ? 1.0 / uses : samples / (samples_before + samples);
    a[kMean * total] += share * delta;
    a[kSpread * total] += share * (variance - a[kSpread * total]);
  }
  a[kValues * total] = values_before + m;
  a[kSamples * total] = samples_before + samples;
  a[kBatches * total] = uses;

  const double mean_delta = mean - a[kMeanMean * total];
  a[kMeanMean * total] += mean_delta / uses;
  a[kMeanM2 * total] += mean_delta * (mean - a[kMeanMean * total]);
  const double variance_delta = variance - a[kVarMean * total];
  a[kVarMean * total] += variance_delta / uses;
  a[kVarM2 * total] += variance_delta * (variance - a[kVarMean * total]);

  batch[kBatchValues * total + i] = 0.0;
}

// The stable ABI's is_contiguous() knows no memory formats, so strides are read. Dimensions of size
// 1 have strides without meaning.
inline Activations check_activations(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() >= 2 && x.numel() > 0,
                  "batch_norm_collect: x must have two dimensions or more and elements");
  Activations shape{x.size(0), x.size(1), 1, false};
  for (int64_t d = 2; d < x.dim(); ++d) shape.s *= x.size(d);
  if (x.is_contiguous()) {
    shape.channels_last = shape.s == 1;
    return shape;
  }
  int64_t expected = 1;
  const auto dense = [&](int64_t d) {
    const bool yes = x.size(d) == 1 || x.stride(d) == expected;
    expected *= x.size(d);
    return yes;
  };
  shape.channels_last = dense(1);
  for (int64_t d = x.dim() - 1; d >= 2; --d) shape.channels_last &= dense(d);
  shape.channels_last &= dense(0);
  STD_TORCH_CHECK(shape.channels_last,
                  "batch_norm_collect: x must be contiguous or channels-last; call contiguous()");
  return shape;
}

inline AffineVector check_affine(const std::optional<Tensor>& vector, const Tensor& x,
                                 const char* name) {
  if (!vector.has_value()) return {nullptr, ScalarType::Float};
  const ScalarType type = vector->scalar_type();
  STD_TORCH_CHECK(vector->numel() == x.size(1) && vector->is_contiguous() &&
                      vector->get_device_index() == x.get_device_index(),
                  "batch_norm_collect: ", name, " must hold ", x.size(1),
                  " contiguous elements on x's device");
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double ||
                      type == ScalarType::BFloat16 || type == ScalarType::Half,
                  "batch_norm_collect: ", name,
                  " must be float32, float64, bfloat16 or float16, found dtype code ",
                  static_cast<int>(type));
  return {vector->const_data_ptr(), type};
}

inline BatchColumns check_batch(const Tensor& batch, const Tensor& x) {
  STD_TORCH_CHECK(batch.scalar_type() == ScalarType::Double && batch.dim() == 2 &&
                      batch.size(0) == kBatchRows && batch.size(1) == x.size(1) &&
                      batch.stride(1) == 1 && batch.get_device_index() == x.get_device_index(),
                  "batch_norm_collect: batch must be fp64 of shape [4, ", x.size(1),
                  "] with stride 1 along the channels, on x's device");
  return {static_cast<double*>(batch.mutable_data_ptr()), batch.stride(0)};
}

inline int64_t check_merge(const Tensor& accumulators, const Tensor& batch, int64_t estimator) {
  const auto is_table = [](const Tensor& tensor, int64_t rows) {
    return tensor.scalar_type() == ScalarType::Double && tensor.dim() == 2 &&
           tensor.size(0) == rows && tensor.is_contiguous();
  };
  STD_TORCH_CHECK(is_table(accumulators, kAccumulatorRows) && is_table(batch, kBatchRows) &&
                      accumulators.size(1) == batch.size(1) &&
                      accumulators.get_device_index() == batch.get_device_index(),
                  "batch_norm_merge_: accumulators and batch must be contiguous fp64 of shapes "
                  "[9, channels] and [4, channels] on one device");
  STD_TORCH_CHECK(0 <= estimator && estimator <= kPooled, "batch_norm_merge_: unknown estimator ",
                  estimator);
  return batch.size(1);
}

}  // namespace swa_fast
