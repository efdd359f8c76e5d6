// The four primitives on CPU, each one pass over memory: see fused.py, which builds and calls this file.
//
// Two loops serve all four: `sums` takes sum(a) and sum(a * b) per channel, `affine` writes
// x * scale + offset + dy * slope. A dense tensor is [outer][channels][inner] in memory: NCHW has planes of
// `inner` values, channels-last has inner = 1. Small planes, and channels-last, are taken as rows of columns.
// Sums are double, in which the product of two floats is exact. No result depends on timing.

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>
#include <system_error>
#include <thread>
#include <vector>

#include "vectors.h"

namespace {

constexpr long RUN = 1 << 13;    // values added in one go, so that rounding does not grow with the plane
constexpr long SHARE = 1 << 18;  // values that are worth a thread
constexpr long WIDTH = 256;      // columns at least that `affine` takes, to stay in the inner loop
constexpr long SMALL = 16;       // values in a plane below which it is not worth a loop

// sum(a) and sum(a * b); without PAIR, b is a.
template <bool PAIR> struct Sums {
  doubles sum{}, dot{};
  void add(doubles a, doubles b) {
    sum += a;
    dot += a * (PAIR ? b : a);
  }
  template <class T> void add(const T* a, const T* b) { add(load_double(a), load_double(b)); }
};

template <bool PAIR, class T> void sum_run(const T* a, const T* b, long num, double& sum, double& dot) {
  Sums<PAIR> s0, s1, s2, s3;  // additions that need not wait for each other
  long i = 0;
  for (; i + 4 * D <= num; i += 4 * D) {
    s0.add(a + i, b + i);
    s1.add(a + i + D, b + i + D);
    s2.add(a + i + 2 * D, b + i + 2 * D);
    s3.add(a + i + 3 * D, b + i + 3 * D);
  }
  for (; i + D <= num; i += D) s0.add(a + i, b + i);
  long last = num - D, rest = num - i;
  if (rest && last >= 0)
    s1.add(keep_last(load_double(a + last), rest), keep_last(load_double(b + last), rest));
  else if (rest)
    s1.add(Padded<T, D>(a, num).values, Padded<T, D>(b, num).values);
  sum += total(s0.sum + s1.sum + (s2.sum + s3.sum));
  dot += total(s0.dot + s1.dot + (s2.dot + s3.dot));
}

// The same for every column; the width is a multiple of D. How memory is best read was measured.
template <bool PAIR, class T> void sum_rows(const T* a, const T* b, long rows, long width, double* sum, double* dot) {
  const long num = PAIR && width > 64 ? 1 : 4;
  for (long r = 0; r < rows; r += num)
    for (long c = 0; c < width; c += D) {
      Sums<PAIR> s;
      for (long i = r * width + c, end = std::min(r + num, rows) * width; i < end; i += width) {
        if (!PAIR) __builtin_prefetch(a + i + 8 * width);
        s.add(a + i, b + i);
      }
      write(sum + c, read<D>(sum + c) + s.sum);
      write(dot + c, read<D>(dot + c) + s.dot);
    }
}

template <class T> struct Affine {
  vec<compute<T>, A<T>> scale, offset, slope;
  template <bool PAIR> void apply(const T* x, const T* dy, T* out) const {
    auto v = load<A<T>>(x) * scale + offset;
    if (PAIR) v += load<A<T>>(dy) * slope;
    store<A<T>>(out, v);
  }
};

// With the coefficients k, k + next, …: next is 1 in a row, 0 in a plane.
template <bool PAIR, class T>
void affine_run(const T* x, const T* dy, T* out, long num, const Affine<T>* k, long next) {
  constexpr long n = A<T>;
  long i = 0;
  for (; i + n <= num; i += n, k += next) k->template apply<PAIR>(x + i, dy + i, out + i);
  long last = num - n, rest = num - i;
  if (rest && last >= 0 && !next)
    k->template apply<PAIR>(x + last, dy + last, out + last);  // some of them again
  else if (rest) {
    Padded<T, n> rest_x(x + i, rest), rest_dy(dy + i, rest);
    k->template apply<PAIR>(rest_x.values, rest_dy.values, rest_x.values);
    std::copy(rest_x.values, rest_x.values + rest, out + i);
  }
}

struct Shape {
  long threads, outer, channels, inner, min_width;

  long total() const { return outer * channels * inner; }
  bool rows() const { return inner < SMALL; }
  // Columns, or planes of one sample. Samples share a row until it is a multiple of every step, and long enough.
  long width() const {
    if (!rows()) return channels;
    long sample = channels * inner, num = 16 / std::gcd(sample, 16L);
    while (num * sample < min_width) num *= 2;
    return std::min(num * sample, (total() + 15) / 16 * 16);
  }
  long parts() const { return std::clamp(total() / SHARE, 1L, threads); }

