"""Compute the losses, of each prediction layer separately, in one tensor of all layers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from detrs.boxes import iou_and_giou
from detrs.layers import full_precision
from detrs.matcher import Costs, Matches, match
from detrs.structures import Denoised, Outputs, Predictions, Targets


@dataclass(frozen=True)
class LossConfig:
    """Class loss, and weights of the losses and of the matching costs.

    Kinds: "focal" (sigmoid focal loss); "mal" (matchability-aware loss, DEIM, eq. 3: the target is the
    matched box's IoU to the power `gamma`); "cross_entropy" (softmax with a no-object class, DETR).
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    kind: Literal["focal", "mal", "cross_entropy"] = "focal"
    class_weight: float = 1.0
    box_weight: float = 5.0
    giou_weight: float = 2.0
    class_cost: float = 2.0
    box_cost: float = 5.0
    giou_cost: float = 2.0
    alpha: float = 0.25  # focal: weight of the positives
    gamma: float = 2.0  # focal: usually 2; mal: 1.5
    no_object_weight: float = 0.1  # cross_entropy


@dataclass(frozen=True)
class Losses:
    """`total` is the weighted sum to minimize; `terms` are the unweighted losses and the logged metrics.

    Names are those of the official code: `loss_ce`, `loss_bbox`, `loss_giou` for the last decoder layer, with `_0`,
    `_1`, ... for the other layers, `_enc` or `_interm` for the encoder and `_dn` for denoising queries.
    """

    total: Float[Tensor, ""]
    terms: dict[str, Float[Tensor, ""]]


@dataclass(frozen=True)
class Matched:
    """Indices of the matched pairs into [n, b, q] predictions and into the packed targets, each [n, m]."""

    layer: Int64[Tensor, "n m"]
    image: Int64[Tensor, "n m"]
    query: Int64[Tensor, "n m"]
    target: Int64[Tensor, "n m"]
    label: Int64[Tensor, "n m"]


class Criterion:
    """Match predictions with targets and compute the losses.

    Args:
        config: kind and weights.
        giou_eps: see `detrs.boxes.iou_and_giou`.
        aux_loss: include all decoder layers, not only the last.
        denoising: the model has denoising queries; their terms are zeros for a batch without them.
        first_stage: suffix of the encoder's terms, for a model whose encoder predicts.
        first_stage_labels: "zero": the encoder classifies objects against background only, as class 0.
        cost_alpha: alpha of the focal matching cost; None: that of the loss.
    """

    def __init__(
        self,
        config: LossConfig,
        *,
        giou_eps: float,
        aux_loss: bool = True,
        denoising: bool = False,
        first_stage: Literal["enc", "interm"] = "enc",
        first_stage_labels: Literal["own", "zero"] = "own",
        cost_alpha: float | None = None,
    ) -> None:
        self.config, self.giou_eps, self.aux_loss, self.denoising = config, giou_eps, aux_loss, denoising
        self.first_stage, self.first_stage_labels = first_stage, first_stage_labels
        self.match = match  # `raydetr profile` measures it
        softmax = config.kind == "cross_entropy"
        # The "mal" loss is matched with the focal cost too, whose gamma is 2
        self.costs = Costs(
            "softmax" if softmax else "focal", config.class_cost, config.box_cost, config.giou_cost,
            giou_eps, config.alpha if cost_alpha is None else cost_alpha,
            config.gamma if config.kind == "focal" else 2.0,
        )  # fmt: skip

    def __call__(
        self,
        outputs: Outputs,
        targets: Targets,
        num_boxes: Float[Tensor, ""] | float,
        class_weight: Float[Tensor, ""] | float | None = None,
    ) -> Losses:
        """Compute all losses, divided by `num_boxes`; cross entropy is divided by `class_weight`.

        The global batch is that of all processes and accumulated micro-batches. Both divisors are its sums over the
        number of processes, whose gradients are averaged.

        Args:
            outputs: of a detector.
            targets: of the same batch.
            num_boxes: number of target boxes of the global batch over the number of processes, at least 1.
            class_weight: `total_class_weight` of the global batch over the number of processes; None: of this batch.

        Raises:
            NonFiniteError: predictions or target boxes are not finite; the message names the layer and the image.
        """
        groups = self._groups(outputs, targets)
        terms: dict[str, Tensor] = {}
        totals = []
        for (name, predictions, labels), matches in zip(
            groups, self.match([(p, labels) for _, p, labels in groups], targets, self.costs), strict=True
        ):
            matched = _index(matches, labels, targets)
            losses = self._score(predictions, matched, targets, num_boxes, class_weight)
            totals.append(self._weigh(losses))
            if name == "decoder":
                terms["class_error"] = _class_error(predictions, matched)
                terms |= _name_layers(losses, "")
            else:
                terms |= {f"{key}_{name}": value[0] for key, value in losses.items()}
        if self.denoising:
            losses = self._score_denoising(outputs, targets, num_boxes)
            totals.append(self._weigh(losses))
            terms |= _name_layers(losses, "_dn")
        return Losses(torch.stack(totals).sum(), {name: value.detach() for name, value in terms.items()})

    def by_image(self, outputs: Outputs, targets: Targets) -> Float[Tensor, " b"]:
        """Compute the loss of the last decoder layer for each image alone, divided by the number of its objects, or 1.

        Cross entropy is divided by the weights of the image's queries. That is the `total` of a call for a batch of
        this image, without first stage and denoising.

        Raises:
            NonFiniteError: predictions or target boxes are not finite.
        """
        last = Predictions(outputs.predictions.logits[-1:], outputs.predictions.boxes[-1:])
        last = _to_full_precision(last)
        (matches,) = self.match([(last, targets.labels)], targets, self.costs)
        matched = _index(matches, targets.labels, targets)
        boxes = last.boxes[0, matched.image[0], matched.query[0]]
        target_boxes = targets.boxes[matched.target[0]].to(boxes.dtype)
        iou, giou = iou_and_giou(boxes, target_boxes, self.giou_eps)
        zeros = boxes.new_zeros(len(targets.counts))
        num_boxes = boxes.new_tensor(targets.counts).clamp(min=1)

        def summed(values: Float[Tensor, " m"]) -> Float[Tensor, " b"]:
            return zeros.index_add(0, matched.image[0], values)

        # The losses of layers are separate: each image takes the place of one
        logits = last.logits.transpose(0, 1)
        layered = replace(matched, layer=matched.image, image=torch.zeros_like(matched.image))
        if self.config.kind == "cross_entropy":
            class_loss = cross_entropy(logits, layered, self.config.no_object_weight)
        elif self.config.kind == "mal":
            class_loss = mal_loss(logits, layered, iou[None], self.config.gamma) / num_boxes
        else:
            alpha, gamma = self.config.alpha, self.config.gamma
            corrections = _focal_corrections(logits, layered, alpha, gamma)[0]
            class_loss = (_focal_background(logits, alpha, gamma) + summed(corrections)) / num_boxes
        return (
            self.config.class_weight * class_loss
            + self.config.box_weight * summed((boxes - target_boxes).abs().sum(1)) / num_boxes
            + self.config.giou_weight * summed(1 - giou) / num_boxes
        )

    def total_class_weight(
        self, num_matched: Float[Tensor, ""], num_queries: Float[Tensor, ""]
    ) -> Float[Tensor, ""]:
        """Return the sum of the weights in cross entropy of `num_queries` queries, `num_matched` of them matched."""
        return num_matched + (num_queries - num_matched) * self.config.no_object_weight

    def _groups(self, outputs: Outputs, targets: Targets) -> list[tuple[str, Predictions, Tensor]]:
        groups = [("decoder", self._scored(outputs.predictions), targets.labels)]
        if outputs.first_stage is not None:
            zero = self.first_stage_labels == "zero"
            labels = torch.zeros_like(targets.labels) if zero else targets.labels
            groups.append((self.first_stage, _to_full_precision(outputs.first_stage.predictions), labels))
        return groups

    def _scored(self, predictions: Predictions) -> Predictions:
        first = 0 if self.aux_loss else -1
        return _to_full_precision(Predictions(predictions.logits[first:], predictions.boxes[first:]))

    def _score_denoising(
        self, outputs: Outputs, targets: Targets, num_boxes: Float[Tensor, ""] | float
    ) -> dict[str, Tensor]:
        denoised = outputs.denoised
        if denoised is None or denoised.group_size == 0:
            # Exact zeros, as in the official code, and one per decoder layer
            num_layers = len(outputs.predictions.logits) if self.aux_loss else 1
            zeros = outputs.predictions.boxes.new_zeros(num_layers)
            names = ("loss_ce", "loss_bbox", "loss_giou", "loss_xy", "loss_hw", "cardinality_error")
            return dict.fromkeys(names, zeros)
        predictions = self._scored(denoised.predictions)
        matches = denoising_matches(denoised, targets, len(predictions.logits))
        matched = _index(matches, targets.labels, targets)
        return self._score(predictions, matched, targets, num_boxes * denoised.num_groups)

    def _score(
        self,
        predictions: Predictions,
        matched: Matched,
        targets: Targets,
        num_boxes: Float[Tensor, ""] | float,
        class_weight: Float[Tensor, ""] | float | None = None,
    ) -> dict[str, Tensor]:
        """Return each loss for each layer, [n]."""
        boxes = predictions.boxes[matched.layer, matched.image, matched.query]
        target_boxes = targets.boxes[matched.target].to(boxes.dtype)
        iou, giou = iou_and_giou(boxes, target_boxes, self.giou_eps)
        distance = (boxes - target_boxes).abs()
        return {
            "loss_ce": self._class_loss(predictions.logits, matched, iou.detach(), num_boxes, class_weight),
            "loss_bbox": distance.sum((1, 2)) / num_boxes,
            "loss_giou": (1 - giou).sum(1) / num_boxes,
            "loss_xy": distance[..., :2].sum((1, 2)).detach() / num_boxes,
            "loss_hw": distance[..., 2:].sum((1, 2)).detach() / num_boxes,
            "cardinality_error": _cardinality_error(predictions.logits, targets),
        }

    def _class_loss(
        self,
        logits: Float[Tensor, "n b q c"],
        matched: Matched,
        iou: Float[Tensor, "n m"],
        num_boxes: Float[Tensor, ""] | float,
        class_weight: Float[Tensor, ""] | float | None,
    ) -> Float[Tensor, " n"]:
        if self.config.kind == "cross_entropy":
            return cross_entropy(logits, matched, self.config.no_object_weight, class_weight)
        if self.config.kind == "mal":
            return mal_loss(logits, matched, iou, self.config.gamma) / num_boxes
        return focal_loss(logits, matched, self.config.alpha, self.config.gamma) / num_boxes

    def _weigh(self, losses: dict[str, Tensor]) -> Float[Tensor, ""]:
        config = self.config
        weighted = (
            config.class_weight * losses["loss_ce"]
            + config.box_weight * losses["loss_bbox"]
            + config.giou_weight * losses["loss_giou"]
        )
        return weighted.sum()


def focal_loss(
    logits: Float[Tensor, "n b q c"], matched: Matched, alpha: float, gamma: float
) -> Float[Tensor, " n"]:
    """Return the sum of the sigmoid focal loss of each layer (Lin et al. 2017, eq. 5)."""
    # The loss as if there were no objects, then a correction at the few matched logits
    corrections = _focal_corrections(logits, matched, alpha, gamma)
    return _focal_background(logits, alpha, gamma) + corrections.sum(1)


def _focal_background(logits: Float[Tensor, "n b q c"], alpha: float, gamma: float) -> Float[Tensor, " n"]:
    background: Tensor = (1 - alpha) * _Background.apply(logits, gamma)  # type: ignore[no-untyped-call]
    return background


def _focal_corrections(
    logits: Float[Tensor, "n b q c"], matched: Matched, alpha: float, gamma: float
) -> Float[Tensor, "k m"]:
    at_targets = logits[matched.layer, matched.image, matched.query, matched.label]
    return _focal(-at_targets, alpha, gamma) - _focal(at_targets, 1 - alpha, gamma)


class _Background(torch.autograd.Function):
    """Sum of sigmoid(x)^gamma * softplus(x) over the queries and classes of a layer.

    The derivative is computed in the forward pass: this takes only three large tensors, and one is saved.
    """

    @staticmethod
    def forward(ctx: Any, logits: Float[Tensor, "n b q c"], gamma: float) -> Float[Tensor, " n"]:
        score = logits.sigmoid()
        softplus = logits.abs().neg_().exp_().log1p_().add_(logits.clamp(min=0))
        power = score**gamma
        if ctx.needs_input_grad[0]:
            # gamma * power * (1 - score) * softplus + power * score
            ctx.save_for_backward((1 - score).mul_(softplus).mul_(gamma).add_(score).mul_(power))
        return power.mul_(softplus).sum((1, 2, 3))

    @staticmethod
    def backward(ctx: Any, gradient: Float[Tensor, " n"]) -> tuple[Float[Tensor, "n b q c"], None]:
        (slope,) = ctx.saved_tensors
        return slope * gradient[:, None, None, None], None


def _focal(wrong: Float[Tensor, "*n"], weight: float, gamma: float) -> Float[Tensor, "*n"]:
    """Return the focal loss, given the logit of the wrong answer."""
    return wrong.sigmoid() ** gamma * F.logsigmoid(-wrong) * -weight


def mal_loss(
    logits: Float[Tensor, "n b q c"], matched: Matched, iou: Float[Tensor, "k m"], gamma: float
) -> Float[Tensor, " n"]:
    """Return the sum of the matchability-aware loss of each layer (Huang et al. 2025, DEIM, eq. 3)."""
    index = (matched.layer, matched.image, matched.query, matched.label)
    quality = torch.zeros_like(logits).index_put(index, iou.clamp(0, 1) ** gamma)
    weight = (logits.detach().sigmoid() ** gamma).index_put(index, torch.ones_like(iou))
    loss = F.binary_cross_entropy_with_logits(logits, quality, weight, reduction="none")
    return loss.sum((1, 2, 3))


def cross_entropy(
    logits: Float[Tensor, "n b q c"],
    matched: Matched,
    no_object_weight: float,
    class_weight: Float[Tensor, ""] | float | None = None,
) -> Float[Tensor, " n"]:
    """Return the weighted mean cross entropy of each layer; the last class is "no object" (DETR, section 3.1).

    `class_weight` is the divisor of the mean; None: the sum of the weights of these queries.
    """
    no_object = logits.shape[-1] - 1
    labels = torch.full(logits.shape[:3], no_object, dtype=torch.int64, device=logits.device)
    labels[matched.layer, matched.image, matched.query] = matched.label
    weights = torch.ones_like(logits[..., 0]).masked_fill(labels == no_object, no_object_weight)
    likelihood = logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    divisor = weights.sum((1, 2)) if class_weight is None else class_weight
    return -(likelihood * weights).sum((1, 2)) / divisor


def denoising_matches(denoised: Denoised, targets: Targets, num_layers: int) -> Matches:
    """Match positive denoising queries with the targets they were made from, in every layer."""
    _, index = targets.indices()
    starts = torch.arange(denoised.num_groups, device=index.device)[:, None] * denoised.group_size
    queries = (starts + index).flatten().expand(num_layers, -1)
    rows = torch.arange(len(index), device=index.device).repeat(denoised.num_groups)
    return Matches(queries, rows.expand(num_layers, -1))


def _index(matches: Matches, labels: Int64[Tensor, " t"], targets: Targets) -> Matched:
    layer = torch.arange(len(matches.queries), device=labels.device)[:, None].expand_as(matches.queries)
    image = targets.indices()[0][matches.targets]
    return Matched(layer, image, matches.queries, matches.targets, labels[matches.targets])


def _cardinality_error(logits: Float[Tensor, "n b q c"], targets: Targets) -> Float[Tensor, " n"]:
    """Return the mean over images of |number of queries whose best class is not the last - number of targets|."""
    if logits.shape[-1] == 1:
        counted = torch.zeros(logits.shape[:2], dtype=torch.int64, device=logits.device)
    else:
        counted = (logits[..., :-1].detach().amax(-1) >= logits[..., -1]).sum(2)
    image, _ = targets.indices()
    counts = (image == torch.arange(len(targets.counts), device=image.device)[:, None]).sum(1)
    return (counted - counts).abs().to(logits.dtype).mean(1)


def _class_error(predictions: Predictions, matched: Matched) -> Float[Tensor, ""]:
    """Return the percentage of matched queries of the last layer with a wrong best class; 100 without targets."""
    if matched.label.shape[1] == 0:
        return predictions.boxes.new_full((), 100.0)
    logits = predictions.logits[-1, matched.image[-1], matched.query[-1]].detach()
    return 100 - 100 * (logits.argmax(-1) == matched.label[-1]).to(logits.dtype).mean()


def _name_layers(losses: dict[str, Tensor], suffix: str) -> dict[str, Tensor]:
    terms = {}
    for name, values in losses.items():
        *others, last = values.unbind(0)
        terms[f"{name}{suffix}"] = last
        terms |= {f"{name}{suffix}_{layer}": value for layer, value in enumerate(others)}
    return terms


def _to_full_precision(predictions: Predictions) -> Predictions:
    return Predictions(full_precision(predictions.logits), full_precision(predictions.boxes))
