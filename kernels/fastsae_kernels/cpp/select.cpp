// Selections: group maxima, TopK, and what lies above a threshold.

#include "common.h"

namespace {

constexpr int64_t GROUP = 32;  // as in encode.py
constexpr int32_t LOWEST = INT32_MIN, INFINITY_KEY = 0x7F800000, NAN_KEY = 0x7FC00000;

// Floats as integers in the same order: NaN the largest, -0 as 0, and unless SIGNED 0 for all that is not positive.
template <bool SIGNED>
inline int32_t key_of(float x) {
  const int32_t bits = bit_cast<int32_t>(x), size = bits & 0x7FFFFFFF;
  const int32_t key = SIGNED ? (bits < 0 ? -size : bits) : std::max(bits, 0);
  return size > INFINITY_KEY ? NAN_KEY : key;
}

inline float value_of(int32_t key) { return bit_cast<float>(key < 0 ? -key | LOWEST : key); }

inline int64_t groups(int64_t n) { return (n + GROUP - 1) / GROUP; }

// The largest key of group g of a row with n latents.
template <bool SIGNED, class T>
inline int32_t top_key(const T* pre, int64_t g, int64_t n) {
  const T* first = pre + g * GROUP;
  int32_t top = LOWEST;
  if ((g + 1) * GROUP <= n) {
#pragma omp simd reduction(max : top)
    for (int64_t i = 0; i < GROUP; ++i) top = std::max(top, key_of<SIGNED>(wide(first[i])));
  } else {
    for (int64_t i = 0; i < n - g * GROUP; ++i) top = std::max(top, key_of<SIGNED>(wide(first[i])));
  }
  return top;
}

template <class T>
void group_max(const T* pre_acts, int64_t batch, int64_t n, T* out) {
#pragma omp parallel for schedule(dynamic, 16)
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t g = 0; g < groups(n); ++g)
      out[b * groups(n) + g] = rounded<T>(value_of(top_key<true>(pre_acts + b * n, g, n)));
}

// Bit i says whether latent i of group g passes.
template <class Passes>
inline uint32_t passing(int64_t g, int64_t n, Passes passes) {
  uint32_t mask = 0;
  if ((g + 1) * GROUP <= n) {
#pragma omp simd reduction(| : mask)
    for (int64_t i = 0; i < GROUP; ++i) mask |= uint32_t(passes(g * GROUP + i)) << i;
  } else {
    for (int64_t j = g * GROUP; j < n; ++j) mask |= uint32_t(passes(j)) << (j - g * GROUP);
  }
  return mask;
}

inline int64_t count_from(const int32_t* keys, int64_t n, int32_t bound) {
  int32_t count = 0;
#pragma omp simd reduction(+ : count)
  for (int64_t i = 0; i < n; ++i) count += keys[i] >= bound;
  return count;
}

// What the k largest of n keys reach, by bisection; the lowest that there is where n is smaller. k keys reach the bound, or more
// because some equal it: then n_ties of these are wanted.
struct Cut {
  int32_t bound;
  int64_t n_ties;
};

// Of a T's keys: those of bf16 are multiples of UNIT.
template <bool SIGNED, class T>
inline Cut cut(const int32_t* keys, int64_t n, int64_t k) {
  constexpr int64_t UNIT = std::is_same_v<T, bf16> ? 1 << 16 : 1, FLOOR = SIGNED ? LOWEST : 0;
  if (n < k) return {int32_t(FLOOR), n};
  int32_t top = LOWEST;
#pragma omp simd reduction(max : top)
  for (int64_t i = 0; i < n; ++i) top = std::max(top, keys[i]);
  int64_t low = FLOOR, high = top + UNIT;  // k keys reach low, fewer high
  while (high - low > UNIT) {
    const int64_t middle = low + (high - low) / UNIT / 2 * UNIT, count = count_from(keys, n, int32_t(middle));
    if (count == k) return {int32_t(middle), k};
    (count > k ? low : high) = middle;
  }
  return {int32_t(low), k - count_from(keys, n, int32_t(low + UNIT))};
}

