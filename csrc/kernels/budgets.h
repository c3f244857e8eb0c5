// What each kernel may take: the one table of registers, shared memory and instructions. Kernels assert their shared
// storage against it; cmake/check_budgets.awk reads it as text and checks what ptxas reports at every compilation, and
// tests/test_static_gates.py checks that the table and the kernels name each other and that the code holds the
// instructions. One row per line; the first row whose kernel and target match counts.
#pragma once

#include <cstdint>
#include <string_view>

namespace splitkern::kernels {

struct KernelBudget {
  std::string_view kernel;        // function, with the path's namespace before it where there is one
  std::string_view target;        // "sm_90a", ... or "all"
  int32_t registers;              // per thread, over all instantiations
  int64_t shared_bytes;           // per block, static and dynamic
  std::string_view instructions;  // that its machine code must hold, with a space between
};

// clang-format off
inline constexpr KernelBudget kBudgets[] = {

    {"depthwise::depthwise_gather_kernel", "all", 160, 116224, ""},
    {"depthwise::depthwise_weight_grad_kernel", "all", 224, 8192, ""},
    {"depthwise::direct_weight_grad_reduce_kernel", "all", 32, 1024, ""},
    {"depthwise::grouped_gather_kernel", "all", 128, 116224, ""},
    {"depthwise::grouped_weight_grad_kernel", "all", 128, 16384, ""},

    {"first_layer::first_layer_forward_kernel", "all", 224, 232448, "HMMA"},
    {"first_layer::first_layer_input_grad_kernel", "all", 112, 232448, ""},
    {"first_layer::first_layer_weight_grad_kernel", "all", 248, 232448, "HMMA LDGSTS"},
    {"first_layer::first_layer_weight_grad_reduce_kernel", "all", 32, 1024, ""},

    {"nhwc::avg_pool_backward_cell_kernel", "all", 104, 0, ""},
    {"nhwc::avg_pool_backward_kernel", "all", 72, 0, ""},
    {"nhwc::avg_pool_kernel", "all", 72, 0, ""},
    {"nhwc::batch_norm_apply_kernel", "all", 72, 49152, ""},
    {"nhwc::batch_norm_backward_apply_kernel", "all", 120, 49152, ""},
    {"nhwc::batch_norm_backward_reduce_kernel", "all", 112, 49152, ""},
    {"nhwc::batch_norm_backward_reduce_merge_kernel", "all", 64, 49152, ""},
    {"nhwc::batch_norm_stats_kernel", "all", 80, 49152, ""},
    {"nhwc::batch_norm_stats_merge_kernel", "all", 80, 49152, ""},
    {"nhwc::max_pool_backward_cell_kernel", "all", 80, 0, ""},
    {"nhwc::max_pool_backward_kernel", "all", 80, 0, ""},
    {"nhwc::max_pool_gather_kernel", "all", 48, 0, ""},
    {"nhwc::max_pool_kernel", "all", 80, 0, ""},
    {"nhwc::max_pool_square_kernel", "all", 80, 0, ""},

    {"sm80::gather_kernel", "all", 255, 49152, "HMMA LDGSTS LDSM"},
    {"sm80::repack_kernel", "all", 40, 8192, ""},
    {"sm80::weight_grad_kernel", "all", 255, 57344, "HMMA LDGSTS"},
    {"sm80::weight_grad_reduce_kernel", "all", 48, 4096, ""},

    {"sm90::conv_gemm_kernel", "sm_90a", 168, 232448, "HGMMA UTMALDG UTMASTG"},
    {"sm90::conv_weight_grad_kernel", "sm_90a", 168, 232448, "HGMMA UTMALDG"},
    {"sm90::pack_weights_kernel", "sm_90a", 40, 49152, ""},
    {"sm90::partial_sums_kernel", "sm_90a", 80, 4096, ""},
    {"sm90::resident_window_kernel", "sm_90a", 168, 232448, "HGMMA UTMALDG UTMASTG"},
    {"sm90::window_kernel", "sm_90a", 168, 232448, "HGMMA UTMALDG UTMASTG"},
    {"sm90::window_weight_grad_kernel", "sm_90a", 128, 232448, "HGMMA UTMALDG"},
    {"sm90::weight_grad_reduce_kernel", "sm_90a", 64, 49152, ""},

    {"avg_pool_backward_kernel", "all", 80, 0, ""},
    {"avg_pool_kernel", "all", 64, 0, ""},
    {"batch_norm_apply_kernel", "all", 40, 0, ""},
    {"batch_norm_backward_apply_kernel", "all", 56, 0, ""},
    {"batch_norm_backward_reduce_kernel", "all", 72, 0, ""},
    {"batch_norm_backward_reduce_merge_kernel", "all", 40, 0, ""},
    {"batch_norm_stats_kernel", "all", 64, 0, ""},
    {"batch_norm_stats_merge_kernel", "all", 64, 0, ""},
    {"compress_kernel", "all", 80, 73728, ""},
    {"conv_forward_kernel", "all", 72, 0, ""},
    {"conv_input_grad_kernel", "all", 64, 0, ""},
    {"conv_weight_grad_kernel", "all", 56, 0, ""},
    {"conv_weight_grad_reduce_kernel", "all", 48, 0, ""},
    {"copy_kernel", "all", 56, 0, ""},
    {"decompress_kernel", "all", 80, 73728, ""},
    {"max_pool_backward_kernel", "all", 72, 0, ""},
    {"max_pool_gather_kernel", "all", 48, 0, ""},
    {"max_pool_kernel", "all", 56, 0, ""},
    {"staged_copy_kernel", "all", 56, 65536, ""},
};
// clang-format on

// For static_assert(sizeof(Storage) <= shared_budget("path::kernel")); a kernel without a row does not compile.
consteval int64_t shared_budget(std::string_view kernel) {
  for (const KernelBudget& budget : kBudgets) {
    if (budget.kernel == kernel) return budget.shared_bytes;
  }
  throw "the kernel has no row in kBudgets";
}

}  // namespace splitkern::kernels
