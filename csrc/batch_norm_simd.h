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

// kRegisters neighbouring registers of values. Two of bfloat16 hold the even and the odd ones of a
// 64-byte vector, which is twice as fast to widen and to narrow as to do it in order.
template <typename T, int kRegisters>
struct Block {
  using V = Vec<statistics_t<T>>;
  using Register = typename V::Register;
  static constexpr int kCount = kRegisters;
  static constexpr int64_t kValues = int64_t{kRegisters} * V::kCount;

  SWA_FAST_TARGET static inline void load(const T* p, Register* r) {
    if constexpr (kRegisters == 2) {
      V::load_pair(p, r[0], r[1]);
    } else {
      r[0] = V::load(p);
    }
  }
  // kStream: past the caches, to an address that is a multiple of 64 bytes.
  template <bool kStream>
  SWA_FAST_TARGET static inline void write(T* p, const Register* r) {
    if constexpr (kRegisters == 2) {
      V::template store_pair<kStream>(p, r[0], r[1]);
    } else if constexpr (kStream) {
      V::stream(p, r[0]);
    } else {
      V::store(p, r[0]);
    }
  }
};

template <typename T>
using WideBlock = Block<T, Vec<statistics_t<T>>::template kPair<T> ? 2 : 1>;

// Values of a wide block if their order in registers is that of place() below, else 1.
template <typename T>
int64_t interleaved() {
  return WideBlock<T>::kCount == 2 ? WideBlock<T>::kValues : 1;
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
      Register value[4];
      for (int u = 0; u < 4; u += WideBlock<T>::kCount) {
        WideBlock<T>::load(x + (i + u) * V::kCount, value + u);
      }
      for (int u = 0; u < 4; ++u) {
        const Register d = V::sub(value[u], pivot);
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

template <typename T>
bool can_stream(const T* y) {
  return reinterpret_cast<uintptr_t>(y) % 64 == 0;
}

template <typename B, bool kStream, typename T>
SWA_FAST_TARGET inline void normalise_block(const T* x, T* y, const typename B::Register* centre,
                                            const typename B::Register* scale,
                                            const typename B::Register* offset, bool relu) {
  using V = typename B::V;
  typename B::Register value[B::kCount];
  B::load(x, value);
  for (int r = 0; r < B::kCount; ++r) {
    value[r] = V::fma(V::sub(value[r], centre[r]), scale[r], offset[r]);
    if (relu) value[r] = V::relu(value[r]);
  }
  B::template write<kStream>(y, value);
}

template <typename B, bool kStream, typename T>
SWA_FAST_TARGET inline void normalise_blocks(const T* x, T* y, int64_t count,
                                             const Coefficients<statistics_t<T>>& c, bool relu) {
  using V = typename B::V;
  typename B::Register centre[B::kCount], scale[B::kCount], offset[B::kCount];
  for (int r = 0; r < B::kCount; ++r) {
    centre[r] = V::broadcast(c.centre);
    scale[r] = V::broadcast(c.scale);
    offset[r] = V::broadcast(c.offset);
  }
  for (int64_t i = 0; i + B::kValues <= count; i += B::kValues) {
    normalise_block<B, kStream>(x + i, y + i, centre, scale, offset, relu);
  }
}

template <typename T>
SWA_FAST_TARGET void normalise_run(const T* x, T* y, int64_t count,
                                   const Coefficients<statistics_t<T>>& c, bool relu, bool stream) {
  using Wide = WideBlock<T>;
  using Narrow = Block<T, 1>;
  if (stream && can_stream(y)) {
    relu ? normalise_blocks<Wide, true>(x, y, count, c, true)
         : normalise_blocks<Wide, true>(x, y, count, c, false);
  } else {
    relu ? normalise_blocks<Wide, false>(x, y, count, c, true)
         : normalise_blocks<Wide, false>(x, y, count, c, false);
  }
  int64_t i = count - count % Wide::kValues;
  if constexpr (Wide::kCount > 1) {
    normalise_blocks<Narrow, false>(x + i, y + i, count - i, c, relu);
    i = count - count % Narrow::kValues;
  }
  for (; i < count; ++i) y[i] = normalise_one(x[i], c, relu);
}

// What a group's rows so far come to, of kPiece columns at most: what sum_panel has in registers.
template <typename Math>
struct Group {
  static constexpr int64_t kPiece = 1024;
  alignas(64) Math pivot[kPiece], s1[kPiece], s2[kPiece];
};

// Adds the rows from `from` to `to` of a group of `rows` to the sums of kBlocks neighbouring blocks
// of columns, which are in `group` from its column `column` on until the last row is there.
template <typename B, int kBlocks, typename T>
SWA_FAST_TARGET inline void sum_panel(const T* x, int64_t from, int64_t to, int64_t rows,
                                      int64_t stride, int64_t ahead, Group<statistics_t<T>>& group,
                                      int64_t column, const double* pivots, double* first,
                                      double* second) {
  using V = typename B::V;
  using D = Vec<double>;
  using Register = typename B::Register;
  constexpr int kRegisters = kBlocks * B::kCount;
  Register pivot[kRegisters], s1[kRegisters], s2[kRegisters], value[kRegisters];
  const auto load = [&](int64_t row, Register* to) SWA_FAST_TARGET {
    for (int i = 0; i < kBlocks; ++i)
      B::load(x + row * stride + i * B::kValues, to + i * B::kCount);
  };
  if (from == 0) {
    // An eighth of the group, or a little more: see batch_norm.h.
    int64_t first_rows = 1;
    while (first_rows * (kGroup / kPivot) < rows) first_rows *= 2;
    load(0, pivot);
    for (int64_t row = 1; row < first_rows; ++row) {
      load(row, value);
      SWA_FAST_UNROLL
      for (int i = 0; i < kRegisters; ++i) pivot[i] = V::add(pivot[i], value[i]);
    }
    const Register share =
        V::broadcast(typename V::Scalar(1) / static_cast<typename V::Scalar>(first_rows));
    SWA_FAST_UNROLL
    for (int i = 0; i < kRegisters; ++i) {
      pivot[i] = V::mul(pivot[i], share);
      s1[i] = s2[i] = V::broadcast(0);
    }
  } else {
    SWA_FAST_UNROLL
    for (int i = 0; i < kRegisters; ++i) {
      const int64_t j = column + i * V::kCount;
      pivot[i] = V::load(group.pivot + j);
      s1[i] = V::load(group.s1 + j);
      s2[i] = V::load(group.s2 + j);
    }
  }
  for (int64_t row = from; row < to; ++row) {
    load(row, value);
    for (int i = 0; i < kBlocks; ++i) prefetch(x + row * stride + i * B::kValues, ahead);
    SWA_FAST_UNROLL
    for (int i = 0; i < kRegisters; ++i) {
      const Register d = V::sub(value[i], pivot[i]);
      s1[i] = V::add(s1[i], d);
      s2[i] = V::fma(d, d, s2[i]);
    }
  }
  if (to < rows) {
    SWA_FAST_UNROLL
    for (int i = 0; i < kRegisters; ++i) {
      const int64_t j = column + i * V::kCount;
      V::store(group.pivot + j, pivot[i]);
      V::store(group.s1 + j, s1[i]);
      V::store(group.s2 + j, s2[i]);
    }
    return;
  }
  const auto k = D::broadcast(static_cast<double>(rows));
  SWA_FAST_UNROLL
  for (int i = 0; i < kRegisters; ++i) {
    SWA_FAST_UNROLL
    for (int part = 0; part < V::kParts; ++part) {
      const int64_t j = i * V::kCount + D::kCount * part;
      auto f = D::load(first + j), s = D::load(second + j);
      add_groups(D::sub(V::part(pivot[i], part), D::load(pivots + j)), k, V::part(s1[i], part),
                 V::part(s2[i], part), f, s);
      D::store(first + j, f);
      D::store(second + j, s);
    }
  }
}

template <typename Wide, typename T>
SWA_FAST_TARGET inline void sum_column_blocks(const T* x, int64_t rows, int64_t columns,
                                              int64_t stride, int64_t ahead, const double* pivots,
                                              double* first, double* second) {
  using Narrow = Block<T, 1>;
  constexpr int kBlocks = std::max(1, Wide::V::kPanel / Wide::kCount);
  Group<statistics_t<T>> state;
  // A few rows are read from end to end before the next ones: panels of a whole group, a short
  // piece out of every row, would leave memory idle, whose prefetchers follow what is in order. The
  // pivot is of these rows, too. Where rows are parts of longer ones there is no such order.
  const bool whole_groups = columns <= kBlocks * Wide::kValues || columns < stride;
  const int64_t step = whole_groups ? kGroup : kPivot;
  for (int64_t group = 0; group < rows; group += kGroup) {
    const int64_t now = std::min<int64_t>(kGroup, rows - group);
    for (int64_t begin = 0; begin < columns; begin += state.kPiece) {
      const int64_t end = std::min(columns, begin + state.kPiece);
      for (int64_t row = 0; row < now; row += step) {
        int64_t i = begin;
        const auto all = [&](auto block, auto count) SWA_FAST_TARGET {
          using B = decltype(block);
          for (; i + count * B::kValues <= end; i += count * B::kValues) {
            sum_panel<B, count>(x + group * stride + i, row, std::min(now, row + step), now, stride,
                                ahead, state, i - begin, pivots + i, first + i, second + i);
          }
        };
        all(Wide{}, std::integral_constant<int, kBlocks>{});
        all(Wide{}, std::integral_constant<int, 1>{});
        if constexpr (Wide::kCount > 1) all(Narrow{}, std::integral_constant<int, 1>{});
      }
    }
  }
}

// The sums of every column of `rows` rows, `stride` elements apart: first sums of all columns, then
// second ones, which are overwritten. Pivots and sums are in the order of place() if `paired`.
// `ahead`: bytes of the input that are fetched before their turn.
template <typename T>
SWA_FAST_TARGET void sum_columns(const T* x, int64_t rows, int64_t columns, int64_t stride,
                                 int64_t ahead, bool paired, const double* pivots, double* sums) {
  using Math = statistics_t<T>;
  double* const first = sums;
  double* const second = sums + columns;
  std::fill(first, second + columns, 0.0);
  if (paired) {
    sum_column_blocks<WideBlock<T>>(x, rows, columns, stride, ahead, pivots, first, second);
  } else {
    sum_column_blocks<Block<T, 1>>(x, rows, columns, stride, ahead, pivots, first, second);
  }
  const int64_t full = columns - columns % Vec<Math>::kCount;
  for (int64_t row = 0; full < columns && row < rows; ++row) {
    for (int64_t i = full; i < columns; ++i) {
      const double d = static_cast<double>(static_cast<Math>(x[row * stride + i])) - pivots[i];
      first[i] += d;
      second[i] += d * d;
    }
  }
}

SWA_FAST_TARGET inline double sum_of(const double* x, int64_t count) {
  using D = Vec<double>;
  auto a = D::broadcast(0.0), b = a;
  int64_t i = 0;
  for (; i + 2 * D::kCount <= count; i += 2 * D::kCount) {
    a = D::add(a, D::load(x + i));
    b = D::add(b, D::load(x + i + D::kCount));
  }
  double lanes[D::kCount];
  D::store(lanes, D::add(a, b));
  double sum = 0.0;
  for (int k = 0; k < D::kCount; ++k) sum += lanes[k];
  for (; i < count; ++i) sum += x[i];
  return sum;
}

// What the hardware does not fetch early enough: of an output that goes past the caches the input,
// else the output's own lines, which are read before they are written.
template <bool kStream, typename T>
SWA_FAST_TARGET inline void fetch_next(const T* x, const T* y, int64_t ahead) {
  if (ahead != 0) prefetch(kStream ? x : y, ahead);
}

// Columns from `begin` to `end` of kRows rows, which share the loads of a column's coefficients, as
// far as there are kBlocks whole blocks. Returns where they end.
template <typename B, int64_t kRows, int kBlocks, bool kStream, typename T>
SWA_FAST_TARGET inline int64_t normalise_piece(const T* x, T* y, int64_t columns, int64_t stride,
                                               int64_t ahead, const statistics_t<T>* c,
                                               int64_t begin, int64_t end, bool relu) {
  using V = typename B::V;
  constexpr int kRegisters = kBlocks * B::kCount;
  int64_t i = begin;
  for (; i + kBlocks * B::kValues <= end; i += kBlocks * B::kValues) {
    typename B::Register centre[kRegisters], scale[kRegisters], offset[kRegisters];
    for (int r = 0; r < kRegisters; ++r) {
      centre[r] = V::load(c + i + r * V::kCount);
      scale[r] = V::load(c + columns + i + r * V::kCount);
      offset[r] = V::load(c + 2 * columns + i + r * V::kCount);
    }
    for (int64_t u = 0; u < kRows; ++u) {
      const int64_t at = u * stride + i;
      fetch_next<kStream>(x + at, y + at, ahead);
      for (int b = 0; b < kBlocks; ++b) {
        normalise_block<B, kStream>(x + at + b * B::kValues, y + at + b * B::kValues,
                                    centre + b * B::kCount, scale + b * B::kCount,
                                    offset + b * B::kCount, relu);
      }
    }
  }
  return i;
}

// kBlocks neighbouring blocks of columns in every row.
template <typename B, int kBlocks, bool kStream, typename T>
SWA_FAST_TARGET inline void normalise_panel(const T* x, T* y, int64_t rows, int64_t columns,
                                            int64_t stride, int64_t ahead, const statistics_t<T>* c,
                                            bool relu) {
  using V = typename B::V;
  constexpr int kRegisters = kBlocks * B::kCount;
  typename B::Register centre[kRegisters], scale[kRegisters], offset[kRegisters];
  for (int r = 0; r < kRegisters; ++r) {
    centre[r] = V::load(c + r * V::kCount);
    scale[r] = V::load(c + columns + r * V::kCount);
    offset[r] = V::load(c + 2 * columns + r * V::kCount);
  }
  for (int64_t row = 0; row < rows; ++row) {
    for (int i = 0; i < kBlocks; ++i) {
      const int64_t at = row * stride + i * B::kValues;
      fetch_next<kStream>(x + at, y + at, ahead);
      normalise_block<B, kStream>(x + at, y + at, centre + i * B::kCount, scale + i * B::kCount,
                                  offset + i * B::kCount, relu);
    }
  }
}

template <typename Wide, bool kStream, typename T>
SWA_FAST_TARGET inline void normalise_column_blocks(const T* x, T* y, int64_t rows, int64_t columns,
                                                    int64_t stride, int64_t ahead,
                                                    const statistics_t<T>* c, bool relu) {
  using Narrow = Block<T, 1>;
  constexpr int kBlocks = std::max(1, Vec<statistics_t<T>>::kPanel / Wide::kCount);
  if (columns == kBlocks * Wide::kValues) {
    return normalise_panel<Wide, kBlocks, kStream>(x, y, rows, columns, stride, ahead, c, relu);
  }
  // Memory is read and written nearly in its order, which is fastest, in pieces of as many columns
  // as have their coefficients in half of the first-level cache, and a line at a time.
  const int64_t piece = coefficients_cached<statistics_t<T>>();
  constexpr int64_t kLine = 64 / (Wide::kValues * sizeof(T));
  constexpr int kLineBlocks = std::clamp<int64_t>(kLine, 1, 4);
  // Two rows at a time save loads of coefficients, which shows where there are many of them for a
  // line of input, or the input is in a cache; from memory, and into it, order counts for more.
  constexpr int64_t kRows = kStream ? 1 : 2;
  const bool by_rows = Wide::kCount > 1 || columns < stride;
  for (int64_t begin = 0; begin < columns; begin += piece) {
    const int64_t end = std::min(columns, begin + piece);
    const auto some = [&](int64_t row, auto count) SWA_FAST_TARGET {
      int64_t i = begin;
      const auto all = [&](auto block, auto blocks) SWA_FAST_TARGET {
        i = normalise_piece<decltype(block), count, blocks, kStream>(
            x + row * stride, y + row * stride, columns, stride, ahead, c, i, end, relu);
      };
      all(Wide{}, std::integral_constant<int, kLineBlocks>{});
      if constexpr (kLineBlocks > 1) all(Wide{}, std::integral_constant<int, 1>{});
      if constexpr (Wide::kCount > 1) all(Narrow{}, std::integral_constant<int, 1>{});
    };
    int64_t row = 0;
    for (; by_rows && row + kRows <= rows; row += kRows)
      some(row, std::integral_constant<int64_t, kRows>{});
    for (; row < rows; ++row) some(row, std::integral_constant<int64_t, 1>{});
  }
}

template <typename Wide, typename T>
SWA_FAST_TARGET inline void normalise_columns_by(const T* x, T* y, int64_t rows, int64_t columns,
                                                 int64_t stride, int64_t ahead,
                                                 const statistics_t<T>* c, bool relu, bool stream) {
  if (stream && can_stream(y) && can_stream(y + stride)) {
    relu ? normalise_column_blocks<Wide, true>(x, y, rows, columns, stride, ahead, c, true)
         : normalise_column_blocks<Wide, true>(x, y, rows, columns, stride, ahead, c, false);
  } else {
    relu ? normalise_column_blocks<Wide, false>(x, y, rows, columns, stride, ahead, c, true)
         : normalise_column_blocks<Wide, false>(x, y, rows, columns, stride, ahead, c, false);
  }
}

// `c` holds the centres of all columns, then the scales, then the offsets, in the order of place()
// if `paired`. `ahead`: bytes that are fetched before their turn, or 0.
template <typename T>
SWA_FAST_TARGET void normalise_columns(const T* x, T* y, int64_t rows, int64_t columns,
                                       int64_t stride, int64_t ahead, bool paired,
                                       const statistics_t<T>* c, bool relu, bool stream) {
  using Math = statistics_t<T>;
  if (paired) {
    normalise_columns_by<WideBlock<T>>(x, y, rows, columns, stride, ahead, c, relu, stream);
  } else {
    normalise_columns_by<Block<T, 1>>(x, y, rows, columns, stride, ahead, c, relu, stream);
  }
  const int64_t full = columns - columns % Vec<Math>::kCount;
  for (int64_t row = 0; full < columns && row < rows; ++row) {
    for (int64_t i = full; i < columns; ++i) {
      const int64_t at = row * stride + i;
      y[at] =
          normalise_one(x[at], Coefficients<Math>{c[i], c[columns + i], c[2 * columns + i]}, relu);
    }
  }
}