  template <class F> void in_parallel(F f) const {
    long unit = rows() ? width() : 64, num = (total() + unit - 1) / unit, parts = this->parts();
    auto begin = [&](long t) { return std::min(total(), num * t / parts * unit); };
    auto work = [&](long t) { f(t, begin(t), begin(t + 1)); };
    std::vector<std::thread> others;
    for (long t = 1; t < parts; ++t) try {
        others.emplace_back(work, t);
      } catch (const std::system_error&) {  // no more threads to be had
        work(t);
      }
    work(0);
    for (auto& other : others) other.join();
  }

  // f(column or plane, its channel)
  template <class F> void for_columns(F f) const {
    long repeats = rows() ? inner : 1;
    for (long j = 0, c = 0, left = repeats, num = width(); j < num; ++j) {
      f(j, c);
      if (--left) continue;
      left = repeats;
      if (++c == channels) c = 0;
    }
  }

  // f(start, number of values, channel)
  template <class F> void for_planes(long begin, long end, F f) const {
    long c = begin / inner % channels, left = inner - begin % inner;
    for (long i = begin, num; i < end; i += num) {
      num = std::min({left, end - i, RUN});
      f(i, num, c);
      if (left -= num) continue;
      left = inner;
      if (++c == channels) c = 0;
    }
  }
};

template <bool PAIR, class T> void sums(const Shape& s, const T* a, const T* b, double* out) {
  long width = s.width();
  std::vector<doubles> aligned((s.parts() * 2 * width + D - 1) / D);  // a step of them, never across two cache lines
  double* partial = reinterpret_cast<double*>(aligned.data());
  s.in_parallel([&](long t, long i, long end) {
    double *sum = partial + t * 2 * width, *dot = sum + width;
    if (!s.rows())
      return s.for_planes(i, end, [&](long i, long num, long c) { sum_run<PAIR>(a + i, b + i, num, sum[c], dot[c]); });
    long rows = (end - i) / width;
    sum_rows<PAIR>(a + i, b + i, rows, width, sum, dot);
    for (i += rows * width; i < end; i += D, sum += D, dot += D) {
      long num = std::min(end - i, D);
      sum_rows<PAIR>(Padded<T, D>(a + i, num).values, Padded<T, D>(b + i, num).values, 1, D, sum, dot);
    }
  });
  std::fill_n(out, 2 * s.channels, 0.0);
  for (long t = 0; t < s.parts(); ++t, partial += 2 * width)
    s.for_columns([&](long j, long c) {
      out[c] += partial[j];
      out[s.channels + c] += partial[width + j];
    });
}

using Channel = std::vector<double>;

// out = (x - mean) * scale + offset + dy * slope. The constant has the scale as it is rounded, so that the error of out
// stays below 2e-7 * mean / std in float.
template <bool PAIR, class T>
void affine(const Shape& s, const T* x, const T* dy, T* out, const Channel& mean, const Channel& scale,
            const Channel& offset, const Channel& slope) {
  using F = compute<T>;
  auto of = [&](long c) {
    return std::array{F(scale[c]), F(offset[c] - mean[c] * F(scale[c])), F(slope[c])};
  };
  long width = s.rows() ? s.width() : 0;
  std::vector<Affine<T>> columns(width / A<T>);
  if (width)
    s.for_columns([&](long j, long c) {
      auto& k = columns[j / A<T>];
      auto [scale, offset, slope] = of(c);
      j %= A<T>;
      k.scale[j] = scale, k.offset[j] = offset, k.slope[j] = slope;
    });
  s.in_parallel([&](long, long i, long end) {
    for (; width && i < end; i += width)
      affine_run<PAIR>(x + i, dy + i, out + i, std::min(width, end - i), columns.data(), 1);
    s.for_planes(i, end, [&](long i, long num, long c) {
      vec<F, A<T>> zero{};
      auto [scale, offset, slope] = of(c);
      Affine<T> k{zero + scale, zero + offset, zero + slope};
      affine_run<PAIR>(x + i, dy + i, out + i, num, &k, 0);
    });
  });
}

template <class F> void with_dtype(long dtype, F f) {  // numbered as in fused.py
  if (dtype == 0) f(float{});
  if (dtype == 1) f(double{});
  if (dtype == 2) f(Half{});
  if (dtype == 3) f(BFloat{});
}

// What fused.py packs: every number and pointer takes eight bytes.
struct Layout {
  long dtype, threads, outer, channels, inner;  // dtype is that of x, dy, y and dx
  Shape shape(long min_width) const { return {threads, outer, channels, inner, min_width}; }
};
struct Values {  // a per-channel tensor; p is null where there is none
  long dtype;
  void* p;
};

// A per-channel tensor as doubles (up to D more of them), `otherwise` if there is none.
Channel channel(const Values& v, long num, double otherwise = 0) {
  Channel out(num + D, otherwise);
  if (v.p) with_dtype(v.dtype, [&](auto t) {
      auto from = static_cast<const decltype(t)*>(v.p);
      for (long c = 0; c < num; c += D)
        write(&out[c], load_double(Padded<decltype(t), D>(from + c, std::min(num - c, D)).values));
    });
  return out;
}

}  // namespace

