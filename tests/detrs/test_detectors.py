"""Test small versions of all models: shapes, gradients, unusual inputs, learning, mixed precision, configuration."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

import small_models
from detrs.criterion import LossConfig
from detrs.structures import Images, Memory, Outputs, Targets
from detrs.zoo import (
    ConditionalDetrConfig,
    DabDetrConfig,
    DeformableDetrConfig,
    DetrConfig,
    DinoConfig,
    Model,
    ModelConfig,
    build,
)

NAMES = list(small_models.CONFIGS)
COUNTS = [(2, 3), (0, 2), (0, 0), (12, 1)]  # the last: more targets than queries


def step(model: Model, images: Images, targets: Targets) -> tuple[Outputs, torch.Tensor]:
    outputs = model.detector(images, targets)
    losses = model.criterion(outputs, targets, float(max(sum(targets.counts), 1)))
    return outputs, losses.total


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_every_parameter(name: str, counts: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = build(small_models.CONFIGS[name])
    for parameter in model.detector.parameters():
        if parameter.abs().max() == 0:  # zero initialization stops gradients in the first step, on purpose
            torch.nn.init.normal_(parameter, std=0.1)
    model.detector.train()
    outputs, total = step(model, *small_models.batch(counts))
    total.backward()
    assert total.isfinite()
    gradients = {n: p.grad for n, p in model.detector.named_parameters()}
    assert [n for n, gradient in gradients.items() if gradient is None] == []
    assert [n for n, gradient in gradients.items() if not gradient.isfinite().all()] == []
    if min(counts) > 0:
        zero = {n for n, gradient in gradients.items() if gradient.abs().max() == 0}
        # Content that starts as zeros is equal for all queries: the first self-attention has no gradient. Without it,
        # the cross-attention gets the zeros.
        same: tuple[str, ...] = ("decoder.layers.0.self_attention", "decoder.layers.0.norm1.weight")
        if name == "dab_fixed_points":
            same = ("decoder.layers.0.cross_attention.content_query.weight",)
        assert {n for n in zero if not (starts_at_zero(name) and n.startswith(same))} == set()
    assert outputs.predictions.boxes.min() >= 0
    assert outputs.predictions.boxes.max() <= 1


def starts_at_zero(name: str) -> bool:
    return name.startswith(("detr", "conditional", "dab")) and "patterns" not in name


@pytest.mark.parametrize("name", NAMES)
def test_shapes(name: str) -> None:
    config = small_models.CONFIGS[name]
    model = build(config)
    model.detector.eval()
    images, _ = small_models.batch((1, 1, 1), size=(67, 97))
    with torch.no_grad():
        outputs = model.detector(images)
    assert outputs.predictions.logits.shape == (2, 3, 10, outputs.predictions.logits.shape[-1])
    assert outputs.predictions.boxes.shape == (2, 3, 10, 4)
    assert outputs.denoised is None
    detections = model.postprocess(outputs.predictions, torch.tensor([[67, 97]] * 3))
    assert len(detections) == 3
    for image in detections:
        assert (image.scores[:-1] >= image.scores[1:]).all()
        assert image.labels.min() >= 0
        assert image.labels.max() < 4
        assert image.boxes_xyxy.shape == (len(image.scores), 4)


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("dino")])
def test_padding_has_no_influence(name: str) -> None:
    """Padded and unpadded batches give equal predictions. (DINO's positions depend on padding by design.)"""
    torch.manual_seed(0)
    detector = build(small_models.CONFIGS[name]).detector.double().eval()
    pixels = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        features = detector.backbone(pixels)
        alone = detector.neck([features[i] for i in detector.levels], torch.zeros(1, 64, 64).bool())
        padded = pad_with_garbage(alone)
        expected, found = (
            detector.decoder(detector.queries(detector.encoder(m))[0], m) for m in (alone, padded)
        )
    torch.testing.assert_close(found.logits, expected.logits)
    torch.testing.assert_close(found.boxes, expected.boxes)


def pad_with_garbage(memory: Memory) -> Memory:
    """Put the tokens into the upper left of maps twice as high and three times as wide."""
    sizes = [height * width for height, width in memory.shapes]
    parts: dict[str, list[torch.Tensor]] = {"tokens": [], "pos": [], "mask": []}
    for tokens, pos, (height, width) in zip(
        memory.tokens.split(sizes, 1), memory.pos.split(sizes, 1), memory.shapes, strict=True
    ):
        for key, values in (("tokens", tokens), ("pos", pos)):
            wide = 9 * torch.randn(1, 2 * height, 3 * width, values.shape[2], dtype=values.dtype)
            wide[:, :height, :width] = values.view(1, height, width, -1)
            parts[key].append(wide.flatten(1, 2))
        padding = torch.ones(1, 2 * height, 3 * width, dtype=torch.bool)
        padding[:, :height, :width] = False
        parts["mask"].append(padding.flatten(1))
    shapes = tuple((2 * height, 3 * width) for height, width in memory.shapes)
    ratios = torch.tensor([1 / 3, 1 / 2], dtype=torch.float64).expand(1, len(shapes), 2)
    return Memory(*(torch.cat(parts[key], 1) for key in parts), shapes=shapes, valid_ratios=ratios)


@pytest.mark.parametrize("name", NAMES)
def test_overfits_one_batch(name: str) -> None:
    torch.manual_seed(0)
    model = build(small_models.CONFIGS[name])
    model.detector.train()
    images, targets = small_models.batch((2, 1), size=(64, 64))
    optimizer = torch.optim.AdamW(model.detector.parameters(), lr=4e-3)
    first = None
    for _ in range(30):
        _, total = step(model, images, targets)
        first = total.item() if first is None else first
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.detector.parameters(), 0.5)
        optimizer.step()
    assert total.item() < 0.5 * first


