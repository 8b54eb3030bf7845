"""Build denoising queries: noised targets whose assignment is known (DN-DETR; contrastive: DINO, section 3.3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from detrs.boxes import to_cxcywh, to_xyxy
from detrs.layers import inverse_sigmoid
from detrs.structures import Queries, Targets

GroupRule = Literal["official", "fill", "fixed"]
BoxNoise = Literal["corners", "center_and_size"]


@dataclass(frozen=True)
class Draws:
    """Random numbers of one call. The `r` rows are the targets, repeated for each block of each group."""

    label_chance: Float[Tensor, " r"]  # in [0, 1): the label is replaced if it is below half of label_noise
    new_labels: Int64[Tensor, " k"]  # for the `k` replaced rows, in order
    signs: Float[Tensor, "r 4"]  # 0 or 1: the direction in which a coordinate moves
    fractions: Float[Tensor, "r 4"]  # in [0, 1): of the largest move

    def to(self, device: torch.device) -> Draws:
        """Return the draws on a device."""
        return Draws(
            self.label_chance.to(device),
            self.new_labels.to(device),
            self.signs.to(device),
            self.fractions.to(device),
        )


@dataclass(frozen=True)
class NoisedQueries:
    """Denoising queries in `num_groups` groups of `num_blocks` blocks: positives and, if there are two, negatives.

    A block has `max_targets` queries, the number of targets of the image with the most. Those of image i after the
    first `counts[i]` are padding. `labels` are those of the rows, with noise.
    """

    content: Float[Tensor, "b p d"]
    reference: Float[Tensor, "b p 4"]
    labels: Int64[Tensor, " r"]
    num_groups: int
    num_blocks: int
    max_targets: int

    @property
    def group_size(self) -> int:
        """Number of queries of a group."""
        return self.num_blocks * self.max_targets

    @property
    def num_queries(self) -> int:
        """Number of denoising queries per image, `p`."""
        return self.num_groups * self.group_size


class Denoising(nn.Module):
    """Turn targets into denoising queries.

    Args:
        num_classes: labels are drawn from [0, num_classes).
        hidden_dim: width of a query.
        num_denoising: desired number of positive queries per image.
        label_noise: twice the probability that a label is replaced by a random one.
        box_noise: largest move of a corner, as a fraction of half the box; negatives move up to twice as far.
        group_rule: "fill": the largest number of groups that fits into `num_denoising`, at least one. "official": the
            same, but if `num_denoising` < 50, then 2 * num_denoising groups, for any number of targets. "fixed":
            `num_denoising` groups, for any number of targets (the `scalar` of DN-DETR).
        contrastive: add a negative query to every positive one: a box with more noise, to be rejected. Without, there
            are only positives, as in DN-DETR.
        box_noise_kind: what moves. "corners": both corners, each coordinate on its own (DINO). "center_and_size": the
            center by at most `box_noise` times half a side, width and height by at most `box_noise` times themselves
            (DN-DETR, section 4.2); only without negatives.
    """

    def __init__(
        self,
        num_classes: int,
        hidden_dim: int,
        *,
        num_denoising: int,
        label_noise: float,
        box_noise: float,
        group_rule: GroupRule,
        contrastive: bool = True,
        box_noise_kind: BoxNoise = "corners",
    ) -> None:
        super().__init__()
        assert box_noise_kind == "corners" or not contrastive
        self.num_blocks = 2 if contrastive else 1  # of a group
        self.num_classes, self.num_denoising, self.group_rule = num_classes, num_denoising, group_rule
        self.label_noise, self.box_noise, self.box_noise_kind = label_noise, box_noise, box_noise_kind
        # The last row is unused, as in the official code
        self.label_embed = nn.Embedding(num_classes + 1, hidden_dim)

    def num_groups(self, max_targets: int) -> int:
        """Return the number of groups of a batch with at most `max_targets` targets per image."""
        if max_targets == 0:
            return 1
        if self.group_rule == "fixed":
            return self.num_denoising
        if self.group_rule == "official" and self.num_denoising < 50:
            return max(2 * self.num_denoising, 1)
        return max(self.num_denoising // max_targets, 1)

    def forward(
        self, targets: Targets, draws: Draws | None = None, max_targets: int | None = None
    ) -> NoisedQueries:
        """Add noise to the targets; use the random numbers in `draws` if given.

        `max_targets` is the number of targets of the image with the most in the global batch, of which `targets` may be
        a part: the number of groups and of queries follows from it. None: that of `targets`.
        """
        max_targets = max(targets.counts, default=0) if max_targets is None else max_targets
        num_groups = self.num_groups(max_targets)
        num_blocks = self.num_blocks * num_groups
        labels, boxes = targets.labels.repeat(num_blocks), targets.boxes.repeat(num_blocks, 1)
        block = torch.arange(len(labels), device=labels.device) // max(len(targets.labels), 1)
        negative = block % self.num_blocks == 1
        if draws is None:
            draws = self.draw(labels)
        labels = self._noise_labels(labels, draws)
        boxes = self._noise_boxes(boxes, negative, draws)
        shape = (len(targets.counts), num_blocks * max_targets)
        image, query = _query_indices(targets, num_blocks, max_targets)
        embedded = self.label_embed(labels)
        # Padding has box logits of 0, as in the official code: boxes of 0.5
        content = embedded.new_zeros(*shape, embedded.shape[-1]).index_put((image, query), embedded)
        reference = boxes.new_full((*shape, 4), 0.5)
        reference = reference.index_put((image, query), inverse_sigmoid(boxes, 1e-3).sigmoid())
        return NoisedQueries(content, reference, labels, num_groups, self.num_blocks, max_targets)

    def draw(self, labels: Int64[Tensor, " r"]) -> Draws:
        """Draw random numbers in the order and precision (float32) of the official code; none for noise that is off."""
        device, num_rows = labels.device, len(labels)
        label_chance = torch.ones(num_rows, device=device)
        new_labels = torch.zeros(0, dtype=torch.int64, device=device)
        signs = fractions = torch.zeros(num_rows, 4, device=device)
        if self.label_noise > 0:
            label_chance = torch.rand(num_rows, device=device)
            num_replaced = int((label_chance < self.label_noise * 0.5).sum())
            new_labels = torch.randint(0, self.num_classes, (num_replaced,), device=device)
        if self.box_noise > 0:
            signs = torch.randint(0, 2, (num_rows, 4), device=device).float()
            fractions = torch.rand(num_rows, 4, device=device)
        return Draws(label_chance, new_labels, signs, fractions)

    def draw_by_image(self, counts: Sequence[int], max_targets: int, seeds: Sequence[int]) -> Draws:
        """Draw random numbers for each image from a generator with its own seed, on the CPU.

        The draws of an image depend on neither the other images of the batch nor its place among them.

        Args:
            counts: number of targets of each image.
            max_targets: as in `forward`.
            seeds: one per image.
        """
        num_blocks = self.num_blocks * self.num_groups(max_targets)
        chances, labels, signs, fractions = [], [], [], []
        for count, seed in zip(counts, seeds, strict=True):
            generator = torch.Generator().manual_seed(seed)
            shape = (num_blocks, count)
            chances.append(torch.rand(shape, generator=generator))
            labels.append(torch.randint(0, self.num_classes, shape, generator=generator))
            signs.append(torch.randint(0, 2, (*shape, 4), generator=generator).float())
            fractions.append(torch.rand((*shape, 4), generator=generator))
        # Rows are ordered by block, then by image
        chance, label = (torch.cat(parts, dim=1).flatten() for parts in (chances, labels))
        sign, fraction = (torch.cat(parts, dim=1).flatten(0, 1) for parts in (signs, fractions))
        return Draws(chance, label[chance < self.label_noise * 0.5], sign, fraction)

    def _noise_labels(self, labels: Int64[Tensor, " r"], draws: Draws) -> Int64[Tensor, " r"]:
        replaced = draws.label_chance < self.label_noise * 0.5
        return labels.masked_scatter(replaced, draws.new_labels)

    def _noise_boxes(
        self, boxes: Float[Tensor, "r 4"], negative: Bool[Tensor, " r"], draws: Draws
    ) -> Float[Tensor, "r 4"]:
        fractions = draws.fractions.to(boxes.dtype) + negative[:, None]
        moves = (2 * draws.signs.to(boxes.dtype) - 1) * fractions * self.box_noise
        sides = boxes[:, 2:]
        if self.box_noise_kind == "center_and_size":
            return (boxes + moves * torch.cat((sides / 2, sides), dim=1)).clamp(min=0, max=1)
        return to_cxcywh((to_xyxy(boxes) + moves * (sides / 2).repeat(1, 2)).clamp(min=0, max=1))


def prepend(noised: NoisedQueries, queries: Queries) -> Queries:
    """Prepend denoising queries to the matching queries, and mask attention between them.

    Denoising queries hold the targets: matching queries must not attend to them, nor groups to each other.
    """
    assert queries.reference is not None
    content = torch.cat((noised.content, queries.content), dim=1)
    reference = torch.cat((noised.reference, queries.reference), dim=1)
    has_any = noised.num_queries > 0
    attn_mask = denoising_attn_mask(noised, queries.content.shape[1], content.device) if has_any else None
    return Queries(content, reference=reference, attn_mask=attn_mask)


def denoising_attn_mask(noised: NoisedQueries, num_queries: int, device: torch.device) -> Bool[Tensor, "q q"]:
    """Return a mask that is True where query i must not attend to query j; denoising queries come first.

    Args:
        noised: the denoising queries.
        num_queries: number of matching queries.
        device: of the mask.
    """
    size = noised.num_queries + num_queries
    group = torch.arange(size, device=device) // max(noised.group_size, 1)
    matching = torch.arange(size, device=device) >= noised.num_queries
    other_group = (group[:, None] != group) | matching[:, None]
    return other_group & ~matching


def _query_indices(
    targets: Targets, num_blocks: int, max_targets: int
) -> tuple[Int64[Tensor, " r"], Int64[Tensor, " r"]]:
    """Return the image and the query of each row."""
    image, index = targets.indices()
    starts = torch.arange(num_blocks, device=index.device) * max_targets
    return image.repeat(num_blocks), (starts[:, None] + index).flatten()
