// What gathers rows of W_dec, and the codes by latent.

#include "common.h"

namespace {

struct Codes {
  const int32_t* indices;
  const float* values;  // null where they play no part
  Slots slots;

  float value(int64_t b, int64_t e) const { return values[slots.at(b, e)]; }
  int64_t latent(int64_t b, int64_t e) const { return indices[slots.at(b, e)]; }

  // The first index outside of [0, n), or DONE.
  int64_t outside(int64_t n) const {
    int64_t first = INT64_MAX;
#pragma omp parallel for schedule(static) reduction(min : first)
    for (int64_t b = 0; b < slots.batch; ++b)
      for (int64_t e = 0, stored = slots.stored(b); e < stored; ++e)
        if (latent(b, e) < 0 || latent(b, e) >= n) first = std::min(first, slots.at(b, e));
    return first == INT64_MAX ? DONE : indices[first];
  }
};

template <class T>
void decode(Codes codes, const T* W_dec, const float* b_dec, int64_t d, T* x_hat) {
  const Room<float> room(d);
#pragma omp parallel for schedule(dynamic, 16)
  for (int64_t b = 0; b < codes.slots.batch; ++b) {
    float* sums = room.own();
    b_dec ? std::copy_n(b_dec, d, sums) : std::fill_n(sums, d, 0.0f);
    const auto row = [&](int64_t e) { return W_dec + codes.latent(b, e) * d; };
    add_rows(sums, d, codes.slots.stored(b), row, [&](int64_t e) { return codes.value(b, e); });
    for (int64_t i = 0; i < d; ++i) x_hat[b * d + i] = rounded<T>(sums[i]);
  }
}

template <class T>
void gathered_dots(Codes codes, const T* W_dec, const float* g, int64_t d, float* out) {
#pragma omp parallel for schedule(dynamic, 16)
  for (int64_t b = 0; b < codes.slots.batch; ++b) {
    const auto row = [&](int64_t e) { return W_dec + codes.latent(b, e) * d; };
    each_dot(g + b * d, d, codes.slots.stored(b), row, [&](int64_t e, float sum) { out[codes.slots.at(b, e)] = sum; });
  }
}

// x_hat, error, g and g_values of one input while its rows of W_dec are in the cache; g of `block` inputs adds up to a row of g_sums.
template <class T, class Out>
void decode_loss(Codes codes, const T* W_dec, const float* b_dec, const float* target, const float* l1,
                 const float* norms, int64_t d, int64_t block, Out* g, float* g_values, float* mse, float* l1_rows,
                 float* g_sums, Out* x_hat) {
  const int64_t batch = codes.slots.batch;
  const float scale = 2.0f / batch, l1_scale = l1 ? *l1 / batch : 0;
  const Room<float> room(d);
#pragma omp parallel for schedule(dynamic, 1)
  for (int64_t k = 0; k < (batch + block - 1) / block; ++k) {
    float *g_sum = g_sums + k * d, *wide_g = room.own();
    std::fill_n(g_sum, d, 0.0f);
    for (int64_t b = k * block; b < std::min(batch, (k + 1) * block); ++b) {
      const int64_t n = codes.slots.stored(b), at = b * d;
      const auto row = [&](int64_t e) { return W_dec + codes.latent(b, e) * d; };
      std::copy_n(b_dec, d, wide_g);
      add_rows(wide_g, d, n, row, [&](int64_t e) { return codes.value(b, e); });
      if (x_hat)
        for (int64_t i = 0; i < d; ++i) x_hat[at + i] = rounded<Out>(wide_g[i]);
      float squares = 0;
#pragma omp simd reduction(+ : squares)
      for (int64_t i = 0; i < d; ++i) {
        const float error = wide_g[i] - target[at + i];
        squares += error * error;
        wide_g[i] = error * scale;
      }
      mse[b] = squares;
#pragma omp simd
      for (int64_t i = 0; i < d; ++i) {
        g[at + i] = rounded<Out>(wide_g[i]);
        g_sum[i] += wide(g[at + i]);
      }
      l1_rows[b] = 0;
      each_dot(wide_g, d, n, row, [&](int64_t e, float sum) {
        const float value = codes.value(b, e), norm = norms ? norms[codes.latent(b, e)] : 1;
        if (!(value < 0)) l1_rows[b] += value * norm;
        g_values[codes.slots.at(b, e)] = l1 && value > 0 ? sum + l1_scale * norm : sum;
      });
    }
  }
}

// A counting sort of indices in [0, n): parts of the batch count their own, and go to places behind those of the parts before.
void transpose(Codes codes, int64_t n, int32_t* starts, int32_t* owners, int32_t* places) {
  const Slots& slots = codes.slots;
  const int64_t n_parts = std::max<int64_t>(std::min<int64_t>(omp_get_max_threads(), slots.batch * slots.width / n), 1);
  std::vector<int32_t> next(n_parts * n);  // per part and latent: how many there are, then where the next one goes
  const auto each = [&](int64_t part, auto visit) {
    for (int64_t b = slots.batch * part / n_parts; b < slots.batch * (part + 1) / n_parts; ++b)
      for (int64_t e = 0, stored = slots.stored(b); e < stored; ++e) visit(b, e, next[part * n + codes.latent(b, e)]);
  };
#pragma omp parallel for schedule(static)
  for (int64_t part = 0; part < n_parts; ++part) each(part, [](int64_t, int64_t, int32_t& count) { ++count; });
  int32_t place = 0;
  for (int64_t j = 0; j < n; ++j) {
    starts[j] = place;
    for (int64_t part = 0; part < n_parts; ++part) place += std::exchange(next[part * n + j], place);
  }
  starts[n] = place;
#pragma omp parallel for schedule(static)
  for (int64_t part = 0; part < n_parts; ++part)
    each(part, [&](int64_t b, int64_t e, int32_t& at) {
      owners[at] = int32_t(b);
      places[at++] = int32_t(slots.at(b, e));
    });
}

// run() unless a code names a latent outside of [0, n), which is returned then.
template <class Run>
int64_t checked(Codes codes, int64_t n, Run run) {
  const int64_t outside = codes.outside(n);
  return outside == DONE ? guarded(run) : outside;
}

}  // namespace

