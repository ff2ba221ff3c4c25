// The inner loops of csrc/batch_norm_cpu.cpp, which includes this file once for every instruction
// set, each time in a namespace of its own with Vec<Math> and SWA_FAST_TARGET defined. For that
// reason there is no include guard, and nothing is included.

// first and second += a group in every lane, as Sums::add_group.
SWA_FAST_TARGET inline void add_groups(Vec<double>::Register q, Vec<double>::Register k,
                                       Vec<double>::Register s1, Vec<double>::Register s2,
                                       Vec<double>::Register& first,
                                       Vec<double>::Register& second) {
  using D = Vec<double>;
  const auto kq = D::mul(k, q);
  first = D::add(first, D::add(kq, s1));
  second = D::add(second, D::fma(q, D::add(kq, D::add(s1, s1)), s2));
}

// One value, rounded as in a vector.
template <typename T>
SWA_FAST_TARGET inline T normalise_one(T x, const Coefficients<statistics_t<T>>& c, bool relu) {
  using Math = statistics_t<T>;
  using V = Vec<Math>;
  const Math d = static_cast<Math>(x) - c.centre;
  const Math value = V::kCount == 1 ? d * c.scale + c.offset : std::fma(d, c.scale, c.offset);
  return static_cast<T>(clamp(value, relu));
}

// The mean of `rows` vectors, `stride` elements apart.
template <typename V, typename T>
SWA_FAST_TARGET inline typename V::Register mean_of_rows(const T* x, int64_t rows, int64_t stride) {
  auto sum = V::load(x);
  for (int64_t row = 1; row < rows; ++row) sum = V::add(sum, V::load(x + row * stride));
  return V::mul(sum, V::broadcast(typename V::Scalar(1) / static_cast<typename V::Scalar>(rows)));
}

// One channel's sums over runs of memory. Every lane is a group, and four vectors are under way at
// a time; what a run leaves over is summed in fp64 value by value.
template <typename T>
class ChannelSums {
  using Math = statistics_t<T>;
  using V = Vec<Math>;
  using D = Vec<double>;
  using Register = typename V::Register;

 public:
  SWA_FAST_TARGET void start(double pivot) {
    origin_ = pivot;
    vectors_ = 0;
    for (int i = 0; i < V::kParts; ++i) first_[i] = second_[i] = D::broadcast(0.0);
    rest_ = {0.0, 0.0};
  }

  SWA_FAST_TARGET inline void add(const T* x, int64_t count) {
    int64_t vectors = count / V::kCount;
    const T* const rest = x + vectors * V::kCount;
    while (vectors > 0) {
      const int64_t now = std::min<int64_t>(vectors, kGroup - vectors_);
      if (vectors_ == 0) {
        pivot_ = mean_of_rows<V>(x, std::min<int64_t>(now, kPivot), V::kCount);
        s1_ = s2_ = V::broadcast(0);
      }
      add_vectors(x, now);
      x += now * V::kCount;
      vectors -= now;
      vectors_ += now;
      if (vectors_ == kGroup) end_group();
    }
    for (int64_t i = 0; i < count % V::kCount; ++i) {
      rest_.add(static_cast<double>(static_cast<Math>(rest[i])) - origin_);
    }
  }

  SWA_FAST_TARGET Sums finish() {
    if (vectors_ > 0) end_group();
    double first[D::kCount * V::kParts], second[D::kCount * V::kParts];
    for (int i = 0; i < V::kParts; ++i) {
      D::store(first + D::kCount * i, first_[i]);
      D::store(second + D::kCount * i, second_[i]);
    }
    Sums sums = rest_;
    for (int i = 0; i < D::kCount * V::kParts; ++i) sums.add(Sums{first[i], second[i]});
    return sums;
  }

 private:
  SWA_FAST_TARGET inline void add_vectors(const T* x, int64_t vectors) {
    const Register zero = V::broadcast(0);
    Register a[4] = {s1_, zero, zero, zero};
    Register b[4] = {s2_, zero, zero, zero};
    const Register pivot = pivot_;
    int64_t i = 0;
    for (; i + 4 <= vectors; i += 4) {
      for (int u = 0; u < 4; ++u) {
        prefetch(x + (i + u) * V::kCount, kAhead);
        const Register d = V::sub(V::load(x + (i + u) * V::kCount), pivot);
        a[u] = V::add(a[u], d);
        b[u] = V::fma(d, d, b[u]);
      }
    }
    for (; i < vectors; ++i) {
      const Register d = V::sub(V::load(x + i * V::kCount), pivot);
      a[0] = V::add(a[0], d);
      b[0] = V::fma(d, d, b[0]);
    }
    s1_ = V::add(V::add(a[0], a[1]), V::add(a[2], a[3]));
    s2_ = V::add(V::add(b[0], b[1]), V::add(b[2], b[3]));
  }

