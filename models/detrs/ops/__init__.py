"""Compute multi-scale deformable attention, and normalize images, by native kernels or in pure torch.

`deform_attn` takes locations and weights; `deform_attn_fused` takes the outputs of the network, and is faster. Both
check their arguments. All use the native kernels if available. The functions that end in `_reference` define them;
`native_status` reports which implementation is active and why.
"""

from detrs.ops.deform_attn import deform_attn, deform_attn_fused, deform_attn_unfused
from detrs.ops.native import NativeStatus, native_status
from detrs.ops.normalize import normalize_images, normalize_images_reference, padding_mask
from detrs.ops.reference import (
    deform_attn_fused_reference,
    deform_attn_reference,
    sampling_locations,
    sampling_weights,
)

__all__ = [
    "NativeStatus",
    "deform_attn",
    "deform_attn_fused",
    "deform_attn_fused_reference",
    "deform_attn_reference",
    "deform_attn_unfused",
    "native_status",
    "normalize_images",
    "normalize_images_reference",
    "padding_mask",
    "sampling_locations",
    "sampling_weights",
]