// The bound of the k largest group maxima bounds the k largest values from below: what reaches it is a short list, which is cut
// exactly.
template <bool SIGNED, class T>
void select_topk(const T* pre_acts, int64_t batch, int64_t n, int64_t k, int32_t* indices, T* values, int32_t* counts) {
  const int64_t n_groups = groups(n);
  const Room<int32_t> room(n_groups + 2 * n);
#pragma omp parallel for schedule(dynamic, 16)
  for (int64_t b = 0; b < batch; ++b) {
    const T* pre = pre_acts + b * n;
    int32_t *tops = room.own(), *latents = tops + n_groups, *keys = latents + n;
    for (int64_t g = 0; g < n_groups; ++g) tops[g] = top_key<SIGNED>(pre, g, n);
    const int32_t floor = SIGNED ? LOWEST : 1;  // what is not positive is not selected
    const int32_t bound = std::max(cut<SIGNED, T>(tops, n_groups, k).bound, floor);
    int64_t n_found = 0;
    for (int64_t g = 0; g < n_groups; ++g) {
      if (tops[g] < bound) continue;
      uint32_t mask = passing(g, n, [=](int64_t j) { return key_of<SIGNED>(wide(pre[j])) >= bound; });
      for (; mask; mask &= mask - 1) {
        latents[n_found] = int32_t(g * GROUP + __builtin_ctz(mask));
        keys[n_found] = key_of<SIGNED>(wide(pre[latents[n_found]]));
        ++n_found;
      }
    }
    Cut exact = cut<SIGNED, T>(keys, n_found, k);
    int64_t n_taken = 0;
    for (int64_t e = 0; e < n_found && n_taken < k; ++e) {
      if (keys[e] < exact.bound || (keys[e] == exact.bound && exact.n_ties-- <= 0)) continue;
      indices[b * k + n_taken] = latents[e];
      values[b * k + n_taken++] = pre[latents[e]];
    }
    counts[b] = int32_t(n_taken);
    std::fill(indices + b * k + n_taken, indices + (b + 1) * k, 0);
    std::fill(values + b * k + n_taken, values + (b + 1) * k, T{});
  }
}

// Which latents of every group of a row pass, a bit each; how many do. To count is faster than to collect bits, and most groups have
// none that passes.
template <class Passes>
inline int32_t find(int64_t n, uint32_t* hits, Passes passes) {
  int32_t total = 0;
  for (int64_t g = 0; g < groups(n); ++g) {
    int32_t count = 0;
    if ((g + 1) * GROUP <= n) {
#pragma omp simd reduction(+ : count)
      for (int64_t i = 0; i < GROUP; ++i) count += passes(g * GROUP + i);
    } else {
      count = 1;
    }
    hits[g] = count ? passing(g, n, passes) : 0;
    total += __builtin_popcount(hits[g]);
  }
  return total;
}

// Those above `lower` (null: above 0).
template <class T>
void find_above(const T* pre_acts, int64_t batch, int64_t n, const float* lower, uint32_t* hits, int32_t* counts) {
#pragma omp parallel for schedule(dynamic, 16)
  for (int64_t b = 0; b < batch; ++b) {
    const T* pre = pre_acts + b * n;
    uint32_t* own = hits + b * groups(n);
    counts[b] = lower ? find(n, own, [=](int64_t j) { return !(wide(pre[j]) <= lower[j]); })
                      : find(n, own, [=](int64_t j) { return !(wide(pre[j]) <= 0); });
  }
}

// Whether there was memory for it: what is thrown may not leave a parallel loop.
inline bool pushed(std::vector<int32_t>& keys, int32_t key) {
  try {
    keys.push_back(key);
    return true;
  } catch (const std::bad_alloc&) {
    return false;
  }
}

// The k-th largest key; it leaves them in another order.
inline int32_t kth_largest(std::vector<int32_t>& keys, int64_t k) {
  std::nth_element(keys.begin(), keys.begin() + (k - 1), keys.end(), std::greater<>());
  return keys[k - 1];
}

// A lower bound of the `wanted` largest of n keys, 0 where fewer are positive: by their upper halves, since a few more do no harm.
inline int32_t loose_bound(const uint32_t* keys, int64_t n, int64_t wanted) {
  std::vector<int64_t> counts((NAN_KEY >> 16) + 1);
  for (int64_t i = 0; i < n; ++i) ++counts[keys[i] >> 16];
  int32_t upper = NAN_KEY >> 16;
  for (int64_t found = counts[upper]; found < wanted && upper > 0; found += counts[upper]) --upper;
  return upper << 16;
}

// Those among the `wanted` largest positive ones of the whole batch, ties to the smallest (row, latent); the smallest of them, or 0.
template <class T>
float find_largest(const T* pre_acts, const T* group_max, int64_t batch, int64_t n, int64_t wanted, uint32_t* hits,
                   int32_t* counts) {
  const int64_t n_groups = groups(n);
#pragma omp parallel for schedule(dynamic, 16)
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t g = 0, at = b * n_groups; g < n_groups; ++g, ++at)
      hits[at] = group_max ? key_of<false>(wide(group_max[at])) : top_key<false>(pre_acts + b * n, g, n);
  const int32_t bound = std::max(loose_bound(hits, batch * n_groups, wanted), 1);
  std::vector<std::vector<int32_t>> keys(batch);  // of what reaches it, by row: a second look would find it outside of the cache
  bool is_full = false;
