"""Record what the queries of a detector look at: attention, references, proposals, denoising queries.

Forward hooks get the inputs of the attention modules, and compute the weights from them with the modules' own
projections. So the modules return what they always return, and training has no second path.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from detrs.attention import ConditionalAttention, DeformableAttention, DenseInputs, SampledInputs, split_heads
from detrs.denoising import Draws, NoisedQueries
from detrs.detector import Detector
from detrs.ops import sampling_locations, sampling_weights
from detrs.queries import EncoderProposals
from detrs.structures import Images, Memory, Outputs, Predictions, Queries, Targets

Call = tuple[tuple[Any, ...], Any]  # the arguments of a module, and its output


@dataclass(frozen=True)
class DenseWeights:
    """Attention of every query to every token, per head; each row of each head sums up to 1.

    Conditional attention adds a content and a spatial part before the softmax. `content` and `spatial` are the softmax
    of one part alone, as in the figures of Conditional DETR; None for other modules.
    """

    combined: Float[Tensor, "b m q s"]
    content: Float[Tensor, "b m q s"] | None = None
    spatial: Float[Tensor, "b m q s"] | None = None


@dataclass(frozen=True)
class SampledPoints:
    """The points that deformable attention samples on each level; the weights of a query and head sum up to 1."""

    locations: Float[Tensor, "b q m l p 2"]  # (x, y), relative to the image without its padding
    weights: Float[Tensor, "b q m l p"]


@dataclass(frozen=True)
class LayerRecord:
    """A decoder layer: where its cross-attention is centered, what it attends to, what it predicts."""

    reference: Float[Tensor, "b q k"] | None  # point or box; None: the model has none (DETR)
    attention: DenseWeights | SampledPoints
    boxes: Float[Tensor, "b q 4"]


@dataclass(frozen=True)
class ProposalRecord:
    """The encoder's proposals that became queries, best first."""

    scores: Float[Tensor, "b q"]  # sigmoid of the logit that ranks them
    boxes: Float[Tensor, "b q 4"]
    priors: Float[Tensor, "b q 4"]  # the boxes before regression: squares around the tokens
    levels: Int64[Tensor, "b q"]  # of the tokens; 0 is the finest


@dataclass(frozen=True)
class Explanation:
    """What the parts of a detector did with a batch."""

    outputs: Outputs
    shapes: tuple[tuple[int, int], ...]  # (height, width) of each level of the memory
    layers: tuple[LayerRecord, ...]
    proposals: ProposalRecord | None  # None: the queries are not from the encoder


@dataclass(frozen=True)
class DenoisingRecord:
    """The denoising queries of a training step, the mask between all queries, and what became of them."""

    queries: NoisedQueries
    attn_mask: Bool[Tensor, "q q"]  # denoising queries come first
    predictions: Predictions  # of the denoising queries


def explain(detector: Detector, images: Images) -> Explanation:
    """Detect in a batch, and record what the decoder's queries look at.

    Args:
        detector: in eval mode. Every module of `decoder.layers[i].cross_attention` has the method `project`, as those
            of `detrs.attention`.
        images: the batch.
    """
    attentions: list[Any] = [layer.cross_attention for layer in detector.decoder.layers]
    proposals = getattr(detector.queries, "proposals", None)
    with recorded([*attentions, *([] if proposals is None else [proposals])]) as calls, torch.no_grad():
        outputs = detector(images)
        layers = [
            _layer_record(module, calls[module][0][0], boxes)
            for module, boxes in zip(attentions, outputs.predictions.boxes, strict=True)
        ]
        memory: Memory = calls[attentions[0]][0][0][2]
        found = None
        if proposals is not None:
            found = _proposal_record(detector.queries, calls[proposals][0][1], memory)
    return Explanation(outputs, memory.shapes, tuple(layers), found)


def explain_denoising(
    detector: Detector, images: Images, targets: Targets, draws: Draws | None = None
) -> DenoisingRecord | None:
    """Record the denoising queries that training makes from targets; None for a model without denoising.

    Args:
        detector: in eval mode.
        images: the batch.
        targets: at least one.
        draws: random numbers to use instead of new ones.
    """
    if detector.denoising is None:
        return None
    # Only the detector's own flag adds the queries; its parts stay in eval mode, without dropout, and batch norm keeps
    # its statistics
    detector.training = True
    try:
        with recorded([detector.denoising, detector.decoder]) as calls, torch.no_grad():
            outputs = detector(images, targets, draws)
    finally:
        detector.training = False
    ((_, noised),) = calls[detector.denoising]
    ((arguments, _),) = calls[detector.decoder]
    queries: Queries = arguments[0]
    assert outputs.denoised is not None
    assert queries.attn_mask is not None
    return DenoisingRecord(noised, queries.attn_mask, outputs.denoised.predictions)