  SWA_FAST_TARGET inline void end_group() {
    const auto k = D::broadcast(static_cast<double>(vectors_));
    const auto origin = D::broadcast(origin_);
    for (int i = 0; i < V::kParts; ++i) {
      add_groups(D::sub(V::part(pivot_, i), origin), k, V::part(s1_, i), V::part(s2_, i), first_[i],
                 second_[i]);
    }
    vectors_ = 0;
  }

  Register pivot_, s1_, s2_;
  typename D::Register first_[V::kParts], second_[V::kParts];
  int64_t vectors_;  // in the group under way
  double origin_;
  Sums rest_;
};

// sums[i] of channel + i, for `channels` of them, over `count` values from `begin` on of each of
// `samples` samples.
template <typename T>
SWA_FAST_TARGET void sum_tile(const Input<T>& input, int64_t channel, int64_t channels,
                              int64_t sample, int64_t samples, int64_t begin, int64_t count,
                              Sums* sums) {
  const Activations& shape = input.shape;
  ChannelSums<T> tile[kMaxTile];
  for (int64_t i = 0; i < channels; ++i) tile[i].start(input.pivot(channel + i));
  for (int64_t n = sample; n < sample + samples; ++n) {
    const T* x = input.x + (n * shape.c + channel) * shape.s + begin;
    // The next sample's first lines; the hardware then follows.
    for (int64_t byte = 0; byte < kAhead; byte += 64) {
      prefetch(x, byte + shape.c * shape.s * static_cast<int64_t>(sizeof(T)));
    }
    for (int64_t i = 0; i < channels; ++i) tile[i].add(x + i * shape.s, count);
  }
  for (int64_t i = 0; i < channels; ++i) sums[i] = tile[i].finish();
}

// kStream: past the caches, for vectors at multiples of their size.
template <bool kStream, typename T>
SWA_FAST_TARGET inline void write(T* y, typename Vec<statistics_t<T>>::Register value) {
  if constexpr (kStream) {
    Vec<statistics_t<T>>::stream(y, value);
  } else {
    Vec<statistics_t<T>>::store(y, value);
  }
}

template <typename T>
bool can_stream(const T* y) {
  return reinterpret_cast<uintptr_t>(y) % (Vec<statistics_t<T>>::kCount * sizeof(T)) == 0;
}

template <bool kStream, typename T>
SWA_FAST_TARGET void normalise_vectors(const T* x, T* y, int64_t vectors,
                                       const Coefficients<statistics_t<T>>& c, bool relu) {
  using V = Vec<statistics_t<T>>;
  const auto centre = V::broadcast(c.centre), scale = V::broadcast(c.scale),
             offset = V::broadcast(c.offset);
  for (int64_t i = 0; i < vectors * V::kCount; i += V::kCount) {
    prefetch(x + i, kAhead);
    const auto value = V::fma(V::sub(V::load(x + i), centre), scale, offset);
    write<kStream>(y + i, relu ? V::relu(value) : value);
  }
}

template <typename T>
SWA_FAST_TARGET void normalise_run(const T* x, T* y, int64_t count,
                                   const Coefficients<statistics_t<T>>& c, bool relu, bool stream) {
  const int64_t vectors = count / Vec<statistics_t<T>>::kCount;
  if (stream && can_stream(y)) {
    normalise_vectors<true>(x, y, vectors, c, relu);
  } else {
    normalise_vectors<false>(x, y, vectors, c, relu);
  }
  for (int64_t i = vectors * Vec<statistics_t<T>>::kCount; i < count; ++i) {
    y[i] = normalise_one(x[i], c, relu);
  }
}

// Adds to first and second of every whole vector of columns. Eight rows at a time share one load
// and store of a column's sums, which live in the first-level cache; `work` holds 3 * channels.
template <typename T>
SWA_FAST_TARGET void sum_row_vectors(const T* x, int64_t rows, int64_t channels,
                                     const double* channel_pivots, statistics_t<T>* work,
                                     double* first, double* second) {
  using V = Vec<statistics_t<T>>;
  using D = Vec<double>;
  using Register = typename V::Register;
  constexpr int64_t kRows = 8;
  static_assert(kGroup % kRows == 0 && kPivot <= kRows);
  const int64_t full = channels - channels % V::kCount;
  const int64_t ahead = kRows * channels * static_cast<int64_t>(sizeof(T));
  auto* const pivots = work;
  auto* const s1 = pivots + channels;
  auto* const s2 = s1 + channels;
  for (int64_t group = 0; group < rows; group += kGroup) {
    const int64_t in_group = std::min<int64_t>(kGroup, rows - group);
    for (int64_t row = 0; row < in_group; row += kRows) {
      const T* const at = x + (group + row) * channels;
      const int64_t now = std::min(kRows, in_group - row);
      for (int64_t i = 0; i < full; i += V::kCount) {
        const Register zero = V::broadcast(0);
        // Two chains each, because additions take longer than loads.
        Register pivot, a[2] = {zero, zero}, b[2] = {zero, zero};
        if (row == 0) {
          pivot = mean_of_rows<V>(at + i, std::min<int64_t>(in_group, kPivot), channels);
          V::store(pivots + i, pivot);
        } else {
          pivot = V::load(pivots + i);
          a[0] = V::load(s1 + i);
          b[0] = V::load(s2 + i);
        }
        if (now == kRows) {
          for (int64_t u = 0; u < kRows; ++u) {
            prefetch(at + u * channels + i, ahead);
            const Register d = V::sub(V::load(at + u * channels + i), pivot);
            a[u % 2] = V::add(a[u % 2], d);
            b[u % 2] = V::fma(d, d, b[u % 2]);
          }
        } else {
          for (int64_t u = 0; u < now; ++u) {
            const Register d = V::sub(V::load(at + u * channels + i), pivot);
            a[0] = V::add(a[0], d);
            b[0] = V::fma(d, d, b[0]);
          }
        }
        V::store(s1 + i, V::add(a[0], a[1]));
        V::store(s2 + i, V::add(b[0], b[1]));
      }
    }
    const auto k = D::broadcast(static_cast<double>(in_group));
    for (int64_t i = 0; i < full; i += V::kCount) {
      const Register pivot = V::load(pivots + i), a = V::load(s1 + i), b = V::load(s2 + i);
      for (int part = 0; part < V::kParts; ++part) {
        const int64_t j = i + D::kCount * part;
        auto f = D::load(first + j), s = D::load(second + j);
        add_groups(D::sub(V::part(pivot, part), D::load(channel_pivots + j)), k, V::part(a, part),
                   V::part(b, part), f, s);
        D::store(first + j, f);
        D::store(second + j, s);
      }
    }
  }
}

