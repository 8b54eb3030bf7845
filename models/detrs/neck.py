"""Build the memory from backbone features: project each level, encode positions and levels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from detrs.layers import image_encoding
from detrs.structures import Memory

MAX_LEARNED_SIDE = 50  # of the official code: 1600 pixels at stride 32


@dataclass(frozen=True)
class PositionEncoding:
    """Settings of the sine encoding of a token's position; see `detrs.layers.image_encoding`."""

    temperature: float = 10000.0
    offset: float = 0.0
    temperature_y: float | None = None  # of the vertical axis; None: the same


class LearnedEncoding(nn.Module):
    """A learned vector per column and one per row of the feature map: the halves of a token's position encoding.

    Source: DETR's official code (`position_embedding=learned`). The padding of an image has no influence on them.
    """

    def __init__(self, hidden_dim: int) -> None:
        super().__init__()
        self.columns = nn.Embedding(MAX_LEARNED_SIDE, hidden_dim // 2)
        self.rows = nn.Embedding(MAX_LEARNED_SIDE, hidden_dim // 2)
        nn.init.uniform_(self.columns.weight)
        nn.init.uniform_(self.rows.weight)

    def forward(self, height: int, width: int) -> Float[Tensor, "h w d"]:
        """Return the encoding of a feature map of this size.

        Raises:
            ValueError: it has more rows or columns than there are vectors.
        """
        if max(height, width) > MAX_LEARNED_SIDE:
            raise ValueError(
                f"model.position_encoding: 'learned' has vectors for {MAX_LEARNED_SIDE} rows and columns, and this "
                f"feature map is {width} wide and {height} high: use smaller images, or 'sine'"
            )
        rows = self.rows.weight[:height, None].expand(-1, width, -1)
        columns = self.columns.weight[:width].expand(height, -1, -1)
        return torch.cat((columns, rows), dim=-1)


class Neck(nn.Module):
    """Project feature levels to one width and flatten them into a Memory.

    Args:
        widths: channels of the backbone levels used, finest first.
        hidden_dim: channels of a token.
        num_levels: levels of the memory. Levels beyond those of the backbone are strided 3x3 convolutions: the first
            of the last backbone feature, each further one of the level before it.
        position: the sine encoding, or a learned one; None: zeros, for models without an encoder.
        group_norm: normalize the projections (Deformable DETR, DINO).
        level_embed: add a learned vector per level to the position. Only an encoder uses it.
    """

    def __init__(
        self,
        widths: Sequence[int],
        hidden_dim: int,
        num_levels: int,
        position: PositionEncoding | LearnedEncoding | None,
        *,
        group_norm: bool,
        level_embed: bool,
    ) -> None:
        super().__init__()
        if num_levels < len(widths):
            raise ValueError(
                f"model.num_feature_levels: {num_levels} is less than the {len(widths)} of model.strides"
            )
        self.position, self.hidden_dim, self.num_backbone_levels = position, hidden_dim, len(widths)
        self.num_levels = num_levels
        convolutions = [nn.Conv2d(width, hidden_dim, 1) for width in widths]
        for extra in range(num_levels - len(widths)):
            convolutions.append(nn.Conv2d(hidden_dim if extra else widths[-1], hidden_dim, 3, 2, 1))
        self.projections = nn.ModuleList(
            nn.Sequential(conv, nn.GroupNorm(min(32, hidden_dim // 2), hidden_dim)) if group_norm else conv
            for conv in convolutions
        )
        if group_norm:
            for conv in convolutions:
                nn.init.xavier_uniform_(conv.weight)
                assert conv.bias is not None
                nn.init.zeros_(conv.bias)
        self.level_embed = nn.Parameter(torch.randn(num_levels, hidden_dim)) if level_embed else None

    def forward(self, features: Sequence[Tensor], padding_mask: Bool[Tensor, "b h w"]) -> Memory:
        """Build the memory from the backbone levels ([b, width, h, w] each) and the padding of the images."""
        levels = self._project(features)
        masks = [_resize(padding_mask, level) for level in levels]
        dtype = next(self.projections.parameters()).dtype  # the model's, also under autocast
        valid_ratios = torch.stack([_valid_ratio(mask, dtype) for mask in masks], dim=1)
        return Memory(
            tokens=torch.cat([level.flatten(2).transpose(1, 2) for level in levels], dim=1),
            pos=torch.cat([self._encode(i, mask, dtype) for i, mask in enumerate(masks)], dim=1),
            key_padding_mask=torch.cat([mask.flatten(1) for mask in masks], dim=1),
            shapes=tuple((level.shape[2], level.shape[3]) for level in levels),
            valid_ratios=valid_ratios,
        )

    def _project(self, features: Sequence[Tensor]) -> list[Tensor]:
        levels: list[Tensor] = []
        for i, projection in enumerate(self.projections):
            if i < self.num_backbone_levels:
                source = features[i]
            else:
                source = features[-1] if i == self.num_backbone_levels else levels[-1]
            levels.append(projection(source))
        return levels

    def _encode(self, level: int, mask: Bool[Tensor, "b h w"], dtype: torch.dtype) -> Float[Tensor, "b s d"]:
        if self.position is None:
            return torch.zeros(1, dtype=dtype, device=mask.device).expand(
                *mask.flatten(1).shape, self.hidden_dim
            )
        if isinstance(self.position, LearnedEncoding):
            learned: Tensor = self.position(*mask.shape[1:])
            return learned.flatten(0, 1).expand(len(mask), -1, -1)
        x, y = self.position.temperature, self.position.temperature_y
        temperatures = (x if y is None else y, x)
        pos = image_encoding(mask, self.hidden_dim // 2, temperatures, self.position.offset, dtype)
        pos = pos.flatten(1, 2)
        return pos if self.level_embed is None else pos + self.level_embed[level]


def _resize(
    padding_mask: Bool[Tensor, "b h w"], level: Float[Tensor, "b c h2 w2"]
) -> Bool[Tensor, "b h2 w2"]:
    # Nearest neighbor with floor(i * ratio) in float32, as in the official code
    resized = F.interpolate(padding_mask[:, None].float(), size=level.shape[-2:])
    return resized[:, 0].to(torch.bool)


def _valid_ratio(mask: Bool[Tensor, "b h w"], dtype: torch.dtype) -> Float[Tensor, "b 2"]:
    height, width = mask.shape[1:]
    inside = (~mask).to(dtype)
    return torch.stack((inside[:, 0, :].sum(1) / width, inside[:, :, 0].sum(1) / height), dim=-1)