@contextmanager
def recorded(modules: Iterable[nn.Module]) -> Iterator[dict[nn.Module, list[Call]]]:
    """Yield the positional arguments and the output of each call of the modules, while the block lasts."""
    calls: dict[nn.Module, list[Call]] = {}
    handles = []

    def keep(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        calls[module].append((arguments, output))

    for module in modules:
        calls[module] = []
        handles.append(module.register_forward_hook(keep))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def dense_weights(inputs: DenseInputs, num_heads: int) -> Float[Tensor, "b m q s"]:
    """Return the weights with which `detrs.attention.attend` sums the values, without dropout."""
    query, key = split_heads(inputs.query, num_heads), split_heads(inputs.key, num_heads)
    return _softmax(query, key, query.shape[-1], inputs.attn_mask)


def conditional_parts(
    inputs: DenseInputs, num_heads: int
) -> tuple[Float[Tensor, "b m q s"], Float[Tensor, "b m q s"]]:
    """Return the softmax of the content part alone and of the spatial part alone of conditional attention."""
    query, key = split_heads(inputs.query, num_heads), split_heads(inputs.key, num_heads)
    width = query.shape[-1]  # of both parts: their logits have the same scale as in the sum
    (content_query, spatial_query), (content_key, spatial_key) = query.chunk(2, -1), key.chunk(2, -1)
    content = _softmax(content_query, content_key, width, inputs.attn_mask)
    return content, _softmax(spatial_query, spatial_key, width, inputs.attn_mask)


def sampled_points(inputs: SampledInputs, memory: Memory) -> SampledPoints:
    """Return where deformable attention samples, and with which weights."""
    locations = sampling_locations(memory.shapes, inputs.reference, inputs.offsets)
    ratios = memory.valid_ratios[:, None, None, :, None]  # of the padded level -> of the image
    return SampledPoints(locations / ratios, sampling_weights(inputs.logits))


def _layer_record(module: Any, arguments: tuple[Any, ...], boxes: Float[Tensor, "b q 4"]) -> LayerRecord:
    _, position, memory = arguments
    inputs = module.project(*arguments)
    attention: DenseWeights | SampledPoints
    if isinstance(module, DeformableAttention):
        attention = sampled_points(inputs, memory)
    else:
        attention = DenseWeights(dense_weights(inputs, module.num_heads))
        if isinstance(module, ConditionalAttention):
            content, spatial = conditional_parts(inputs, module.num_heads)
            attention = replace(attention, content=content, spatial=spatial)
    return LayerRecord(position.reference, attention, boxes)


def _proposal_record(queries: nn.Module, found: tuple[Tensor, ...], memory: Memory) -> ProposalRecord:
    """Rank the proposals as the queries do."""
    _, logits, boxes, priors = found
    is_first_class = isinstance(queries, EncoderProposals) and queries.score == "first_class"
    ranking = logits[..., 0] if is_first_class else logits.amax(-1)
    num_queries = queries.num_queries
    assert isinstance(num_queries, int)
    best, tokens = ranking.topk(num_queries, dim=1)
    index = tokens[..., None].expand(-1, -1, 4)
    ends = torch.tensor([height * width for height, width in memory.shapes], device=tokens.device).cumsum(0)
    return ProposalRecord(
        best.sigmoid(),
        boxes.gather(1, index).sigmoid(),
        priors.gather(1, index).sigmoid(),
        torch.searchsorted(ends, tokens, right=True),
    )


def _softmax(
    query: Float[Tensor, "b m q d"],
    key: Float[Tensor, "b m s d"],
    width: int,
    attn_mask: Bool[Tensor, "*n s"] | None,
) -> Float[Tensor, "b m q s"]:
    logits = query @ key.transpose(-1, -2) / width**0.5
    if attn_mask is not None:
        logits = logits.masked_fill(attn_mask, -torch.inf)
    weights: Tensor = logits.softmax(-1)
    return weights
