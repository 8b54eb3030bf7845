"""Load the native library and register its operators with torch. No other module touches the library.

The library (csrc/, built by csrc/build.py) registers `torch.ops.detrs.*`. This module adds fake kernels, gradients and
autocast.
"""

from __future__ import annotations

import functools
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from detrs.ops.fixed_order import grad_value_in_fixed_order
from detrs.ops.reference import Shapes, sampling_locations, sampling_weights
from detrs.ops.sources import SUFFIX, digest_sources

LIBRARY = Path(__file__).with_name("_C.so")
# The autocast rules are unregistered when this object is deleted: keep it.
_library = torch.library.Library("detrs", "FRAGMENT")  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class NativeStatus:
    """The implementation that `deform_attn` uses on this machine.

    `devices` are the device types with native kernels; all others use the pure-torch reference. "cuda" is among them if
    the library was built with nvcc, whether or not this machine has a GPU. `instruction_set` is that of the CPU
    kernels: "avx512", "avx2" or "baseline". `reason` is a sentence to print. `oldest_gpu` is the compute capability
    from which on GPUs can run the kernels, (8, 0) unless it was built otherwise; None without kernels for GPUs.
    """

    devices: tuple[str, ...]
    instruction_set: str | None
    library: Path
    reason: str
    oldest_gpu: tuple[int, int] | None = None


def native_status() -> NativeStatus:
    """Return which implementation is active, and why. This is determined at import."""
    return _status


