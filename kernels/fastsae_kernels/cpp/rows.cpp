// Rows of a weight's gradient from transposed codes, their norms, and Adam's step on top of them.

#include <cfloat>

#include "common.h"

namespace {

template <class T>
struct Gradient {
  const int32_t *starts, *owners, *slots;
  const float* coefficients;
  const T* source;
  int64_t d;
  const float* W;  // for the two below
  float l1;        // coefficient of what ||W_j|| adds, times the sum of the coefficients
  bool project;    // take the part along W_j out

  bool is_empty(int64_t j) const { return starts[j] == starts[j + 1]; }

  // The row, times scale, into g; the sum of its coefficients, times scale.
  float row(int64_t j, float scale, float* g) const {
    const int64_t first = starts[j], n = starts[j + 1] - first;
    const auto coefficient = [&](int64_t e) { return scale * coefficients[slots[first + e]]; };
    float sum = 0;
    for (int64_t e = 0; e < n; ++e) sum += coefficient(e);
    std::fill_n(g, d, 0.0f);
    add_rows(g, d, n, [&](int64_t e) { return source + owners[first + e] * d; }, coefficient);
    const float* w = W ? W + j * d : nullptr;
    if (l1 != 0) add(g, l1 * sum / std::max(std::sqrt(dot(w, w, d)), FLT_MIN), w);
    if (project) add(g, -dot(g, w, d), w);
    return sum;
  }

 private:
  void add(float* g, float scale, const float* w) const {
#pragma omp simd
    for (int64_t i = 0; i < d; ++i) g[i] += scale * w[i];
  }
};

template <class T>
void grad_rows(Gradient<T> gradient, int64_t n, float* g_W, float* g_b) {
#pragma omp parallel for schedule(dynamic, 16)
  for (int64_t j = 0; j < n; ++j) g_b[j] = gradient.row(j, 1, g_W + j * gradient.d);
}

template <class T>
void grad_norms(Gradient<T> gradient, int64_t n, float* squares, float* g_b) {
  const Room<float> room(gradient.d);
#pragma omp parallel for schedule(dynamic, 16)
  for (int64_t j = 0; j < n; ++j) {
    float* g = room.own();
    g_b[j] = gradient.row(j, 1, g);
    squares[j] = dot(g, g, gradient.d);
  }
}

struct Adam {
  float lr, root_c2;  // divided by the first moment's correction; the root of the second's
  float beta1, rest1, beta2, rest2, eps;  // rest: 1 - beta, which is not rounded as beta is

  // One step of a number; m is the new first moment.
  float moved(float w, float m, float v) const { return w - lr * m / (std::sqrt(v) / root_c2 + eps); }
};

// m may be null: then it is the gradient itself.
template <class M>
void step_row(Adam adam, const float* g, int64_t d, float decay, float* w, M* m, float* v) {
  if (m) {
#pragma omp simd
    for (int64_t i = 0; i < d; ++i) {
      const float first = adam.beta1 * wide(m[i]) + adam.rest1 * g[i];
      v[i] = adam.beta2 * (decay * v[i]) + adam.rest2 * g[i] * g[i];
      w[i] = adam.moved(w[i], first, v[i]);
      m[i] = rounded<M>(first);
    }
  } else {
#pragma omp simd
    for (int64_t i = 0; i < d; ++i) {
      v[i] = adam.beta2 * (decay * v[i]) + adam.rest2 * g[i] * g[i];
      w[i] = adam.moved(w[i], g[i], v[i]);
    }
  }
}

struct Bias {
  float *b, *m, *v;
};

// behind: for how many steps row j, which had no entries, was left as it was; null where every row is stepped.
template <class T, class M>
void update_rows(Gradient<T> gradient, int64_t n, Adam adam, float grad_scale, float* W, M* m, float* v, bf16* shadow,
                 bool renormalise, Bias bias, int32_t* behind) {
  const int64_t d = gradient.d;
  const Room<float> room(d);
#pragma omp parallel for schedule(dynamic, 16)
  for (int64_t j = 0; j < n; ++j) {
    float decay = 1;
    if (behind) {
      if (gradient.is_empty(j)) {
        ++behind[j];
        continue;
      }
      decay = std::pow(adam.beta2, float(behind[j]));
      behind[j] = 0;
    }
    float *g = room.own(), *w = W + j * d;
    const float sum = gradient.row(j, grad_scale, g);
    step_row(adam, g, d, decay, w, m ? m + j * d : nullptr, v + j * d);
    if (renormalise) {
      const float norm = std::max(std::sqrt(dot(w, w, d)), FLT_MIN);
#pragma omp simd
      for (int64_t i = 0; i < d; ++i) w[i] /= norm;
    }
    if (shadow)
      for (int64_t i = 0; i < d; ++i) shadow[j * d + i] = rounded<bf16>(w[i]);
    if (bias.b) step_row(adam, &sum, 1, decay, bias.b + j, bias.m ? bias.m + j : nullptr, bias.v + j);
  }
}

}  // namespace

extern "C" {

int64_t fastsae_grad_rows(int64_t half, const int32_t* starts, const int32_t* owners, const int32_t* slots,
                          const float* coefficients, const void* source, int64_t n, int64_t d, float* g_W, float* g_b) {
  return guarded([&] {
    with_dtype(half, [&](auto t) {
      using T = decltype(t);
      grad_rows(Gradient<T>{starts, owners, slots, coefficients, (const T*)source, d, nullptr, 0, false}, n, g_W, g_b);
    });
  });
}

int64_t fastsae_grad_norms(int64_t half, const int32_t* starts, const int32_t* owners, const int32_t* slots,
                           const float* coefficients, const void* source, int64_t n, int64_t d, const float* W, double l1,
                           int64_t project, float* squares, float* g_b) {
  return guarded([&] {
    with_dtype(half, [&](auto t) {
      using T = decltype(t);
      const Gradient<T> gradient{starts, owners, slots, coefficients, (const T*)source, d, W, float(l1), project != 0};
      grad_norms(gradient, n, squares, g_b);
    });
  });
}

int64_t fastsae_update_rows(int64_t half, const int32_t* starts, const int32_t* owners, const int32_t* slots,
                            const float* coefficients, const void* source, int64_t n, int64_t d, float* W, int64_t half_m,
                            void* m, float* v, double lr, double c1, double c2, double grad_scale, double l1, double beta1,
                            double beta2, double eps, bf16* shadow, int64_t project, int64_t renormalise, float* bias,
                            float* bias_m, float* bias_v, int32_t* behind) {
  const Adam adam{float(lr / c1), float(std::sqrt(c2)), float(beta1), float(1 - beta1), float(beta2),
                  float(1 - beta2), float(eps)};
  return guarded([&] {
    with_dtype(half, [&](auto t) {
      with_dtype(half_m, [&](auto moment) {
        using T = decltype(t);
        const Gradient<T> gradient{starts, owners, slots, coefficients, (const T*)source, d, W, float(l1), project != 0};
        update_rows(gradient, n, adam, float(grad_scale), W, (decltype(moment)*)m, v, shadow, renormalise != 0,
                    Bias{bias, bias_m, bias_v}, behind);
      });
    });
  });
}
}
