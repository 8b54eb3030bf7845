"""Build the training steps that bench_step.py compares: ours, and transformers' with the same settings.

Both have new weights, the same trained parameters, dropout, queries, layers and losses, the same images and targets in
memory, and the same clipping and AdamW. `check_same_work` compares what can be counted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

import detrs
from detrs.attention import DeformableAttention
from detrs.structures import Images, Targets
from detrs.zoo import ModelConfig

NUM_CLASSES = 91
NUM_OBJECTS = 7  # of an image; COCO has 7.3 on average
MODELS: dict[str, ModelConfig] = {
    "detr": detrs.DetrConfig(num_classes=NUM_CLASSES),
    "conditional_detr": detrs.ConditionalDetrConfig(num_classes=NUM_CLASSES),
    "dab_detr": detrs.DabDetrConfig(num_classes=NUM_CLASSES),
    "deformable_detr": detrs.DeformableDetrConfig(num_classes=NUM_CLASSES, refinement=True),
    "deformable_detr_two_stage": detrs.DeformableDetrConfig(
        num_classes=NUM_CLASSES, refinement=True, two_stage=True
    ),
    "dino": detrs.DinoConfig(num_classes=NUM_CLASSES),
}
# What ours has in addition, and the official code too: transformers has one class head for all layers of Deformable
# DETR with refinement, and no loss of the proposals in two-stage, so that it does not train the heads of the encoder
EXTRA_PARAMETERS = {"deformable_detr": 5 * (256 + 1) * NUM_CLASSES}
EXTRA_TERMS = {"deformable_detr_two_stage": {"loss_ce_enc", "loss_bbox_enc", "loss_giou_enc"}}


@dataclass(frozen=True)
class Loss:
    """The loss of a forward pass, the number of predictions of an image, and the names of the terms of the loss."""

    total: Tensor
    num_queries: int
    terms: frozenset[str]


class Step:
    """A complete training step: forward pass, criterion, backward pass, clipping, AdamW."""

    def __init__(
        self, network: nn.Module, forward: Callable[[], Loss], autocast: torch.autocast | None = None
    ) -> None:
        self.network, self.forward = network, forward
        self.autocast = torch.autocast("cpu", enabled=False) if autocast is None else autocast
        self.parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-5, weight_decay=1e-4, fused=True)
        network.train()

    @property
    def num_parameters(self) -> int:
        """Number of trained parameters."""
        return sum(parameter.numel() for parameter in self.parameters)

    def __call__(self) -> Loss:
        """Train on the batch."""
        with self.autocast:
            loss = self.forward()
        loss.total.backward()
        nn.utils.clip_grad_norm_(self.parameters, 0.1)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss


def make_batch(
    height: int, width: int, num_images: int, device: torch.device | str = "cpu"
) -> tuple[Images, Targets]:
    """Draw images without padding, and targets."""
    torch.manual_seed(0)
    num_targets = num_images * NUM_OBJECTS
    images = Images(
        torch.randn(num_images, 3, height, width, device=device),
        torch.zeros(num_images, height, width, dtype=torch.bool, device=device),
    )
    labels = torch.randint(0, NUM_CLASSES, (num_targets,), device=device)
    boxes = torch.rand(num_targets, 4, device=device) * 0.3 + 0.3
    return images, Targets(labels, boxes, (NUM_OBJECTS,) * num_images)


def our_step(
    config: ModelConfig,
    batch: tuple[Images, Targets],
    *,
    fused: bool = True,
    compiled: bool = False,
    autocast: torch.autocast | None = None,
) -> Step:
    """Return our step on a batch.

    Args:
        config: of the model.
        batch: images and targets.
        fused: use the fused form of deformable attention, as in training; else the plain form.
        compiled: compile the detector.
        autocast: of the forward pass and the criterion; None: none.
    """
    images, targets = batch
    torch.manual_seed(0)
    model = detrs.build(config)
    detector = model.detector.to(images.pixels.device)
    for module in detector.modules():
        if isinstance(module, DeformableAttention):
            module.fused = fused
    predict: Callable[..., Any] = torch.compile(detector) if compiled else detector

    def forward() -> Loss:
        outputs = predict(images, targets)
        losses = model.criterion(outputs, targets, float(len(targets.labels)))
        return Loss(losses.total, outputs.predictions.logits.shape[2], _loss_names(losses.terms))

    return Step(detector, forward, autocast)


def find_transformers() -> ModuleType | None:
    """Return the library if it is installed."""
    try:
        import transformers
    except ImportError:
        return None
    return transformers


def has_anchor(config: ModelConfig) -> bool:
    """Return whether transformers has the model."""
    return not isinstance(config, detrs.DinoConfig)


def anchor_step(
    config: ModelConfig, batch: tuple[Images, Targets], autocast: torch.autocast | None = None
) -> Step:
    """Return transformers' step on a batch, for a model that it has."""
    images, targets = batch
    torch.manual_seed(0)
    network = _anchor(config).to(images.pixels.device)
    ends = torch.tensor(targets.counts).cumsum(0).tolist()
    labels = [
        {"class_labels": targets.labels[end - count : end], "boxes": targets.boxes[end - count : end]}
        for count, end in zip(targets.counts, ends, strict=True)
    ]
    pixel_mask = (~images.padding_mask).long()

    def forward() -> Loss:
        outputs = network(pixel_values=images.pixels, pixel_mask=pixel_mask, labels=labels)
        return Loss(outputs.loss, outputs.logits.shape[1], _loss_names(outputs.loss_dict))

    return Step(network, forward, autocast)


