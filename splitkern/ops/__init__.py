"""Typed wrappers of the operators ``torch.ops.splitkern.*``, one file per family.

Importing this package registers what PyTorch needs beside the native implementations: shape rules for
tracing, gradient formulas, autocast rules, and the refusal of ``.out`` where gradients are recorded.
"""

from splitkern.ops.avg_pool import patch_avg_pool2d, patch_avg_pool2d_backward
from splitkern.ops.batch_norm import (
    BatchNormResult,
    patch_batch_norm,
    patch_batch_norm_apply,
    patch_batch_norm_backward_apply,
    patch_batch_norm_backward_reduce,
    patch_batch_norm_stats,
)
from splitkern.ops.conv import patch_conv2d, patch_conv2d_input_grad, patch_conv2d_weight_grad
from splitkern.ops.copy import (
    bytes_on_link,
    compressed_bytes,
    explain_copy,
    offload,
    offload_compressed,
    prefetch,
    prefetch_compressed,
)
from splitkern.ops.max_pool import (
    patch_max_pool2d,
    patch_max_pool2d_backward,
    patch_max_pool2d_gather,
)

__all__ = [
    "BatchNormResult",
    "bytes_on_link",
    "compressed_bytes",
    "explain_copy",
    "offload",
    "offload_compressed",
    "patch_avg_pool2d",
    "patch_avg_pool2d_backward",
    "patch_batch_norm",
    "patch_batch_norm_apply",
    "patch_batch_norm_backward_apply",
    "patch_batch_norm_backward_reduce",
    "patch_batch_norm_stats",
    "patch_conv2d",
    "patch_conv2d_input_grad",
    "patch_conv2d_weight_grad",
    "patch_max_pool2d",
    "patch_max_pool2d_backward",
    "patch_max_pool2d_gather",
    "prefetch",
    "prefetch_compressed",
]
