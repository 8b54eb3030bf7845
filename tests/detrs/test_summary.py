"""The counts of a model's parts: against torch's own total, a count by hand, and published figures."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from detrs import zoo
from detrs.structures import Images
from detrs.summary import Part, summarize
from small_models import CONFIGS, SMALL

SIZE = (64, 96)


@pytest.mark.parametrize(
    "name", ["detr_pre_norm", "conditional", "dab_scalar", "dino", "dino_quickstart", "deformable_two_stage"]
)
def test_the_parts_sum_up_to_the_model_on_real_images(name: str) -> None:
    """The model that computes has the same parameters and flops as the one without weights."""
    parts = summarize(CONFIGS[name], *SIZE)
    detector = zoo.build(CONFIGS[name]).detector.eval().requires_grad_(False)
    assert sum(part.num_parameters for part in parts) == sum(p.numel() for p in detector.parameters())
    images = Images(torch.randn(1, 3, *SIZE), torch.zeros(1, *SIZE, dtype=torch.bool))
    # torch's counter omits the fused attention of the CPU
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        detector(images)
    assert 2 * sum(part.multiply_adds for part in parts) == counter.get_total_flops()


def by_name(parts: list[Part]) -> dict[str, Part]:
    return {part.name.partition(",")[0]: part for part in parts}


def test_an_encoder_and_a_decoder_layer_by_hand() -> None:
    """Of DETR: projections of query, key, value and output; scores and sums of values; two linear layers."""
    config = zoo.DetrConfig(**{**SMALL, "num_encoder_layers": 1, "num_decoder_layers": 1})
    dim, ffn, queries, classes = config.hidden_dim, config.ffn_dim, config.num_queries, config.num_classes
    tokens = (SIZE[0] // 32) * (SIZE[1] // 32)
    parts = by_name(summarize(config, *SIZE))

    def attention(num_queries: int, num_keys: int) -> int:
        return dim * dim * (2 * num_queries + 2 * num_keys) + 2 * num_queries * num_keys * dim

    feed_forward = 2 * dim * ffn
    assert parts["encoder"].multiply_adds == attention(tokens, tokens) + tokens * feed_forward
    cross = attention(queries, tokens)
    assert parts["decoder"].multiply_adds == attention(queries, queries) + cross + queries * feed_forward
    heads = dim * (classes + 1) + 2 * dim * dim + 4 * dim
    assert parts["decoder.heads"].multiply_adds == queries * heads
    assert parts["encoder"].num_parameters == 4 * dim * (dim + 1) + feed_forward + ffn + dim + 4 * dim
    assert parts["encoder"].output == f"{tokens} x {dim}"
    assert parts["decoder.heads"].output == f"{queries} x {classes + 1}, {queries} x 4"


def test_deformable_attention_by_hand() -> None:
    """Its projections of values, offsets, weights and outputs; the sampling is not counted."""
    config = dataclasses.replace(CONFIGS["deformable"], num_encoder_layers=1, num_decoder_layers=1)
    dim, ffn, queries = config.hidden_dim, config.ffn_dim, config.num_queries
    tokens = sum((SIZE[0] // stride) * (SIZE[1] // stride) for stride in (8, 16, 32))
    samples = config.num_heads * config.num_feature_levels * config.num_points
    per_query, feed_forward = dim * 3 * samples + dim * dim, 2 * dim * ffn
    parts = by_name(summarize(config, *SIZE))
    assert parts["encoder"].multiply_adds == tokens * (dim * dim + per_query + feed_forward)
    self_attention = 4 * queries * dim * dim + 2 * queries * queries * dim
    expected = self_attention + tokens * dim * dim + queries * (per_query + feed_forward)
    assert parts["decoder"].multiply_adds == expected


def test_resnet_50_has_the_published_figures() -> None:
    """He et al. 2016 count 3.8 billion multiply-adds at 224x224, with the classifier; torchvision 4.09."""
    parts = by_name(summarize(zoo.DetrConfig(num_classes=91), 224, 224))
    backbone = [part for name, part in parts.items() if name.startswith("backbone")]
    classifier = 2048 * 1000
    assert sum(part.multiply_adds for part in backbone) + classifier == pytest.approx(4.09e9, rel=1e-3)
    frozen_norms, with_bias = 2 * 26560, 2048 * 1000 + 1000
    # torchvision's resnet50 has 25,557,032 parameters; the affine ones of frozen norms are buffers here
    assert sum(part.num_parameters for part in backbone) == 25_557_032 - frozen_norms - with_bias


def test_weights_are_not_read() -> None:
    backbone = dataclasses.replace(SMALL["backbone"], weights="nowhere.pth")
    assert summarize(dataclasses.replace(CONFIGS["detr"], backbone=backbone), *SIZE)
