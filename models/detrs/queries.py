"""Build the queries of the decoder: learned, or from the best tokens of the encoder."""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from detrs.encoder import token_centers
from detrs.layers import Mlp, full_precision, inverse_sigmoid, sine_encoding
from detrs.structures import FirstStage, Memory, Predictions, Queries

ProposalScore = Literal["first_class", "best_class"]
PointSource = Literal["predicted", "learned"]


class PositionQueries(nn.Module):
    """Learned positions; the content starts at zero (DETR).

    With `point`, every query has a reference point (Conditional DETR, section 3.3): "predicted" from its position, or
    "learned", as a parameter of its own.
    """

    def __init__(self, num_queries: int, hidden_dim: int, *, point: PointSource | None) -> None:
        super().__init__()
        self.embed = nn.Embedding(num_queries, hidden_dim)
        self.point = Mlp(hidden_dim, hidden_dim, 2) if point == "predicted" else None
        self.points = nn.Embedding(num_queries, 2) if point == "learned" else None

    def forward(self, memory: Memory) -> tuple[Queries, None]:
        """Return the same queries for every image."""
        pos, reference = self.embed.weight, None
        if self.point is not None:
            reference = full_precision(self.point(pos)).sigmoid()
        elif self.points is not None:
            reference = self.points.weight.sigmoid()
        pos = pos.expand(len(memory.tokens), -1, -1)
        if reference is not None:
            reference = reference.expand(len(pos), -1, -1)
        return Queries(torch.zeros_like(pos), pos, reference), None


class AnchorQueries(nn.Module):
    """Learned boxes (DAB-DETR, section 4.1), or points only; the content starts at zero.

    Args:
        num_queries: number of boxes.
        hidden_dim: width of a query.
        num_patterns: each box is combined with this many learned contents (Anchor DETR); 0: one content of zeros.
        random_points: initialize the centers uniformly over the image.
        fixed_points: do not train the centers (appendix H); requires random ones, and sides.
        sides: learn width and height too.
        learned_content: each box has a learned content, to which that of a pattern is added (DAB-Deformable-DETR).
    """

    points: Tensor

    def __init__(
        self,
        num_queries: int,
        hidden_dim: int,
        num_patterns: int,
        *,
        random_points: bool,
        fixed_points: bool = False,
        sides: bool = True,
        learned_content: bool = False,
    ) -> None:
        super().__init__()
        self.hidden_dim, self.fixed_points = hidden_dim, fixed_points
        self.anchors = nn.Embedding(num_queries, 4 if sides and not fixed_points else 2)
        self.content = nn.Embedding(num_queries, hidden_dim) if learned_content else None
        self.patterns = nn.Embedding(num_patterns, hidden_dim) if num_patterns else None
        if random_points:
            centers = inverse_sigmoid(torch.rand(num_queries, 2), 1e-3)
            if fixed_points:
                self.register_buffer("points", centers)
            else:
                self.anchors.weight.data[:, :2] = centers

    def forward(self, memory: Memory) -> tuple[Queries, None]:
        """Return the same queries for every image; all boxes of the first pattern come first."""
        boxes, num_anchors = self.anchors.weight, self.anchors.num_embeddings
        if self.fixed_points:
            boxes = torch.cat((self.points, boxes), dim=1)
        reference = boxes.sigmoid()
        content = reference.new_zeros(num_anchors, self.hidden_dim)
        if self.content is not None:
            content = self.content.weight
        if self.patterns is not None:
            num_patterns = self.patterns.num_embeddings
            content = content.repeat(num_patterns, 1)
            content = content + self.patterns.weight.repeat_interleave(num_anchors, dim=0)
            reference = reference.repeat(num_patterns, 1)
        content, reference = (x.expand(len(memory.tokens), -1, -1) for x in (content, reference))
        return Queries(content, reference=reference), None