#pragma omp parallel for schedule(dynamic, 16) reduction(|| : is_full)
  for (int64_t b = 0; b < batch; ++b) {
    const T* pre = pre_acts + b * n;
    for (int64_t g = 0; g < n_groups; ++g) {
      uint32_t& mask = hits[b * n_groups + g];
      mask = int32_t(mask) < bound ? 0 : passing(g, n, [=](int64_t j) { return key_of<false>(wide(pre[j])) >= bound; });
      for (uint32_t left = mask; left; left &= left - 1)
        is_full |= !pushed(keys[b], key_of<false>(wide(pre[g * GROUP + __builtin_ctz(left)])));
    }
    counts[b] = int32_t(keys[b].size());
  }
  if (is_full) throw std::bad_alloc();
  std::vector<int32_t> all;
  for (const auto& row : keys) all.insert(all.end(), row.begin(), row.end());
  if (all.empty()) return 0;
  if (int64_t(all.size()) <= wanted) return value_of(*std::min_element(all.begin(), all.end()));
  const int32_t least = kth_largest(all, wanted);
  int64_t n_ties = wanted - std::count_if(all.begin(), all.end(), [=](int32_t key) { return key > least; });
  for (int64_t b = 0; b < batch; ++b) {
    const int32_t* key = keys[b].data();
    for (int64_t g = 0; counts[b] && g < n_groups; ++g)
      for (uint32_t& mask = hits[b * n_groups + g], left = mask; left; left &= left - 1, ++key)
        if (*key < least || (*key == least && n_ties-- <= 0)) {
          mask ^= left & -left;
          --counts[b];
        }
  }
  return value_of(least);
}

// Codes of what has been found, as far as there are slots; value 0 where it is not above the threshold either.
template <class T>
void emit(const T* pre_acts, int64_t n, const float* threshold, const uint32_t* hits, Slots slots, int32_t* indices,
          T* values) {
#pragma omp parallel for schedule(dynamic, 16)
  for (int64_t b = 0; b < slots.batch; ++b) {
    const T* pre = pre_acts + b * n;
    const int64_t stored = slots.stored(b);
    int64_t e = 0;
    for (int64_t g = 0; g < groups(n); ++g)
      for (uint32_t mask = hits[b * groups(n) + g]; mask && e < stored; mask &= mask - 1) {
        const int64_t j = g * GROUP + __builtin_ctz(mask), slot = slots.at(b, e++);
        indices[slot] = int32_t(j);
        values[slot] = threshold && wide(pre[j]) <= threshold[j] ? T{} : pre[j];
      }
  }
}

}  // namespace

extern "C" {

int64_t fastsae_group_max(int64_t half, const void* pre_acts, int64_t batch, int64_t n, void* out) {
  return guarded([&] {
    with_dtype(half, [&](auto t) {
      using T = decltype(t);
      group_max((const T*)pre_acts, batch, n, (T*)out);
    });
  });
}

int64_t fastsae_select_topk(int64_t half, const void* pre_acts, int64_t batch, int64_t n, int64_t k, int64_t positive,
                            int32_t* indices, void* values, int32_t* counts) {
  return guarded([&] {
    with_dtype(half, [&](auto t) {
      using T = decltype(t);
      const auto form = positive ? select_topk<false, T> : select_topk<true, T>;
      form((const T*)pre_acts, batch, n, k, indices, (T*)values, counts);
    });
  });
}

int64_t fastsae_find_above(int64_t half, const void* pre_acts, int64_t batch, int64_t n, const float* lower, uint32_t* hits,
                           int32_t* counts) {
  return guarded([&] {
    with_dtype(half, [&](auto t) { find_above((const decltype(t)*)pre_acts, batch, n, lower, hits, counts); });
  });
}

int64_t fastsae_find_largest(int64_t half, const void* pre_acts, const void* group_max, int64_t batch, int64_t n,
                             int64_t wanted, uint32_t* hits, int32_t* counts, float* least) {
  return guarded([&] {
    with_dtype(half, [&](auto t) {
      using T = decltype(t);
      *least = find_largest((const T*)pre_acts, (const T*)group_max, batch, n, wanted, hits, counts);
    });
  });
}

int64_t fastsae_emit(int64_t half, const void* pre_acts, int64_t n, const float* threshold, const uint32_t* hits,
                     const int32_t* counts, const int32_t* tail_starts, int64_t batch, int64_t n_rows, int64_t width,
                     int32_t* indices, void* values) {
  const Slots slots{counts, tail_starts, batch, n_rows, width};
  return guarded([&] {
    with_dtype(half, [&](auto t) {
      using T = decltype(t);
      emit((const T*)pre_acts, n, threshold, hits, slots, indices, (T*)values);
    });
  });
}
}
