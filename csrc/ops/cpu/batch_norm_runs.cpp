// See batch_norm_runs.h.
#include "batch_norm_runs.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define SPLITKERN_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define SPLITKERN_CLONES
#endif
#define SPLITKERN_INLINE static inline __attribute__((always_inline))

namespace splitkern::cpu {

namespace {

template <class A>
SPLITKERN_INLINE A normalise(A x, A mean, A scale, A bias) {
  return (x - mean) * scale + bias;
}

template <class A>
SPLITKERN_INLINE A masked(A g, A x, A mean, A scale, A bias, bool relu) {
  return relu && !(normalise(x, mean, scale, bias) > A(0)) ? A(0) : g;
}

// As PyTorch's ReLU: NaN stays.
template <class A>
SPLITKERN_INLINE A activated(A y, bool relu) {
  return relu && y < A(0) ? A(0) : y;
}

template <class A, class Value>
SPLITKERN_INLINE void lanes(int64_t count, Lanes& sums, const Value& value) {
  int64_t i = 0;
  for (; i + Lanes::kCount <= count; i += Lanes::kCount) {
    for (int lane = 0; lane < Lanes::kCount; ++lane) {
      A weight, deviation;
      value(i + lane, weight, deviation);
      sums.first[lane] += static_cast<double>(weight);
      sums.second[lane] += static_cast<double>(weight) * static_cast<double>(deviation);
    }
  }
  for (int lane = 0; i < count; ++i, ++lane) {
    A weight, deviation;
    value(i, weight, deviation);
    sums.first[lane] += static_cast<double>(weight);
    sums.second[lane] += static_cast<double>(weight) * static_cast<double>(deviation);
  }
}

template <class A>
SPLITKERN_INLINE void plane_stats_of(const A* x, int64_t count, A shift, Lanes& sums) {
  lanes<A>(count, sums, [&](int64_t i, A& weight, A& deviation) { weight = deviation = x[i] - shift; });
}

template <class A>
SPLITKERN_INLINE void plane_reduce_of(const A* g, const A* x, int64_t count, const Coefficients<A>& k, Lanes& sums) {
  const A mean = *k.mean, scale = *k.scale, bias = *k.bias;
  const bool relu = k.relu;
  lanes<A>(count, sums, [&](int64_t i, A& weight, A& deviation) {
    weight = masked(g[i], x[i], mean, scale, bias, relu);
    deviation = x[i] - mean;
  });
}

template <class A>
SPLITKERN_INLINE void plane_apply_of(const A* __restrict__ x, A* __restrict__ y, int64_t count,
                                     const Coefficients<A>& k) {
  const A mean = *k.mean, scale = *k.scale, bias = *k.bias;
  const bool relu = k.relu;
  for (int64_t i = 0; i < count; ++i) y[i] = activated(normalise(x[i], mean, scale, bias), relu);
}

template <class A>
SPLITKERN_INLINE void plane_grad_of(const A* __restrict__ g, const A* __restrict__ x, A* __restrict__ dx, int64_t count,
                                    const Coefficients<A>& k) {
  const A mean = *k.mean, scale = *k.scale, bias = *k.bias, a = *k.a, b = *k.b, c = *k.c;
  const bool relu = k.relu;
  for (int64_t i = 0; i < count; ++i) {
    dx[i] = a * masked(g[i], x[i], mean, scale, bias, relu) + b * (x[i] - mean) + c;
  }
}

template <class A>
SPLITKERN_INLINE void pixel_stats_of(const A* x, int64_t count, const A* shift, double* __restrict__ first,
                                     double* __restrict__ second) {
  for (int64_t c = 0; c < count; ++c) {
    const double deviation = static_cast<double>(x[c] - shift[c]);
    first[c] += deviation;
    second[c] += deviation * deviation;
  }
}

template <class A>
SPLITKERN_INLINE void pixel_reduce_of(const A* g, const A* x, int64_t count, const Coefficients<A>& k,
                                      double* __restrict__ first, double* __restrict__ second) {
  const bool relu = k.relu;
  for (int64_t c = 0; c < count; ++c) {
    const double weight = static_cast<double>(masked(g[c], x[c], k.mean[c], k.scale[c], k.bias[c], relu));
    first[c] += weight;
    second[c] += weight * static_cast<double>(x[c] - k.mean[c]);
  }
}

template <class A>
SPLITKERN_INLINE void pixel_apply_of(const A* __restrict__ x, A* __restrict__ y, int64_t count,
                                     const Coefficients<A>& k) {
  const bool relu = k.relu;
  for (int64_t c = 0; c < count; ++c) y[c] = activated(normalise(x[c], k.mean[c], k.scale[c], k.bias[c]), relu);
}

template <class A>
SPLITKERN_INLINE void pixel_grad_of(const A* __restrict__ g, const A* __restrict__ x, A* __restrict__ dx, int64_t count,
                                    const Coefficients<A>& k) {
  const bool relu = k.relu;
  for (int64_t c = 0; c < count; ++c) {
    dx[c] = k.a[c] * masked(g[c], x[c], k.mean[c], k.scale[c], k.bias[c], relu) + k.b[c] * (x[c] - k.mean[c]) + k.c[c];
  }
}

}  // namespace

SPLITKERN_CLONES void plane_stats(const float* x, int64_t count, float shift, Lanes& sums) {
  plane_stats_of(x, count, shift, sums);
}
SPLITKERN_CLONES void plane_stats(const double* x, int64_t count, double shift, Lanes& sums) {
  plane_stats_of(x, count, shift, sums);
}
SPLITKERN_CLONES void plane_apply(const float* x, float* y, int64_t count, const Coefficients<float>& k) {
  plane_apply_of(x, y, count, k);
}
SPLITKERN_CLONES void plane_apply(const double* x, double* y, int64_t count, const Coefficients<double>& k) {
  plane_apply_of(x, y, count, k);
}
SPLITKERN_CLONES void plane_reduce(const float* g, const float* x, int64_t count, const Coefficients<float>& k,
                                   Lanes& sums) {
  plane_reduce_of(g, x, count, k, sums);
}
SPLITKERN_CLONES void plane_reduce(const double* g, const double* x, int64_t count, const Coefficients<double>& k,
                                   Lanes& sums) {
  plane_reduce_of(g, x, count, k, sums);
}
SPLITKERN_CLONES void plane_grad(const float* g, const float* x, float* dx, int64_t count,
                                 const Coefficients<float>& k) {
  plane_grad_of(g, x, dx, count, k);
}
SPLITKERN_CLONES void plane_grad(const double* g, const double* x, double* dx, int64_t count,
                                 const Coefficients<double>& k) {
  plane_grad_of(g, x, dx, count, k);
}
SPLITKERN_CLONES void pixel_stats(const float* x, int64_t count, const float* shift, double* first, double* second) {
  pixel_stats_of(x, count, shift, first, second);
}
SPLITKERN_CLONES void pixel_stats(const double* x, int64_t count, const double* shift, double* first, double* second) {
  pixel_stats_of(x, count, shift, first, second);
}
SPLITKERN_CLONES void pixel_apply(const float* x, float* y, int64_t count, const Coefficients<float>& k) {
  pixel_apply_of(x, y, count, k);
}
SPLITKERN_CLONES void pixel_apply(const double* x, double* y, int64_t count, const Coefficients<double>& k) {
  pixel_apply_of(x, y, count, k);
}
SPLITKERN_CLONES void pixel_reduce(const float* g, const float* x, int64_t count, const Coefficients<float>& k,
                                   double* first, double* second) {
  pixel_reduce_of(g, x, count, k, first, second);
}
SPLITKERN_CLONES void pixel_reduce(const double* g, const double* x, int64_t count, const Coefficients<double>& k,
                                   double* first, double* second) {
  pixel_reduce_of(g, x, count, k, first, second);
}
SPLITKERN_CLONES void pixel_grad(const float* g, const float* x, float* dx, int64_t count,
                                 const Coefficients<float>& k) {
  pixel_grad_of(g, x, dx, count, k);
}
SPLITKERN_CLONES void pixel_grad(const double* g, const double* x, double* dx, int64_t count,
                                 const Coefficients<double>& k) {
  pixel_grad_of(g, x, dx, count, k);
}

}  // namespace splitkern::cpu
