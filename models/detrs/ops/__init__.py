"""Multi-scale deformable attention in two forms, each with a native path and a pure-torch path.

`deform_attn` takes locations and weights; `deform_attn_fused` takes what a network predicts, and is faster. Both
check their arguments and take the native path where there is one. The functions in `_reference` are their
definitions; `native_status` tells which path is active and why.
"""

from detrs.ops.deform_attn import deform_attn, deform_attn_fused, deform_attn_in_steps
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
    "deform_attn_in_steps",
    "deform_attn_reference",
    "native_status",
    "sampling_locations",
    "sampling_weights",
]