def _load() -> NativeStatus:
    """Load and register the library; warn once if that fails."""
    library = LIBRARY
    if not library.exists():
        library = find_installed(LIBRARY.parents[3] / "csrc", _installed_packages()) or LIBRARY
    try:
        torch.ops.load_library(library)  # type: ignore[no-untyped-call]
    except OSError as error:
        problem = f"does not load ({error})" if library.exists() else "does not exist"
        reason = f"{library} {problem}"
        warnings.warn(
            f"deformable attention runs in pure torch, several times slower: {reason}. To get the native"
            " operator, install a C++ compiler and run `pip install --no-build-isolation -e .` again.",
            RuntimeWarning,
            stacklevel=2,
        )
        return NativeStatus((), None, library, reason)
    _register()
    instruction_set, targets = torch.ops.detrs.instruction_set(), torch.ops.detrs.cuda_targets()
    if targets:
        reason = f"native kernels for {instruction_set}, and for GPUs: {targets}"
        # A GPU compiles the PTX of an older one
        oldest = min(int(target) for target in re.findall(r"compute_(\d+)", targets))
        return NativeStatus(("cpu", "cuda"), instruction_set, library, reason, (oldest // 10, oldest % 10))
    reason = f"native kernels for {instruction_set}; none for GPUs: {torch.ops.detrs.cuda_note()}"
    return NativeStatus(("cpu",), instruction_set, library, reason)


def find_installed(sources: Path, packages: Iterable[Path]) -> Path | None:
    """Return the library of the first of the packages whose library was built from these sources; None without one.

    A job that runs from the upload of a checkout has the sources, but no library; the cluster may have installed one.
    """
    if not sources.is_dir():
        return None
    wanted = digest_sources(sources)
    for package in packages:
        library = package / "ops" / LIBRARY.name
        record = library.with_suffix(SUFFIX)
        if library.is_file() and record.is_file() and record.read_text() == wanted:
            return library
    return None


def _installed_packages() -> Iterator[Path]:
    """Yield where this package may be installed: in the folders of sys.path, or where other finders look for it."""
    for folder in sys.path:
        yield Path(folder, "detrs")
    for finder in sys.meta_path:  # an editable install has one
        spec = finder.find_spec("detrs", None)
        if spec is not None:
            yield from map(Path, spec.submodule_search_locations or [])


def has_kernels(value: Tensor) -> bool:
    """Return whether native kernels support `value`, [N, S, M, D]. On CUDA, D must be a multiple of 4, at most 128."""
    if value.device.type not in _status.devices:
        return False
    if value.device.type != "cuda":
        return True
    num_channels = value.shape[3]
    return num_channels % 4 == 0 and num_channels <= 128 and supports_gpu(value.device.index)


def supports_gpu(index: int) -> bool:
    """Return whether the library has kernels for this GPU of the machine; warn once if it is too old."""
    return _is_new_enough(index)


# As torch.compiler.assume_constant_result marks it, which would import the compiler: a compiled graph calls it once
supports_gpu.__dict__["_dynamo_marked_constant"] = True


@functools.cache
def _is_new_enough(index: int) -> bool:
    oldest = _status.oldest_gpu
    if oldest is None or not torch.cuda.is_available():
        return oldest is not None  # fake tensors can be on a GPU that the machine does not have
    capability = torch.cuda.get_device_capability(index)
    if capability >= oldest:
        return True
    warnings.warn(
        f"deformable attention runs in pure torch, several times slower: {torch.cuda.get_device_name(index)} has"
        f" compute capability {capability[0]}.{capability[1]}, and the native kernels need"
        f" {oldest[0]}.{oldest[1]} or newer.",
        RuntimeWarning,
        stacklevel=3,
    )
    return False


def _register() -> None:
    """Register shapes, gradients and autocast rules of the operators."""
    torch.library.register_fake("detrs::deform_attn", _fake_forward)
    torch.library.register_fake("detrs::deform_attn_backward", _fake_backward)
    torch.library.register_autograd("detrs::deform_attn", _backward, setup_context=_save_for_backward)
    torch.library.register_autograd("detrs::deform_attn_backward", _double_backward)
    torch.library.register_fake("detrs::deform_attn_fused", _fake_fused_forward)
    torch.library.register_fake("detrs::deform_attn_fused_backward", _fake_fused_backward)
    torch.library.register_fake("detrs::normalize_images", _fake_normalize_images)
    torch.library.register_autograd(
        "detrs::deform_attn_fused", _fused_backward, setup_context=_save_for_fused_backward
    )
    torch.library.register_autograd("detrs::deform_attn_fused_backward", _double_backward)
    for device in ("CPU", "CUDA"):
        for name in ("deform_attn", "deform_attn_fused"):
            _library.impl(name, _under_autocast(name, f"Autocast{device}"), f"Autocast{device}")  # type: ignore[no-untyped-call]


def _fake_normalize_images(pixels: Tensor, sizes: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    return pixels.new_empty(pixels.shape, dtype=torch.float32)


def _under_autocast(name: str, key: str) -> Callable[..., Tensor]:
    """Return the autocast kernel of an operator: it keeps `value` and converts all other tensors to float32.

    Half precision is too coarse for locations, and torch.library.register_autocast would cast all tensors to one
    dtype.
    """
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def call(value: Tensor, shapes: list[int], *samples: Tensor) -> Tensor:
        dtype = torch.float64 if value.dtype == torch.float64 else torch.float32
        # Without the guard the call would dispatch to this function again.
        with torch._C._ExcludeDispatchKeyGuard(keys):
            out: Tensor = getattr(torch.ops.detrs, name)(
                value, shapes, *(tensor.to(dtype) for tensor in samples)
            )
        return out

    return call


def _fake_forward(value: Tensor, shapes: list[int], locations: Tensor, weights: Tensor) -> Tensor:
    return value.new_empty(value.shape[0], locations.shape[1], value.shape[2] * value.shape[3])


def _fake_backward(
    grad_out: Tensor, value: Tensor, shapes: list[int], locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        value.new_empty(value.shape),
        locations.new_empty(locations.shape),
        weights.new_empty(weights.shape),
    )


def _save_for_backward(ctx: Any, inputs: tuple[Tensor, list[int], Tensor, Tensor], output: Tensor) -> None:
    value, ctx.shapes, locations, weights = inputs
    ctx.save_for_backward(value, locations, weights)


def _backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, None, Tensor, Tensor]:
    value, locations, weights = ctx.saved_tensors
    grads = torch.ops.detrs.deform_attn_backward(grad_out, value, ctx.shapes, locations, weights)
    grad_value = grads[0]
    if _adds_in_any_order(value):
        grad_value = grad_value_in_fixed_order(grad_out, value, _pairs(ctx.shapes), locations, weights)
    return grad_value, None, grads[1], grads[2]


def _fake_fused_forward(
    value: Tensor, shapes: list[int], reference: Tensor, offsets: Tensor, logits: Tensor
) -> Tensor:
    return _fake_forward(value, shapes, offsets, logits)


def _fake_fused_backward(
    grad_out: Tensor,
    value: Tensor,
    shapes: list[int],
    reference: Tensor,
    offsets: Tensor,
    logits: Tensor,
    reference_needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    by_head = (*offsets.shape[:4], reference.shape[3]) if reference_needs_grad else (0,)
    grads = _fake_backward(grad_out, value, shapes, offsets, logits)
    return grads[0], reference.new_empty(by_head), grads[1], grads[2]


def _save_for_fused_backward(
    ctx: Any, inputs: tuple[Tensor, list[int], Tensor, Tensor, Tensor], output: Tensor
) -> None:
    value, ctx.shapes, reference, offsets, logits = inputs
    ctx.save_for_backward(value, reference, offsets, logits)


def _fused_backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, None, Tensor | None, Tensor, Tensor]:
    value, reference, offsets, logits = ctx.saved_tensors
    needed = ctx.needs_input_grad[2]
    grads = torch.ops.detrs.deform_attn_fused_backward(
        grad_out, value, ctx.shapes, reference, offsets, logits, needed
    )
    grad_value = grads[0]
    if _adds_in_any_order(value):
        shapes = _pairs(ctx.shapes)
        locations, weights = sampling_locations(shapes, reference, offsets), sampling_weights(logits)
        grad_value = grad_value_in_fixed_order(grad_out, value, shapes, locations, weights)
    return grad_value, None, grads[1].sum(2) if needed else None, grads[2], grads[3]


def _adds_in_any_order(value: Tensor) -> bool:
    """Return whether the kernel's gradient of `value` cannot be used, because torch is to be deterministic."""
    return value.device.type == "cuda" and torch.are_deterministic_algorithms_enabled()


def _pairs(sizes: list[int]) -> Shapes:
    return tuple(zip(sizes[::2], sizes[1::2], strict=True))


def _double_backward(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError("deform_attn has no second derivative; detrs.ops.deform_attn_reference has one")


_status = _load()