extern "C" {

int64_t fastsae_decode(int64_t half, const int32_t* indices, const float* values, const int32_t* counts,
                       const int32_t* tail_starts, int64_t batch, int64_t n_rows, int64_t width, const void* W_dec,
                       const float* b_dec, int64_t n, int64_t d, void* x_hat) {
  const Codes codes{indices, values, {counts, tail_starts, batch, n_rows, width}};
  return checked(codes, n, [&] {
    with_dtype(half, [&](auto t) {
      using T = decltype(t);
      decode(codes, (const T*)W_dec, b_dec, d, (T*)x_hat);
    });
  });
}

int64_t fastsae_gathered_dots(int64_t half, const int32_t* indices, const float* values, const int32_t* counts,
                              const int32_t* tail_starts, int64_t batch, int64_t n_rows, int64_t width, const void* W_dec,
                              const float* g, int64_t n, int64_t d, float* out) {
  const Codes codes{indices, values, {counts, tail_starts, batch, n_rows, width}};
  return checked(codes, n, [&] {
    with_dtype(half, [&](auto t) { gathered_dots(codes, (const decltype(t)*)W_dec, g, d, out); });
  });
}

int64_t fastsae_decode_loss(int64_t half, int64_t half_out, const int32_t* indices, const float* values,
                            const int32_t* counts, const int32_t* tail_starts, int64_t batch, int64_t n_rows,
                            int64_t width, const void* W_dec, const float* b_dec, const float* target, const float* l1,
                            const float* norms, int64_t n, int64_t d, int64_t block, void* g, float* g_values, float* mse,
                            float* l1_rows, float* g_sums, void* x_hat) {
  const Codes codes{indices, values, {counts, tail_starts, batch, n_rows, width}};
  return checked(codes, n, [&] {
    with_dtype(half, [&](auto t) {
      with_dtype(half_out, [&](auto o) {
        using Out = decltype(o);
        decode_loss(codes, (const decltype(t)*)W_dec, b_dec, target, l1, norms, d, block, (Out*)g, g_values, mse, l1_rows,
                    g_sums, (Out*)x_hat);
      });
    });
  });
}

int64_t fastsae_transpose(const int32_t* indices, const float* values, const int32_t* counts, const int32_t* tail_starts,
                          int64_t batch, int64_t n_rows, int64_t width, int64_t n, int32_t* starts, int32_t* owners,
                          int32_t* places) {
  const Codes codes{indices, values, {counts, tail_starts, batch, n_rows, width}};
  return checked(codes, n, [&] { transpose(codes, n, starts, owners, places); });
}
}
