"""Multi-scale deformable attention: one function, a native path and a pure-torch path.

`deform_attn` checks its arguments and takes the native path where there is one; `deform_attn_reference` is
the definition; `native_status` tells which path is active and why.
"""

from detrs.ops.deform_attn import deform_attn
from detrs.ops.native import NativeStatus, native_status
from detrs.ops.reference import deform_attn_reference

__all__ = ["NativeStatus", "deform_attn", "deform_attn_reference", "native_status"]