extern "C" {

struct LocalSums {
  Layout layout;
  const void* x;
  double* packed;
};

void local_sums(const LocalSums* a) {
  with_dtype(a->layout.dtype, [&](auto t) {
    auto x = static_cast<const decltype(t)*>(a->x);
    sums<false>(a->layout.shape(D), x, x, a->packed);
  });
  a->packed[2 * a->layout.channels] = double(a->layout.outer * a->layout.inner);
}

struct Normalize {
  Layout layout;
  Values mean, invstd, weight, bias;
  const void* x;
  void* y;
};

void normalize(const Normalize* a) {
  long channels = a->layout.channels;
  Channel centre = channel(a->mean, channels), scale = channel(a->invstd, channels);
  Channel factor = channel(a->weight, channels, 1), offset = channel(a->bias, channels);
  for (long c = 0; c < channels; ++c) scale[c] *= factor[c];
  with_dtype(a->layout.dtype, [&](auto t) {
    using T = decltype(t);
    auto x = static_cast<const T*>(a->x);
    affine<false>(a->layout.shape(WIDTH), x, x, static_cast<T*>(a->y), centre, scale, offset, scale);
  });
}

struct BackwardSums {
  Layout layout;
  Values mean, invstd;
  const void *dy, *x;
  double* sums;
};

void backward_sums(const BackwardSums* a) {
  long channels = a->layout.channels;
  Channel centre = channel(a->mean, channels), scale = channel(a->invstd, channels);
  double *sum_dy = a->sums, *sum_dy_xhat = sum_dy + channels;
  with_dtype(a->layout.dtype, [&](auto t) {
    using T = decltype(t);
    sums<true>(a->layout.shape(D), static_cast<const T*>(a->dy), static_cast<const T*>(a->x), sum_dy);
  });
  for (long c = 0; c < channels; ++c) sum_dy_xhat[c] = (sum_dy_xhat[c] - centre[c] * sum_dy[c]) * scale[c];
}

struct InputGradient {
  Layout layout;
  Values mean, invstd, weight;
  const void *dy, *x;
  const double *sums, *count;
  void* dx;
};

void input_gradient(const InputGradient* a) {
  long channels = a->layout.channels;
  Channel centre = channel(a->mean, channels), scale = channel(a->invstd, channels);
  Channel slope = channel(a->weight, channels, 1), offset = slope;
  double n = std::max(*a->count, 1.0);
  for (long c = 0; c < channels; ++c) {
    slope[c] *= scale[c];
    offset[c] = -slope[c] * a->sums[c] / n;
    scale[c] *= -slope[c] * a->sums[channels + c] / n;
  }
  with_dtype(a->layout.dtype, [&](auto t) {
    using T = decltype(t);
    affine<true>(a->layout.shape(WIDTH), static_cast<const T*>(a->x), static_cast<const T*>(a->dy),
                 static_cast<T*>(a->dx), centre, scale, offset, slope);
  });
}

struct Advance {
  long channels;
  const double* packed;
  double eps, momentum;
  Values mean, invstd, running_mean, running_var;  // of float or double
};

// moments.py's `advance`: mean and invstd of the whole batch; the running statistics, if any, move towards it.
void advance(const Advance* a) {
  long channels = a->channels;
  const double *sum = a->packed, *sqsum = sum + channels, n = sum[2 * channels];
  Channel mean(channels), sqdev(channels), invstd(channels);
  for (long c = 0; c < channels; ++c) {
    mean[c] = sum[c] / n;
    sqdev[c] = std::max(sqsum[c] - sum[c] * mean[c], 0.0);  // NaN stays
    invstd[c] = 1 / std::sqrt(sqdev[c] / n + a->eps);
  }
  auto put = [&](const Values& v, const Channel& from) {
    if (v.dtype == 0) std::copy_n(from.data(), channels, static_cast<float*>(v.p));
    if (v.dtype == 1) std::copy_n(from.data(), channels, static_cast<double*>(v.p));
  };
  auto move = [&](const Values& running, const Channel& batch) {
    if (!running.p) return;
    Channel now = channel(running, channels);
    for (long c = 0; c < channels; ++c) now[c] += a->momentum * (batch[c] - now[c]);
    put(running, now);
  };
  put(a->mean, mean);
  put(a->invstd, invstd);
  move(a->running_mean, mean);
  for (double& v : sqdev) v /= n - 1;
  move(a->running_var, sqdev);
}
}