@pytest.mark.parametrize("name", NAMES)
def test_bf16_autocast_scores_in_float32(name: str) -> None:
    torch.manual_seed(0)
    model = build(small_models.CONFIGS[name])
    model.detector.eval()
    images, targets = small_models.batch((2, 3))
    exact = model.criterion(model.detector(images), targets, 5.0)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model.detector(images)
        losses = model.criterion(outputs, targets, 5.0)
    assert outputs.predictions.boxes.dtype == torch.float32
    assert {term.dtype for term in losses.terms.values()} == {torch.float32}
    assert losses.total.dtype == torch.float32
    torch.testing.assert_close(losses.total, exact.total, rtol=0.05, atol=0)
    losses.total.backward()


@pytest.mark.parametrize("field", ["logits", "boxes"])
@pytest.mark.parametrize("counts", [(2, 1), (2, 0)], ids=str)
def test_nan_in_predictions_names_layer_and_image(field: str, counts: tuple[int, ...]) -> None:
    model = build(small_models.CONFIGS["dino"])
    images, targets = small_models.batch(counts)
    outputs = model.detector.eval()(images)
    with_nan = getattr(outputs.predictions, field).detach().clone()
    with_nan[1, 1, 3, 2] = float("nan")
    predictions = dataclasses.replace(outputs.predictions, **{field: with_nan})
    with pytest.raises(ValueError, match="decoder layer 1 for image 1"):
        model.criterion(dataclasses.replace(outputs, predictions=predictions), targets, 3.0)


def test_nan_in_targets_names_the_image() -> None:
    model = build(small_models.CONFIGS["dino"])
    images, targets = small_models.batch((2, 1))
    boxes = targets.boxes.clone()
    boxes[2, 0] = float("nan")
    with pytest.raises(ValueError, match="target box of image 1"):
        model.criterion(model.detector.eval()(images), dataclasses.replace(targets, boxes=boxes), 3.0)


