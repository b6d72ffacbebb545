// The pointwise parts of a dense step. A thread takes `block` rows at a time, and where they are wide a `strip` of their columns, whose
// sums fit into a core's cache. Sums over rows are written per block, sums along a row per strip, for the caller to add up.

#include "common.h"

namespace {

inline int64_t parts(int64_t n, int64_t size) { return (n + size - 1) / size; }

template <class T, class Target, class Out>
void dense_loss(const T* decoded, const float* b_dec, const Target* target, int64_t batch, int64_t d, int64_t block, Out* g,
                float* mse, float* g_sums) {
  const float scale = 2.0f / batch;
#pragma omp parallel for schedule(dynamic, 1)
  for (int64_t k = 0; k < parts(batch, block); ++k) {
    float* g_sum = g_sums + k * d;
    std::fill_n(g_sum, d, 0.0f);
    for (int64_t b = k * block; b < std::min(batch, (k + 1) * block); ++b) {
      const int64_t at = b * d;
      float squares = 0;
#pragma omp simd reduction(+ : squares)
      for (int64_t i = 0; i < d; ++i) {
        const float error = wide(decoded[at + i]) + b_dec[i] - wide(target[at + i]);
        squares += error * error;
        g_sum[i] += error * scale;
        g[at + i] = rounded<Out>(error * scale);
      }
      mse[b] = squares;
    }
  }
}

// shift: what an active latent's gradient grows by; weights: of the L1 term.
template <class G, class T>
void dense_codes_grad(G* g_acts, const T* acts, int64_t batch, int64_t n, int64_t block, int64_t strip, const float* shift,
                      const float* weights, float* l1_parts, float* acts_sums, float* g_sums, int32_t* n_fired) {
#pragma omp parallel for collapse(2) schedule(dynamic, 1)
  for (int64_t k = 0; k < parts(batch, block); ++k)
    for (int64_t s = 0; s < parts(n, strip); ++s) {
      const int64_t first = s * strip, last = std::min(n, first + strip);
      float *acts_sum = acts_sums + k * n, *g_sum = g_sums + k * n;
      int32_t* fired_sum = n_fired + k * n;
      for (int64_t i = first; i < last; ++i) acts_sum[i] = g_sum[i] = fired_sum[i] = 0;
      for (int64_t b = k * block; b < std::min(batch, (k + 1) * block); ++b) {
        const int64_t at = b * n;
        float l1 = 0;
#pragma omp simd reduction(+ : l1)
        for (int64_t i = first; i < last; ++i) {
          const float act = wide(acts[at + i]);
          const bool fired = !(act <= 0);
          const float g = fired ? wide(g_acts[at + i]) + shift[i] : 0;
          l1 += act * weights[i];
          acts_sum[i] += act;
          g_sum[i] += g;
          fired_sum[i] += fired;
          g_acts[at + i] = rounded<G>(g);
        }
        l1_parts[s * batch + b] = l1;
      }
    }
}

// Active above the threshold; in the band between low and high.
template <class G, class T>
void dense_jumprelu_grad(G* g_acts, const T* pre_acts, const float* threshold, const float* low, const float* high,
                         int64_t batch, int64_t n, int64_t block, int64_t strip, int32_t* n_fired, int32_t* n_above,
                         int32_t* n_in_band, float* g_in_band, float* g_sum, float* acts_sum) {
#pragma omp parallel for collapse(2) schedule(dynamic, 1)
  for (int64_t k = 0; k < parts(batch, block); ++k)
    for (int64_t s = 0; s < parts(n, strip); ++s) {
      const int64_t first = s * strip, last = std::min(n, first + strip), sums = k * n;
      for (int64_t i = first; i < last; ++i) {
        n_fired[sums + i] = n_above[sums + i] = n_in_band[sums + i] = 0;
        g_in_band[sums + i] = g_sum[sums + i] = acts_sum[sums + i] = 0;
      }
      for (int64_t b = k * block; b < std::min(batch, (k + 1) * block); ++b) {
        const int64_t at = b * n;
#pragma omp simd
        for (int64_t i = first; i < last; ++i) {
          const float pre = wide(pre_acts[at + i]), g = wide(g_acts[at + i]);
          const bool fired = !(pre <= threshold[i]), above = !(pre <= low[i]), in_band = above && !(pre >= high[i]);
          const float g_pre = fired ? g : 0;
          n_fired[sums + i] += fired;
          n_above[sums + i] += above;
          n_in_band[sums + i] += in_band;
          g_in_band[sums + i] += in_band ? g : 0;
          g_sum[sums + i] += g_pre;
          acts_sum[sums + i] += fired ? pre : 0;
          g_acts[at + i] = rounded<G>(g_pre);
        }
      }
    }
}

}  // namespace

extern "C" {

int64_t fastsae_dense_loss(int64_t half, int64_t half_target, int64_t half_out, const void* decoded, const float* b_dec,
                           const void* target, int64_t batch, int64_t d, int64_t block, void* g, float* mse, float* g_sums) {
  return guarded([&] {
    with_dtype(half, [&](auto t) {
      with_dtype(half_target, [&](auto w) {
        with_dtype(half_out, [&](auto o) {
          dense_loss((const decltype(t)*)decoded, b_dec, (const decltype(w)*)target, batch, d, block, (decltype(o)*)g, mse,
                     g_sums);
        });
      });
    });
  });
}

int64_t fastsae_dense_codes_grad(int64_t half_g, int64_t half, void* g_acts, const void* acts, int64_t batch, int64_t n,
                                 int64_t block, int64_t strip, const float* shift, const float* weights, float* l1_parts,
                                 float* acts_sums, float* g_sums, int32_t* n_fired) {
  return guarded([&] {
    with_dtype(half_g, [&](auto o) {
      with_dtype(half, [&](auto t) {
        dense_codes_grad((decltype(o)*)g_acts, (const decltype(t)*)acts, batch, n, block, strip, shift, weights, l1_parts,
                         acts_sums, g_sums, n_fired);
      });
    });
  });
}

int64_t fastsae_dense_jumprelu_grad(int64_t half_g, int64_t half, void* g_acts, const void* pre_acts, const float* threshold,
                                    const float* low, const float* high, int64_t batch, int64_t n, int64_t block,
                                    int64_t strip, int32_t* n_fired, int32_t* n_above, int32_t* n_in_band, float* g_in_band,
                                    float* g_sum, float* acts_sum) {
  return guarded([&] {
    with_dtype(half_g, [&](auto o) {
      with_dtype(half, [&](auto t) {
        dense_jumprelu_grad((decltype(o)*)g_acts, (const decltype(t)*)pre_acts, threshold, low, high, batch, n, block, strip,
                            n_fired, n_above, n_in_band, g_in_band, g_sum, acts_sum);
      });
    });
  });
}
}