def check_same_work(name: str, ours: tuple[Step, Loss], anchor: tuple[Step, Loss]) -> None:
    """Compare the numbers of trained parameters and of queries, and the terms of the losses.

    Raises:
        ValueError: they differ by more than is known.
    """
    extra = ours[0].num_parameters - anchor[0].num_parameters
    if extra != EXTRA_PARAMETERS.get(name, 0):
        raise ValueError(f"{name}: trains {extra} parameters more than transformers' model")
    if ours[1].num_queries != anchor[1].num_queries:
        raise ValueError(f"{name}: {ours[1].num_queries} queries, transformers {anchor[1].num_queries}")
    expected = anchor[1].terms | EXTRA_TERMS.get(name, set())
    if ours[1].terms != expected:
        raise ValueError(f"{name}: other losses than transformers': {sorted(ours[1].terms ^ expected)}")


def _anchor(config: ModelConfig) -> nn.Module:
    import transformers

    levels = (2, 3, 4) if isinstance(config, detrs.DeformableDetrConfig) else (1, 2, 3, 4)
    common = {
        "backbone_config": transformers.ResNetConfig(out_features=[f"stage{level}" for level in levels]),
        "num_labels": config.num_classes,
        "num_queries": config.num_queries,
        "auxiliary_loss": True,
        "encoder_layers": config.num_encoder_layers,
        "decoder_layers": config.num_decoder_layers,
        "encoder_ffn_dim": config.ffn_dim,
        "decoder_ffn_dim": config.ffn_dim,
        "dropout": config.dropout,
        "attention_dropout": config.dropout,
        "activation_dropout": config.dropout,
    }
    network: nn.Module
    match config:
        case detrs.DetrConfig():
            network = transformers.DetrForObjectDetection(transformers.DetrConfig(**common))
        case detrs.ConditionalDetrConfig():
            network = transformers.ConditionalDetrForObjectDetection(
                transformers.ConditionalDetrConfig(**common)
            )
        case detrs.DabDetrConfig():
            network = transformers.DabDetrForObjectDetection(transformers.DabDetrConfig(**common))
        case detrs.DeformableDetrConfig():
            settings = {"with_box_refine": config.refinement, "two_stage": config.two_stage}
            network = transformers.DeformableDetrForObjectDetection(
                transformers.DeformableDetrConfig(**common, **settings)
            )
        case _:
            raise ValueError(f"transformers has no {config.architecture}")
    # It freezes all of its own ResNet, of DAB-DETR nothing, and of timm's what we and the official code freeze: the
    # stem and the first stage
    for name, parameter in network.named_parameters():
        if ".backbone." in name:
            parameter.requires_grad_(".stages." in name and ".stages.0." not in name)
    return network


def _loss_names(terms: Any) -> frozenset[str]:
    # Both also compute numbers to log, such as the cardinality error
    return frozenset(name for name in terms if name.startswith(("loss_ce", "loss_bbox", "loss_giou")))