@pytest.mark.parametrize("size", [(16, 16), (8, 300), (300, 9)])
def test_images_with_fewer_tokens_than_queries_are_padded(size: tuple[int, int]) -> None:
    """The result is that of a batch that was padded before, as beside a larger image."""
    model = build(dataclasses.replace(small_models.CONFIGS["dino"], num_queries=90))
    images, _ = small_models.batch((1,), size=size)
    outputs = model.detector.eval()(images)
    assert outputs.predictions.logits.shape[2] == 90
    height, width = model.detector._padded_size(*size)
    larger = images.padded(height, width)
    assert larger.padding_mask.sum() == height * width - size[0] * size[1]
    torch.testing.assert_close(model.detector(larger).predictions.logits, outputs.predictions.logits)
    memory = model.detector.neck(
        [model.detector.backbone(larger.pixels)[level] for level in model.detector.levels],
        larger.padding_mask,
    )
    assert memory.tokens.shape[1] == model.detector._num_tokens(height, width) >= 90
    assert torch.isfinite(outputs.predictions.boxes).all()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (DinoConfig(), "num_classes"),
        (DinoConfig(num_classes=3, hidden_dim=30), "hidden_dim"),
        (DinoConfig(num_classes=3, strides=(8, 16, 32), num_feature_levels=2), "num_feature_levels"),
        (DinoConfig(num_classes=3, strides=(7,)), "strides"),
        (DinoConfig(num_classes=3, shared_heads=False, aux_loss=False), "aux_loss"),
        (DeformableDetrConfig(num_classes=3, two_stage=True), "refinement"),
        (DinoConfig(num_classes=3, num_heads=0), "num_heads"),
        (DetrConfig(num_classes=3, num_queries=0), "num_queries"),
        (ConditionalDetrConfig(num_classes=3, num_decoder_layers=0), "num_decoder_layers"),
        (DabDetrConfig(num_classes=3, shared_box_heads=False, aux_loss=False), "aux_loss"),
        (DeformableDetrConfig(num_classes=3, proposal_score="best_class"), "proposal_score.*no effect"),
        *(
            (kind(num_classes=3, loss=LossConfig("cross_entropy")), "loss.kind.*no no-object class")
            for kind in (ConditionalDetrConfig, DabDetrConfig, DeformableDetrConfig, DinoConfig)
        ),
        (
            DetrConfig(num_classes=3, num_select=50),
            "num_select.*no effect with model.loss.kind=cross_entropy",
        ),
        (
            DetrConfig(num_classes=3, loss=LossConfig("focal", no_object_weight=0.2)),
            "no_object_weight.*no effect",
        ),
        (
            DabDetrConfig(num_classes=3, anchor="point"),
            "modulate_attention: must be false with model.anchor=point",
        ),
        (DabDetrConfig(num_classes=3, fixed_points=True), "fixed_points: requires model.random_points"),
        (DabDetrConfig(num_classes=3, num_decoder_layers=1, refinement=False), "refinement.*no effect"),
        *(
            (
                DabDetrConfig(num_classes=3, position_encoding="learned", **temperature),
                "temperature.*no effect",
            )
            for temperature in ({"position_temperature": 10.0}, {"position_temperature_y": 20.0})
        ),
        (DetrConfig(num_classes=3, loss=LossConfig("cross_entropy", gamma=1.0)), "loss.gamma.*no effect"),
        (
            DinoConfig(num_classes=3, loss=LossConfig(no_object_weight=0.2)),
            "loss.no_object_weight.*no effect",
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_impossible_settings_are_named(config: ModelConfig, message: str) -> None:
    small = dataclasses.replace(config, backbone=small_models.SMALL["backbone"])
    with pytest.raises(ValueError, match=message):
        build(small)


@pytest.mark.parametrize("config", small_models.CONFIGS.values(), ids=NAMES)
def test_pydantic_reads_what_it_writes(config: ModelConfig) -> None:
    adapter: TypeAdapter[ModelConfig] = TypeAdapter(ModelConfig)
    assert adapter.validate_json(adapter.dump_json(config)) == config


@pytest.mark.parametrize(
    "extra", [{"num_querys": 3}, {"backbone": {"depth": 50}}, {"loss": {"kind": "hinge"}}], ids=str
)
def test_pydantic_refuses_unknown_settings(extra: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(DinoConfig).validate_python({"architecture": "dino", **extra})
