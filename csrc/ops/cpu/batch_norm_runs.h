// Inner loops of batch norm on the CPU, over runs of contiguous float or double values. Called by batch_norm.cpp alone,
// which finds the runs. Compiled for several instruction sets; the loader picks one for the machine.
// normalise() is what the forward applies and what the backward rebuilds: one function, compiled without contraction
// into fused multiply-adds (CMakeLists.txt), so that both agree bit for bit on where ReLU was active.
#pragma once

#include <cstdint>

namespace splitkern::cpu {

// y = (x - mean) * scale + bias, and for the input gradient a * g' + b * (x - mean) + c. In a plane all values share
// entry 0; in a pixel every channel has its own.
template <class A>
struct Coefficients {
  const A* mean = nullptr;
  const A* scale = nullptr;
  const A* bias = nullptr;
  const A* a = nullptr;
  const A* b = nullptr;
  const A* c = nullptr;
  bool relu = false;
};

// Partial sums of a plane, lane by lane: fixed order, independent of the vector width.
struct Lanes {
  static constexpr int kCount = 8;
  double first[kCount] = {};
  double second[kCount] = {};
};

void plane_stats(const float* x, int64_t count, float shift, Lanes& sums);
void plane_stats(const double* x, int64_t count, double shift, Lanes& sums);
void plane_apply(const float* x, float* y, int64_t count, const Coefficients<float>& k);
void plane_apply(const double* x, double* y, int64_t count, const Coefficients<double>& k);
void plane_reduce(const float* g, const float* x, int64_t count, const Coefficients<float>& k, Lanes& sums);
void plane_reduce(const double* g, const double* x, int64_t count, const Coefficients<double>& k, Lanes& sums);
void plane_grad(const float* g, const float* x, float* dx, int64_t count, const Coefficients<float>& k);
void plane_grad(const double* g, const double* x, double* dx, int64_t count, const Coefficients<double>& k);

// One pixel of `count` channels.
void pixel_stats(const float* x, int64_t count, const float* shift, double* first, double* second);
void pixel_stats(const double* x, int64_t count, const double* shift, double* first, double* second);
void pixel_apply(const float* x, float* y, int64_t count, const Coefficients<float>& k);
void pixel_apply(const double* x, double* y, int64_t count, const Coefficients<double>& k);
void pixel_reduce(const float* g, const float* x, int64_t count, const Coefficients<float>& k, double* first,
                  double* second);
void pixel_reduce(const double* g, const double* x, int64_t count, const Coefficients<double>& k, double* first,
                  double* second);
void pixel_grad(const float* g, const float* x, float* dx, int64_t count, const Coefficients<float>& k);
void pixel_grad(const double* g, const double* x, double* dx, int64_t count, const Coefficients<double>& k);

}  // namespace splitkern::cpu
