// Which kernels a convolution, a pooling or a batch norm would take, from plain numbers: no tensor and no device.
// `splitkern doctor
// --explain` calls it through ctypes; splitkern/cli/explain.py has the twins of the structs.
#pragma once

#include <cstdint>

extern "C" {

// Sizes as the operators have them: N, C, H, W; a weight: O, C / groups, rows, columns. Tensors are dense, in the
// format that channels_last tells; the gradient of the weight is contiguous, as the operator allocates it.
struct SplitkernConvQuestion {
  int32_t pass;  // 0 forward, 1 input gradient, 2 weight gradient
  int32_t type;  // of kernels::ElementType
  int32_t channels_last;
  int32_t allow_tf32;
  int32_t compute_capability;  // 10 * major + minor
  int32_t multiprocessors;
  int64_t shared_memory_bytes;  // that one block may opt in to
  int64_t groups;
  int64_t input_size[4];
  int64_t weight_size[4];
  int64_t stride[2];
  int64_t padding[2];
  int64_t dilation[2];
  int64_t row_patches;
  int64_t column_patches;
  const int64_t* in_rows;  // row_patches + 1 boundaries each, valid ones
  const int64_t* out_rows;
  const int64_t* in_columns;
  const int64_t* out_columns;
};

struct SplitkernLayerQuestion {
  int32_t operation;  // 0 max pooling, 1 average pooling, 2 batch norm (the window is then not looked at)
  int32_t pass;       // 0 forward, 1 backward; of batch norm 0 statistics, 1 apply, 2 backward sums, 3 backward apply
  int32_t type;       // of kernels::ElementType
  int32_t channels_last;
  int64_t input_size[4];
  int64_t kernel[2];
  int64_t stride[2];
  int64_t padding[2];
  int64_t dilation[2];
  int64_t row_patches;
  int64_t column_patches;
  const int64_t* in_rows;
  const int64_t* out_rows;
  const int64_t* in_columns;
  const int64_t* out_columns;
};

// Both write "path\nworkspace bytes\nreason" and return 0, or write what is wrong with the question and return 1.
// The text is cut to `size_bytes`, its terminating zero included.
__attribute__((visibility("default"))) int splitkern_explain_conv2d(const SplitkernConvQuestion* question, char* text,
                                                                    int64_t size_bytes);

__attribute__((visibility("default"))) int splitkern_explain_layer(const SplitkernLayerQuestion* question, char* text,
                                                                   int64_t size_bytes);

}  // extern "C"
