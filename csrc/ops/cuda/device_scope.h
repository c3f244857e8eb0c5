// Makes the device of a tensor current for the length of an operator body and knows the stream to
// launch on. Built first in every body of this folder; not kept across calls.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "kernels/launchers.h"

namespace splitkern::cuda {

class DeviceScope {
 public:
  explicit DeviceScope(const torch::stable::Tensor& tensor);

  cudaStream_t stream() const { return stream_; }

 private:
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
  cudaStream_t stream_ = nullptr;
};

}  // namespace splitkern::cuda