// The sums of every column of `rows` rows: first sums of all channels, then second ones, which are
// overwritten.
template <typename T>
SWA_FAST_TARGET void sum_rows(const T* x, int64_t rows, int64_t channels,
                              const double* channel_pivots, double* sums) {
  using Math = statistics_t<T>;
  double* const first = sums;
  double* const second = sums + channels;
  std::fill(first, second + channels, 0.0);
  std::vector<Math> work(3 * channels);
  sum_row_vectors(x, rows, channels, channel_pivots, work.data(), first, second);
  const int64_t full = channels - channels % Vec<Math>::kCount;
  for (int64_t row = 0; full < channels && row < rows; ++row) {
    for (int64_t i = full; i < channels; ++i) {
      const double d =
          static_cast<double>(static_cast<Math>(x[row * channels + i])) - channel_pivots[i];
      first[i] += d;
      second[i] += d * d;
    }
  }
}

// kRows rows at a time share the loads of a column's coefficients.
template <int64_t kRows, bool kStream, typename T>
SWA_FAST_TARGET void normalise_row_vectors(const T* x, T* y, int64_t rows, int64_t channels,
                                           const statistics_t<T>* c, bool relu) {
  using V = Vec<statistics_t<T>>;
  const int64_t full = channels - channels % V::kCount;
  const int64_t ahead = kRows == 1 ? kAhead : kRows * channels * static_cast<int64_t>(sizeof(T));
  for (int64_t row = 0; row < rows; row += kRows) {
    const int64_t now = std::min(kRows, rows - row);
    const T* const from = x + row * channels;
    T* const to = y + row * channels;
    for (int64_t i = 0; i < full; i += V::kCount) {
      const auto centre = V::load(c + i), scale = V::load(c + channels + i),
                 offset = V::load(c + 2 * channels + i);
      const auto one = [&](int64_t u) SWA_FAST_TARGET {
        prefetch(from + u * channels + i, ahead);
        const auto value = V::fma(V::sub(V::load(from + u * channels + i), centre), scale, offset);
        write<kStream>(to + u * channels + i, relu ? V::relu(value) : value);
      };
      if (now == kRows) {
        for (int64_t u = 0; u < kRows; ++u) one(u);
      } else {
        for (int64_t u = 0; u < now; ++u) one(u);
      }
    }
  }
}

// `c` holds the centres of all channels, then the scales, then the offsets.
template <typename T>
SWA_FAST_TARGET void normalise_rows(const T* x, T* y, int64_t rows, int64_t channels,
                                    const statistics_t<T>* c, bool relu, bool stream) {
  using Math = statistics_t<T>;
  const int64_t full = channels - channels % Vec<Math>::kCount;
  stream = stream && can_stream(y) && can_stream(y + channels);
  // A long row is a stream of its own, which the hardware follows better than several.
  if (channels * static_cast<int64_t>(sizeof(T)) >= kAhead) {
    stream ? normalise_row_vectors<1, true>(x, y, rows, channels, c, relu)
           : normalise_row_vectors<1, false>(x, y, rows, channels, c, relu);
  } else {
    stream ? normalise_row_vectors<4, true>(x, y, rows, channels, c, relu)
           : normalise_row_vectors<4, false>(x, y, rows, channels, c, relu);
  }
  for (int64_t row = 0; full < channels && row < rows; ++row) {
    for (int64_t i = full; i < channels; ++i) {
      const int64_t at = row * channels + i;
      y[at] = normalise_one(x[at], Coefficients<Math>{c[i], c[channels + i], c[2 * channels + i]},
                            relu);
    }
  }
}
