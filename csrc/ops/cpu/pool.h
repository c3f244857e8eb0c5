// The geometry of one pooling call as tables, built once per call and read by the loops of max_pool.cpp and
// avg_pool.cpp: what each output reads, and which outputs read each input, in both cases inside one patch.
#pragma once

#include <algorithm>
#include <vector>

#include "ops/arguments.h"

namespace splitkern::cpu {

// What one output of an axis reads: positions first + tap * dilation for tap = tap_begin .. tap_end - 1. The taps
// outside that range lie outside the patch.
struct Span {
  int64_t first;
  int64_t tap_begin;
  int64_t tap_end;

  bool empty() const { return tap_begin >= tap_end; }
};

// One output that reads an input, and with which tap.
struct Reader {
  int64_t output;
  int64_t tap;
};

// One patch of an axis. Outputs [inner_begin, inner_end) read with all their taps.
struct AxisPatch {
  int64_t in_begin, in_end;
  int64_t out_begin, out_end;
  int64_t inner_begin, inner_end;
};

class AxisTables {
 public:
  AxisTables(const PoolCall& call, int axis)
      : kernel_(call.window.kernel[axis]),
        stride_(call.window.stride[axis]),
        padding_(call.window.padding[axis]),
        dilation_(call.window.dilation[axis]),
        extent_(call.bounds.in(axis).back()) {
    const IntList& in = call.bounds.in(axis);
    const IntList& out = call.bounds.out(axis);
    spans_.reserve(out.back());
    patch_of_.reserve(out.back());
    for (size_t i = 0; i + 1 < in.size(); ++i) {
      AxisPatch patch{in[i], in[i + 1], out[i], out[i + 1], out[i + 1], out[i + 1]};
      for (int64_t output = patch.out_begin; output < patch.out_end; ++output) {
        const Span span = span_of(output, patch);
        const bool inner = span.tap_begin == 0 && span.tap_end == kernel_;
        if (inner && patch.inner_begin == patch.out_end) patch.inner_begin = output;
        if (!inner && patch.inner_begin != patch.out_end) patch.inner_end = std::min(patch.inner_end, output);
        spans_.push_back(span);
        patch_of_.push_back(static_cast<int64_t>(i));
      }
      patches_.push_back(patch);
    }
  }

  int64_t kernel() const { return kernel_; }
  int64_t stride() const { return stride_; }
  int64_t dilation() const { return dilation_; }
  int64_t outputs() const { return static_cast<int64_t>(spans_.size()); }
  int64_t inputs() const { return extent_; }
  const Span& span(int64_t output) const { return spans_[output]; }
  const std::vector<AxisPatch>& patches() const { return patches_; }
  const AxisPatch& patch_of(int64_t output) const { return patches_[patch_of_[output]]; }

  // Window positions of an output within [-padding, extent + padding) of the whole axis.
  int64_t padded_positions(int64_t output) const {
    const int64_t first = output * stride_ - padding_;
    return std::max<int64_t>(0, std::min(first + kernel_, extent_ + padding_) - first);
  }

  // For every input, the outputs of its patch that read it, ascending.
  std::vector<std::vector<Reader>> readers() const {
    std::vector<std::vector<Reader>> readers(extent_);
    for (int64_t output = 0; output < outputs(); ++output) {
      const Span& span = spans_[output];
      for (int64_t tap = span.tap_begin; tap < span.tap_end; ++tap) {
        readers[span.first + tap * dilation_].push_back({output, tap});
      }
    }
    return readers;
  }

 private:
  Span span_of(int64_t output, const AxisPatch& patch) const {
    const int64_t first = output * stride_ - padding_;
    const auto taps_below = [&](int64_t position) {  // number of taps at positions before it
      return std::clamp<int64_t>((position - first + dilation_ - 1) / dilation_, 0, kernel_);
    };
    const int64_t begin = patch.in_begin <= first ? 0 : taps_below(patch.in_begin);
    const int64_t end = patch.in_end <= first ? 0 : taps_below(patch.in_end);
    return {first, begin, end};
  }

  int64_t kernel_;
  int64_t stride_;
  int64_t padding_;
  int64_t dilation_;
  int64_t extent_;
  std::vector<Span> spans_;
  std::vector<int64_t> patch_of_;
  std::vector<AxisPatch> patches_;
};

}  // namespace splitkern::cpu
