// The four phases on CPU, each one pass over memory: see cpu.py, which builds and calls this file.
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
void affine(const Shape& s, const T* x, const T* dy, T* out, const double* mean, const Channel& scale,
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

template <class F> void with_dtype(long dtype, F f) {  // numbered as in cpu.py
  if (dtype == 0) f(float{});
  if (dtype == 1) f(double{});
  if (dtype == 2) f(Half{});
  if (dtype == 3) f(BFloat{});
}

// A per-channel tensor as doubles (up to D more of them), `otherwise` if there is none.
Channel channel(long dtype, const void* p, long num, double otherwise = 0) {
  Channel out(num + D, otherwise);
  if (p) with_dtype(dtype, [&](auto t) {
      auto from = static_cast<const decltype(t)*>(p);
      for (long c = 0; c < num; c += D)
        write(&out[c], load_double(Padded<decltype(t), D>(from + c, std::min(num - c, D)).values));
    });
  return out;
}

// Write doubles as a per-channel tensor, if there is one.
void put(const double* from, long num, long dtype, void* p) {
  if (p) with_dtype(dtype, [&](auto t) {
      using T = decltype(t);
      auto to = static_cast<T*>(p);
      for (long c = 0; c < num; c += A<T>) {
        vec<compute<T>, A<T>> v{};
        T stored[A<T>];
        long rest = std::min(num - c, A<T>);
        for (long j = 0; j < rest; ++j) v[j] = from[c + j];
        store<A<T>>(stored, v);
        std::copy(stored, stored + rest, to + c);
      }
    });
}

// As in cpu.py. dtype is that of x, y, dy and dx; -1 where there is no such per-channel tensor.
struct Layout {
  long dtype, outer, channels, inner, weight, bias, running;
  Shape shape(long threads, long min_width) const { return {threads, outer, channels, inner, min_width}; }
};

}  // namespace

// Each returns 1, and has done nothing, if a tensor is not in memory.
extern "C" {

int forward_reduce(const Layout* a, long threads, const void* x, double* packed) {
  if (!x) return 1;
  with_dtype(a->dtype, [&](auto t) {
    auto values = static_cast<const decltype(t)*>(x);
    sums<false>(a->shape(threads, D), values, values, packed);
  });
  packed[2 * a->channels] = double(a->outer * a->inner);
  return 0;
}

// statistics: mean, invstd and count of the whole batch.
int forward_apply(const Layout* a, long threads, double momentum, double eps, long tracks, const void* x,
                  const double* summed, const void* weight, const void* bias, void* running_mean, void* running_var,
                  double* statistics, void* y) {
  if (!x || (a->weight >= 0 && !weight) || (a->bias >= 0 && !bias) || (tracks && !(running_mean && running_var)))
    return 1;
  long channels = a->channels;
  const double *sum = summed, *sqsum = sum + channels, n = sum[2 * channels];
  double *mean = statistics, *invstd = mean + channels;
  Channel unbiased(channels), scale = channel(a->weight, weight, channels, 1);
  for (long c = 0; c < channels; ++c) {
    mean[c] = sum[c] / n;
    double sqdev = std::max(sqsum[c] - sum[c] * mean[c], 0.0);  // NaN stays
    invstd[c] = 1 / std::sqrt(sqdev / n + eps);
    scale[c] *= invstd[c];
    unbiased[c] = sqdev / (n - 1);
  }
  statistics[2 * channels] = n;
  auto move = [&](void* running, const double* batch) {
    Channel now = channel(a->running, running, channels);
    for (long c = 0; c < channels; ++c) now[c] += momentum * (batch[c] - now[c]);
    put(now.data(), channels, a->running, running);
  };
  move(running_mean, mean);
  move(running_var, unbiased.data());
  Channel offset = channel(a->bias, bias, channels);
  with_dtype(a->dtype, [&](auto t) {
    using T = decltype(t);
    auto values = static_cast<const T*>(x);
    affine<false>(a->shape(threads, WIDTH), values, values, static_cast<T*>(y), mean, scale, offset, scale);
  });
  return 0;
}

int backward_reduce(const Layout* a, long threads, const void* dy, const void* x, const double* statistics,
                    double* packed, void* grad_weight, void* grad_bias) {
  if (!x || !dy) return 1;
  long channels = a->channels;
  const double *mean = statistics, *invstd = mean + channels;
  double *sum_dy = packed, *sum_dy_xhat = sum_dy + channels;
  with_dtype(a->dtype, [&](auto t) {
    using T = decltype(t);
    sums<true>(a->shape(threads, D), static_cast<const T*>(dy), static_cast<const T*>(x), sum_dy);
  });
  for (long c = 0; c < channels; ++c) sum_dy_xhat[c] = (sum_dy_xhat[c] - mean[c] * sum_dy[c]) * invstd[c];
  put(sum_dy_xhat, channels, a->weight, grad_weight);
  put(sum_dy, channels, a->bias, grad_bias);
  return 0;
}

int backward_apply(const Layout* a, long threads, const void* dy, const void* x, const double* statistics,
                   const void* weight, const double* summed, void* dx) {
  if (!x || !dy || (a->weight >= 0 && !weight)) return 1;
  long channels = a->channels;
  const double *mean = statistics, *invstd = mean + channels, n = mean[2 * channels];
  Channel slope = channel(a->weight, weight, channels, 1), offset = slope, scale = slope;
  for (long c = 0; c < channels; ++c) {
    slope[c] *= invstd[c];
    offset[c] = -slope[c] * summed[c] / n;
    scale[c] = -slope[c] * invstd[c] * summed[channels + c] / n;
  }
  with_dtype(a->dtype, [&](auto t) {
    using T = decltype(t);
    affine<true>(a->shape(threads, WIDTH), static_cast<const T*>(x), static_cast<const T*>(dy), static_cast<T*>(dx),
                 mean, scale, offset, slope);
  });
  return 0;
}
}