class LearnedQueries(nn.Module):
    """Learned content and position; a reference point is predicted from the position (Deformable DETR)."""

    def __init__(self, num_queries: int, hidden_dim: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(num_queries, 2 * hidden_dim)
        self.point = nn.Linear(hidden_dim, 2)
        nn.init.xavier_uniform_(self.point.weight)
        nn.init.zeros_(self.point.bias)

    def forward(self, memory: Memory) -> tuple[Queries, None]:
        """Return the same queries for every image."""
        pos, content = self.embed.weight.chunk(2, dim=-1)
        reference = full_precision(self.point(pos)).sigmoid()
        pos, content, reference = (x.expand(len(memory.tokens), -1, -1) for x in (pos, content, reference))
        return Queries(content, pos, reference), None


class Proposals(nn.Module):
    """Score every token as an object and regress its box from a square prior around its center.

    Padded tokens, and tokens whose prior is not within (0.01, 0.99), have zero features and a prior at infinity.
    Source: Deformable DETR, A.4; details of the official code.
    """

    def __init__(self, hidden_dim: int, class_head: nn.Module, box_head: nn.Module, size: float) -> None:
        super().__init__()
        self.project, self.norm = nn.Linear(hidden_dim, hidden_dim), nn.LayerNorm(hidden_dim)
        nn.init.xavier_uniform_(self.project.weight)
        self.class_head, self.box_head, self.size = class_head, box_head, size

    def forward(
        self, memory: Memory
    ) -> tuple[
        Float[Tensor, "b s d"], Float[Tensor, "b s c"], Float[Tensor, "b s 4"], Float[Tensor, "b s 4"]
    ]:
        """Return features, class logits, box logits and prior logits of every token."""
        prior, usable = self._priors(memory)
        features = self.norm(self.project(memory.tokens.masked_fill(~usable[..., None], 0)))
        logits = self.class_head(features)
        return features, logits, full_precision(self.box_head(features)) + prior, prior

    def _priors(self, memory: Memory) -> tuple[Float[Tensor, "b s 4"], Bool[Tensor, "b s"]]:
        centers = token_centers(memory)
        sides = torch.cat([
            centers.new_full((height * width, 2), self.size * 2.0**level)
            for level, (height, width) in enumerate(memory.shapes)
        ])  # fmt: skip
        prior = torch.cat((centers, sides.expand_as(centers)), dim=-1)
        usable = ((prior > 0.01) & (prior < 0.99)).all(-1) & ~memory.key_padding_mask
        return torch.log(prior / (1 - prior)).masked_fill(~usable[..., None], math.inf), usable


class EncoderBoxes(nn.Module):
    """Boxes from the encoder's best tokens, and content that is learned: mixed query selection (DINO, section 3.4).

    Without `mixed`, the content is the features of the tokens, without gradient (pure query selection; official code).
    """

    def __init__(
        self, num_queries: int, hidden_dim: int, proposals: Proposals, *, mixed: bool = True
    ) -> None:
        super().__init__()
        self.proposals, self.num_queries = proposals, num_queries
        self.content = nn.Embedding(num_queries, hidden_dim) if mixed else None
        if self.content is not None:
            nn.init.xavier_uniform_(self.content.weight)

    def forward(self, memory: Memory) -> tuple[Queries, FirstStage]:
        """Return the queries, and the predictions of the encoder for the chosen tokens."""
        features, logits, boxes, prior = self.proposals(memory)
        chosen = _best(logits.amax(-1), self.num_queries)
        logits, boxes, prior = (_pick(x, chosen) for x in (logits, boxes, prior))
        if self.content is None:
            content = _pick(features, chosen).detach()
        else:
            content = self.content.weight.expand(len(logits), -1, -1)
        queries = Queries(content, reference=boxes.detach().sigmoid())
        return queries, FirstStage(Predictions(logits[None], boxes.sigmoid()[None]), prior.sigmoid())


class EncoderProposals(nn.Module):
    """Content and position computed from the best boxes of the encoder (two-stage Deformable DETR).

    The official code ranks tokens by the logit of class 0 ("first_class"), whatever that class is; "best_class" ranks
    them by the logit of their best class.
    """

    def __init__(self, num_queries: int, hidden_dim: int, proposals: Proposals, score: ProposalScore) -> None:
        super().__init__()
        self.proposals, self.num_queries, self.score = proposals, num_queries, score
        self.project = nn.Linear(2 * hidden_dim, 2 * hidden_dim)
        nn.init.xavier_uniform_(self.project.weight)
        self.norm = nn.LayerNorm(2 * hidden_dim)

    def forward(self, memory: Memory) -> tuple[Queries, FirstStage]:
        """Return the queries, and the predictions of the encoder for every token."""
        _, logits, boxes, prior = self.proposals(memory)
        ranking = logits[..., 0] if self.score == "first_class" else logits.amax(-1)
        reference = _pick(boxes, _best(ranking, self.num_queries)).detach().sigmoid()
        encoding = sine_encoding(reference, memory.tokens.shape[-1] // 2)
        pos, content = self.norm(self.project(encoding)).chunk(2, dim=-1)
        first = FirstStage(Predictions(logits[None], boxes.sigmoid()[None]), prior.sigmoid())
        return Queries(content, pos, reference), first


def _best(scores: Float[Tensor, "b s"], num_queries: int) -> Int64[Tensor, "b q"]:
    return scores.topk(num_queries, dim=1).indices


def _pick(x: Float[Tensor, "b s k"], chosen: Int64[Tensor, "b q"]) -> Float[Tensor, "b q k"]:
    return x.gather(1, chosen[..., None].expand(-1, -1, x.shape[-1]))
