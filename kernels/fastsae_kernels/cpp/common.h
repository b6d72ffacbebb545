// What the C++ forms of the ops share. They run on a CPU and compute what the torch forms do, in one pass each; _cpp.py compiles
// and calls them, and the modules of the ops say what each argument is.
//
// A sum is one thread's work, or is added up from parts whose sizes follow from the shapes: the bits do not depend on the number of
// threads. NaN is never compared away: tests are written so that it passes them, and no flag of the compiler may assume that there is
// none.

#pragma once

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <new>
#include <type_traits>
#include <utility>
#include <vector>

using std::int32_t;
using std::int64_t;
using std::uint16_t;
using std::uint32_t;
using std::uint64_t;

struct bf16 {
  uint16_t bits;
};

template <class To, class From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

inline float wide(float x) { return x; }
inline float wide(bf16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }

template <class T>
inline T rounded(float x) {
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else {  // to nearest, ties to even
    const uint32_t bits = bit_cast<uint32_t>(x), size = bits & 0x7FFFFFFF;
    const uint32_t nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    return {uint16_t(size > 0x7F800000 ? 0x7FC0 : nearest)};
  }
}

// What the functions that Python calls return, as in _cpp.py: DONE, NO_MEMORY, or an index that is out of range.
constexpr int64_t DONE = INT64_MIN, NO_MEMORY = INT64_MIN + 1;

template <class Run>
inline int64_t guarded(Run run) {
  try {
    run();
    return DONE;
  } catch (const std::bad_alloc&) {
    return NO_MEMORY;
  }
}

// Room for n numbers of every thread, made before they start: what is thrown among them would end the process.
template <class T>
class Room {
 public:
  explicit Room(int64_t n) : n_((n + 63) / 64 * 64), all_(new T[omp_get_max_threads() * n_]) {}
  T* own() const { return all_.get() + omp_get_thread_num() * n_; }

 private:
  int64_t n_;
  std::unique_ptr<T[]> all_;
};

// run(T{}) for the dtype that the caller has.
template <class Run>
inline void with_dtype(int64_t half, Run run) {
  half ? run(bf16{}) : run(float{});
}

// Where the entries of an input lie: in `width` slots of its own row, then on its tail rows.
struct Slots {
  const int32_t *counts, *tail_starts;
  int64_t batch, n_rows, width;

  int64_t stored(int64_t row) const {
    int64_t capacity = width;
    if (tail_starts) capacity += std::max<int64_t>(n_rows - batch - tail_starts[row], 0) * width;
    return std::min<int64_t>(counts[row], capacity);
  }
  int64_t at(int64_t row, int64_t entry) const {
    return entry < width ? row * width + entry : (batch + tail_starts[row] - 1) * width + entry;
  }
};

template <class A, class B>
inline float dot(const A* a, const B* b, int64_t d) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < d; ++i) sum += wide(a[i]) * wide(b[i]);
  return sum;
}

// out[i] += sum over e < n of scale(e) * row(e)[i], four rows at a time.
template <class Row, class Scale>
inline void add_rows(float* out, int64_t d, int64_t n, Row row, Scale scale) {
  int64_t e = 0;
  for (; e + 4 <= n; e += 4) {
    const auto *r0 = row(e), *r1 = row(e + 1), *r2 = row(e + 2), *r3 = row(e + 3);
    const float s0 = scale(e), s1 = scale(e + 1), s2 = scale(e + 2), s3 = scale(e + 3);
#pragma omp simd
    for (int64_t i = 0; i < d; ++i)
      out[i] += (s0 * wide(r0[i]) + s1 * wide(r1[i])) + (s2 * wide(r2[i]) + s3 * wide(r3[i]));
  }
  for (; e < n; ++e) {
    const auto* r = row(e);
    const float s = scale(e);
#pragma omp simd
    for (int64_t i = 0; i < d; ++i) out[i] += s * wide(r[i]);
  }
}

// put(e, row(e) · g) for e < n, four rows at a time.
template <class Row, class Put>
inline void each_dot(const float* g, int64_t d, int64_t n, Row row, Put put) {
  int64_t e = 0;
  for (; e + 4 <= n; e += 4) {
    const auto *r0 = row(e), *r1 = row(e + 1), *r2 = row(e + 2), *r3 = row(e + 3);
    float s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
    for (int64_t i = 0; i < d; ++i) {
      s0 += g[i] * wide(r0[i]);
      s1 += g[i] * wide(r1[i]);
      s2 += g[i] * wide(r2[i]);
      s3 += g[i] * wide(r3[i]);
    }
    put(e, s0), put(e + 1, s1), put(e + 2, s2), put(e + 3, s3);
  }
  for (; e < n; ++e) put(e, dot(g, row(e), d));
}
