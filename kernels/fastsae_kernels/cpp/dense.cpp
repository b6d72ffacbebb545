// The pointwise parts of a dense step. A thread takes a strip of columns down all rows, so that their sums stay in its cache and are
// added up in one order; what is summed along a row is written per strip.

#include "common.h"

namespace {

constexpr int64_t STRIP = 1024;  // columns: dense_loss.py

inline int64_t strips(int64_t n) { return (n + STRIP - 1) / STRIP; }

struct Strip {
  int64_t first, size;
};

inline Strip strip(int64_t number, int64_t n) { return {number * STRIP, std::min(STRIP, n - number * STRIP)}; }

template <class T, class Target, class Out>
void dense_loss(const T* decoded, const float* b_dec, const Target* target, int64_t batch, int64_t d, Out* g, float* mse,
                float* g_sum) {
  const float scale = 2.0f / batch;
  std::fill_n(g_sum, d, 0.0f);
#pragma omp parallel for schedule(dynamic, 1)
  for (int64_t s = 0; s < strips(d); ++s) {
    const auto [first, size] = strip(s, d);
    for (int64_t b = 0; b < batch; ++b) {
      const int64_t at = b * d + first;
      float squares = 0;
#pragma omp simd reduction(+ : squares)
      for (int64_t i = 0; i < size; ++i) {
        const float error = wide(decoded[at + i]) + b_dec[first + i] - wide(target[at + i]);
        squares += error * error;
        g_sum[first + i] += error * scale;
        g[at + i] = rounded<Out>(error * scale);
      }
      mse[s * batch + b] = squares;
    }
  }
}

// shift: what an active latent's gradient grows by, null for nothing; weights: of the L1 term, null for 1.
template <class G, class T>
void dense_codes_grad(G* g_acts, const T* acts, int64_t batch, int64_t n, const float* shift, const float* weights,
                      float* l1_rows, float* acts_sum, float* g_sum, int32_t* n_fired) {
#pragma omp parallel
  {
    std::vector<float> more(STRIP), weight(STRIP);
#pragma omp for schedule(dynamic, 1)
    for (int64_t s = 0; s < strips(n); ++s) {
      const auto [first, size] = strip(s, n);
      for (int64_t i = 0; i < size; ++i) {
        more[i] = shift ? shift[first + i] : 0;
        weight[i] = weights ? weights[first + i] : 1;
        acts_sum[first + i] = g_sum[first + i] = 0;
        n_fired[first + i] = 0;
      }
      for (int64_t b = 0; b < batch; ++b) {
        const int64_t at = b * n + first;
        float l1 = 0;
#pragma omp simd reduction(+ : l1)
        for (int64_t i = 0; i < size; ++i) {
          const float act = wide(acts[at + i]);
          const bool fired = !(act <= 0);
          const float g = fired ? wide(g_acts[at + i]) + more[i] : 0;
          l1 += act * weight[i];
          acts_sum[first + i] += act;
          g_sum[first + i] += g;
          n_fired[first + i] += fired;
          g_acts[at + i] = rounded<G>(g);
        }
        l1_rows[s * batch + b] = l1;
      }
    }
  }
}

// Active above the threshold; in the band where less than half its width from it.
template <class G, class T>
void dense_jumprelu_grad(G* g_acts, const T* pre_acts, const float* threshold, float half_band, int64_t batch, int64_t n,
                         int32_t* n_fired, int32_t* n_above, int32_t* n_in_band, float* g_in_band, float* g_sum,
                         float* acts_sum) {
#pragma omp parallel for schedule(dynamic, 1)
  for (int64_t s = 0; s < strips(n); ++s) {
    const auto [first, size] = strip(s, n);
    for (int64_t i = first; i < first + size; ++i) {
      n_fired[i] = n_above[i] = n_in_band[i] = 0;
      g_in_band[i] = g_sum[i] = acts_sum[i] = 0;
    }
    for (int64_t b = 0; b < batch; ++b) {
      const int64_t at = b * n;
#pragma omp simd
      for (int64_t i = first; i < first + size; ++i) {
        const float pre = wide(pre_acts[at + i]), g = wide(g_acts[at + i]), over = pre - threshold[i];
        const bool fired = !(over <= 0), above = !(over <= -half_band), in_band = above && !(over >= half_band);
        const float g_pre = fired ? g : 0;
        n_fired[i] += fired;
        n_above[i] += above;
        n_in_band[i] += in_band;
        g_in_band[i] += in_band ? g : 0;
        g_sum[i] += g_pre;
        acts_sum[i] += fired ? pre : 0;
        g_acts[at + i] = rounded<G>(g_pre);
      }
    }
  }
}

}  // namespace

extern "C" {

void fastsae_dense_loss(int64_t half, int64_t half_target, int64_t half_out, const void* decoded, const float* b_dec,
                        const void* target, int64_t batch, int64_t d, void* g, float* mse, float* g_sum) {
  with_dtype(half, [&](auto t) {
    with_dtype(half_target, [&](auto w) {
      with_dtype(half_out, [&](auto o) {
        dense_loss((const decltype(t)*)decoded, b_dec, (const decltype(w)*)target, batch, d, (decltype(o)*)g, mse, g_sum);
      });
    });
  });
}

void fastsae_dense_codes_grad(int64_t half_g, int64_t half, void* g_acts, const void* acts, int64_t batch, int64_t n,
                              const float* shift, const float* weights, float* l1_rows, float* acts_sum, float* g_sum,
                              int32_t* n_fired) {
  with_dtype(half_g, [&](auto o) {
    with_dtype(half, [&](auto t) {
      dense_codes_grad((decltype(o)*)g_acts, (const decltype(t)*)acts, batch, n, shift, weights, l1_rows, acts_sum, g_sum,
                       n_fired);
    });
  });
}

void fastsae_dense_jumprelu_grad(int64_t half_g, int64_t half, void* g_acts, const void* pre_acts, const float* threshold,
                                 double half_band, int64_t batch, int64_t n, int32_t* n_fired, int32_t* n_above,
                                 int32_t* n_in_band, float* g_in_band, float* g_sum, float* acts_sum) {
  with_dtype(half_g, [&](auto o) {
    with_dtype(half, [&](auto t) {
      dense_jumprelu_grad((decltype(o)*)g_acts, (const decltype(t)*)pre_acts, threshold, float(half_band), batch, n, n_fired,
                          n_above, n_in_band, g_in_band, g_sum, acts_sum);
    });
  });
}
}
