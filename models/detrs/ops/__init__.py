"""Compute multi-scale deformable attention in two forms, each with a native and a pure-torch implementation.

`deform_attn` takes locations and weights; `deform_attn_fused` takes the outputs of the network, and is faster. Both
check their arguments and use the native kernels if available. The functions that end in `_reference` define them;
`native_status` reports which implementation is active and why.
"""

from detrs.ops.deform_attn import deform_attn, deform_attn_fused, deform_attn_unfused
from detrs.ops.native import NativeStatus, native_status
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
    "sampling_locations",
    "sampling_weights",
]
