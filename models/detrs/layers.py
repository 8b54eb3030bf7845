"""Provide small building blocks: MLPs, prediction heads, sine encodings, the inverse sigmoid."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# Class bias with which all initial scores are 0.01 (RetinaNet, 4.1)
PRIOR_LOGIT = -math.log((1 - 0.01) / 0.01)


class Mlp(nn.Module):
    """Linear layers of the given widths with ReLU between them."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))

    def forward(self, x: Float[Tensor, "*n i"]) -> Float[Tensor, "*n o"]:
        """Map the last dimension from the first width to the last."""
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        out: Tensor = self.layers[-1](x)
        return out


def call_layer(layer: nn.Module, *inputs: Any, recompute: bool) -> Any:
    """Call a layer; with `recompute`, do not keep its activations, but compute them again in the backward pass."""
    if not recompute or not torch.is_grad_enabled():
        return layer(*inputs)
    return checkpoint(layer, *inputs, use_reentrant=False)


class FeedForward(nn.Module):
    """The two linear layers of a transformer layer, without the residual."""

    def __init__(self, hidden_dim: int, ffn_dim: int, dropout: float, activation: nn.Module) -> None:
        super().__init__()
        self.linear1, self.linear2 = nn.Linear(hidden_dim, ffn_dim), nn.Linear(ffn_dim, hidden_dim)
        self.activation, self.dropout = activation, nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
        """Project to `ffn_dim`, activate, project back."""
        out: Tensor = self.linear2(self.dropout(self.activation(self.linear1(x))))
        return out


def class_head(hidden_dim: int, num_classes: int) -> nn.Linear:
    """Return a linear classifier whose initial sigmoid scores are 0.01."""
    head = nn.Linear(hidden_dim, num_classes)
    nn.init.constant_(head.bias, PRIOR_LOGIT)
    return head


def box_head(hidden_dim: int, size_bias: float = 0.0) -> Mlp:
    """Return a box regressor whose initial deltas are 0, and `size_bias` for width and height."""
    head = Mlp(hidden_dim, hidden_dim, hidden_dim, 4)
    last = head.layers[-1]
    assert isinstance(last, nn.Linear)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    last.bias.data[2:] = size_bias
    return head


def xavier_(module: nn.Module) -> None:
    """Initialize every parameter of more than one dimension with `xavier_uniform_`, as all five papers do."""
    for parameter in module.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)


def full_precision(x: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """Convert half precision to float32; return float32 and float64 unchanged. For boxes and losses."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def inverse_sigmoid(x: Float[Tensor, "*n"], eps: float) -> Float[Tensor, "*n"]:
    """Return the logit of x. Clamp x and 1 - x to at least `eps`, which differs between the papers."""
    x = x.clamp(min=0, max=1)
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))


def sine_encoding(
    coordinates: Float[Tensor, "*n k"], dim: int, temperature: float = 10000.0
) -> Float[Tensor, "*n e"]:
    """Return `dim` features per coordinate (in [0, 1]): sine and cosine alternating, in the order of the coordinates.

    Source: DETR, A.4; the frequencies are `temperature ** (2i / dim)`, the scale is 2 pi.
    """
    # Not cached: torch.export would leave a tensor without numbers in the cache
    powers = torch.arange(dim // 2, dtype=coordinates.dtype, device=coordinates.device) * 2 / dim
    frequencies = temperature**powers
    angles = coordinates[..., None] * (2 * math.pi) / frequencies
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-3)


def image_encoding(
    padding_mask: Bool[Tensor, "b h w"],
    dim: int,
    temperatures: tuple[float, float],
    offset: float,
    dtype: torch.dtype,
) -> Float[Tensor, "b h w e"]:
    """Return the sine encoding (y, then x; `dim` features each) of the position of every pixel in the unpadded image.

    The position is the number of the pixel, counted from 1 and shifted by `offset`, divided by the number of unpadded
    pixels. `temperatures` are those of y and x.
    """
    inside = ~padding_mask
    y, x = inside.cumsum(1).to(dtype), inside.cumsum(2).to(dtype)  # of integers: deterministic on a GPU, too
    y = (y + offset) / (y[:, -1:, :] + 1e-6)
    x = (x + offset) / (x[:, :, -1:] + 1e-6)
    encodings = [sine_encoding(z[..., None], dim, t) for z, t in zip((y, x), temperatures, strict=True)]
    return torch.cat(encodings, dim=-1)
