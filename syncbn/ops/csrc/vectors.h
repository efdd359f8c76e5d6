// Vectors of n values, by the vector types of GCC and Clang: loaded and stored as any dtype, computed as float or double.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#ifdef __F16C__
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr long REGISTER = 64;  // bytes
#elif defined(__AVX__)
constexpr long REGISTER = 32;
#else
constexpr long REGISTER = 16;
#endif

struct Half { uint16_t bits; };
struct BFloat { uint16_t bits; };

template <class T, long n> struct Vector { typedef T type __attribute__((vector_size(n * sizeof(T)))); };
template <class T, long n> using vec = typename Vector<T, n>::type;
template <long n> using floats = vec<float, n>;
template <long n> using words = vec<uint32_t, n>;

template <class T> using compute = std::conditional_t<std::is_same_v<T, double>, double, float>;
template <class T> constexpr long A = REGISTER / sizeof(compute<T>);  // values in a step of `affine`
constexpr long D = REGISTER / sizeof(double);                         // values in a step of `sums`
using doubles = vec<double, D>;

template <long n, class T> vec<T, n> read(const T* p) {
  vec<T, n> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class T, class V> void write(T* p, V v) { std::memcpy(p, &v, sizeof v); }

// As a list: GCC makes one instruction of it, and several of __builtin_convertvector.
template <class To, class V, long... j> auto convert(V v, std::integer_sequence<long, j...>) {
  return vec<To, sizeof...(j)>{To(v[j])...};
}

template <long n> words<n> read_words(const void* p) {
  auto v = read<n>(static_cast<const uint16_t*>(p));
  return convert<uint32_t>(v, std::make_integer_sequence<long, n>{});
}

template <long n> void write_words(void* p, words<n> v) { write(p, __builtin_convertvector(v, vec<uint16_t, n>)); }

template <long n> floats<n> load(const float* p) { return read<n>(p); }
template <long n> vec<double, n> load(const double* p) { return read<n>(p); }
template <long n> floats<n> load(const BFloat* p) { return (floats<n>)(read_words<n>(p) << 16); }
template <long n> void store(float* p, floats<n> v) { write(p, v); }
template <long n> void store(double* p, vec<double, n> v) { write(p, v); }
template <long n> void store(BFloat* p, floats<n> v) {
  words<n> u = (words<n>)v, rounded = (u + 0x7fff + (u >> 16 & 1)) >> 16;  // to nearest, ties to even
  write_words<n>(p, v == v ? rounded : words<n>{} + 0x7fc0);
}
#ifdef __F16C__
template <long n> floats<n> load(const Half* p) {
  if constexpr (n == 16) return (floats<n>)_mm512_cvtph_ps((__m256i)read<32>((const char*)p));
  if constexpr (n == 8) return (floats<n>)_mm256_cvtph_ps((__m128i)read<16>((const char*)p));
  if constexpr (n == 4) return (floats<n>)_mm_cvtph_ps(_mm_loadl_epi64((const __m128i*)p));
}
template <long n> void store(Half* p, floats<n> v) {  // 0: to nearest, ties to even
  if constexpr (n == 16) write(p, _mm512_cvtps_ph((__m512)v, 0));
  if constexpr (n == 8) write(p, _mm256_cvtps_ph((__m256)v, 0));
}
#else
template <long n> floats<n> load(const Half* p) {
  words<n> h = read_words<n>(p), magnitude = (h & 0x7fff) << 13;
  words<n> special = (words<n>)(magnitude >= 0x7c00u << 13) & 0x7f800000u;  // infinity, NaN
  floats<n> value = (floats<n>)magnitude * 0x1p112f;                        // the other bias of the exponent
  return (floats<n>)((words<n>)value | special | (h & 0x8000) << 16);
}

template <long n> void store(Half* p, floats<n> v) {
  words<n> sign = (words<n>)v & 0x80000000u, u = (words<n>)v ^ sign;
  words<n> normal = (u - (112u << 23) + 0xfff + (u >> 13 & 1)) >> 13;   // to nearest, ties to even
  words<n> subnormal = (words<n>)((floats<n>)u + 0.5f) - (126u << 23);  // the addition rounds
  words<n> h = u < (113u << 23) ? subnormal : normal;
  h = u >= (143u << 23) ? words<n>{} + 0x7c00 : h;
  h = u > (255u << 23) ? words<n>{} + 0x7e00 : h;
  write_words<n>(p, h | sign >> 16);
}
#endif

template <class T> doubles load_double(const T* p) {
  return convert<double>(load<D>(p), std::make_integer_sequence<long, D>{});
}

// A run of fewer than n values, and zeros behind it.
template <class T, long n> struct Padded {
  T values[n] = {};
  Padded(const T* p, long num) { std::copy(p, p + num, values); }
};

doubles keep_last(doubles v, long num) {
  static constexpr int64_t masks[16] = {0, 0, 0, 0, 0, 0, 0, 0, -1, -1, -1, -1, -1, -1, -1, -1};
  return (doubles)((vec<int64_t, D>)v & read<D>(masks + 8 - D + num));
}

double total(doubles v) {
  double w[D];
  write(w, v);
  for (long half = D / 2; half; half /= 2)
    for (long j = 0; j < half; ++j) w[j] += w[j + half];
  return w[0];
}

}  // namespace
