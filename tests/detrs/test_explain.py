"""What is recorded of a detector is what it computes: weights times values is the output of its modules."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from detrs import attention, zoo
from detrs.attention import (
    ConditionalAttention,
    DeformableAttention,
    DenseAttention,
    SelfAttention,
    SeparateSelfAttention,
    split_heads,
)
from detrs.explain import (
    DenseWeights,
    SampledPoints,
    conditional_parts,
    dense_weights,
    explain,
    explain_denoising,
    sampled_points,
)
from detrs.ops import deform_attn_reference
from detrs.query_position import QueryPosition
from detrs.structures import Images, Memory
from small_models import CONFIGS, batch

DIM, HEADS, QUERIES = 16, 4, 5
SHAPES = ((4, 6), (2, 3))
MODULES: dict[str, Any] = {
    "SelfAttention": lambda: SelfAttention(DIM, HEADS, 0.1),
    "DenseAttention": lambda: DenseAttention(DIM, HEADS, 0.1),
    "SeparateSelfAttention": lambda: SeparateSelfAttention(DIM, HEADS, 0.1),
    "ConditionalAttention": lambda: ConditionalAttention(DIM, HEADS, 0.1, add_position=False),
    "ConditionalAttention with positions": lambda: ConditionalAttention(DIM, HEADS, 0.1, add_position=True),
    "DeformableAttention": lambda: DeformableAttention(DIM, HEADS, len(SHAPES), 3),
}


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def random_memory() -> Memory:
    """Two images; the second has padding at the right: a half of each level."""
    num_tokens = sum(height * width for height, width in SHAPES)
    inside = [torch.arange(width) < width // 2 for _, width in SHAPES]
    padded = torch.cat([
        ~row.expand(height, -1).flatten() for row, (height, _) in zip(inside, SHAPES, strict=True)
    ])  # fmt: skip
    ratios = torch.ones(2, len(SHAPES), 2)
    ratios[1, :, 0] = torch.tensor([(width // 2) / width for _, width in SHAPES])
    mask = torch.stack([torch.zeros(num_tokens, dtype=torch.bool), padded])
    tokens, pos = torch.randn(2, num_tokens, DIM), torch.randn(2, num_tokens, DIM)
    return Memory(tokens, pos, mask, SHAPES, ratios)


def random_inputs(name: str, num_coordinates: int = 2) -> tuple[Any, tuple[Any, ...]]:
    """Return a module with random weights and its arguments."""
    module = MODULES[name]().eval()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    content = torch.randn(2, QUERIES, DIM)
    position = QueryPosition(
        torch.randn(2, QUERIES, DIM), torch.randn(2, QUERIES, DIM), torch.rand(2, QUERIES, num_coordinates)
    )
    attn_mask = torch.rand(QUERIES, QUERIES) > 0.7
    attn_mask.fill_diagonal_(False)
    return module, (content, position, attn_mask if "Self" in name else random_memory())


def test_every_attention_is_tested() -> None:
    names = {name for name, cls in inspect.getmembers(attention, inspect.isclass) if hasattr(cls, "project")}
    assert {name.split()[0] for name in MODULES} == names


@pytest.mark.parametrize("name", [name for name in MODULES if name != "DeformableAttention"])
def test_weights_times_values_are_the_output_of_dense_attention(name: str) -> None:
    module, arguments = random_inputs(name)
    inputs = module.project(*arguments)
    weights = dense_weights(inputs, HEADS)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, HEADS, QUERIES), rtol=0, atol=1e-12)
    values = (weights @ split_heads(inputs.value, HEADS)).transpose(1, 2).flatten(2)
    torch.testing.assert_close(module.out_proj(values), module(*arguments), rtol=0, atol=1e-10)
    if "Self" in name:
        assert (weights[:, :, arguments[2]] == 0).all()
    else:
        assert (weights[1].transpose(0, 2)[arguments[2].key_padding_mask[1]] == 0).all()


@pytest.mark.parametrize("name", ["ConditionalAttention", "ConditionalAttention with positions"])
def test_the_product_of_both_parts_of_conditional_attention_is_its_weights(name: str) -> None:
    """exp(a + b) = exp(a) exp(b): the parts are complete, and neither has a share of the other."""
    module, arguments = random_inputs(name)
    content, spatial = conditional_parts(module.project(*arguments), HEADS)
    product = content * spatial
    expected = dense_weights(module.project(*arguments), HEADS)
    torch.testing.assert_close(product / product.sum(-1, keepdim=True), expected, rtol=0, atol=1e-12)
    # The spatial part does not depend on the content
    changed = (torch.randn_like(arguments[0]), *arguments[1:])
    torch.testing.assert_close(conditional_parts(module.project(*changed), HEADS)[1], spatial)


@pytest.mark.parametrize("num_coordinates", [2, 4])
def test_values_at_the_points_are_the_output_of_deformable_attention(num_coordinates: int) -> None:
    module, arguments = random_inputs("DeformableAttention", num_coordinates)
    _, _, memory = arguments
    inputs = module.project(*arguments)
    points = sampled_points(inputs, memory)
    on_levels = points.locations * memory.valid_ratios[:, None, None, :, None]
    attended = deform_attn_reference(inputs.value, SHAPES, on_levels, points.weights)
    torch.testing.assert_close(module.output_proj(attended), module(*arguments), rtol=0, atol=1e-10)
    torch.testing.assert_close(
        points.weights.sum((-1, -2)), torch.ones(2, QUERIES, HEADS), rtol=0, atol=1e-12
    )


def test_a_point_without_offsets_is_at_the_reference() -> None:
    """Also in an image with padding: points are relative to the image without it."""
    module, arguments = random_inputs("DeformableAttention")
    torch.nn.init.zeros_(module.sampling_offsets.weight)
    torch.nn.init.zeros_(module.sampling_offsets.bias)
    points = sampled_points(module.project(*arguments), arguments[2])
    expected = arguments[1].reference[:, :, None, None, None].expand_as(points.locations)
    torch.testing.assert_close(points.locations, expected, rtol=0, atol=1e-12)


def detector_and_images(name: str) -> tuple[Any, Images]:
    torch.manual_seed(1)
    detector = zoo.build(CONFIGS[name]).detector.eval()
    images, _ = batch((1,), size=(64, 96))
    return detector, Images(images.pixels.double(), images.padding_mask)


@pytest.mark.parametrize("name", CONFIGS)
def test_recording_changes_nothing(name: str) -> None:
    detector, images = detector_and_images(name)
    before = {key: value.clone() for key, value in detector.state_dict().items()}
    with torch.no_grad():
        expected = detector(images).predictions
    found = explain(detector, images)
    assert torch.equal(found.outputs.predictions.logits, expected.logits)
    assert torch.equal(found.outputs.predictions.boxes, expected.boxes)
    assert len(found.layers) == len(expected.boxes)
    for layer, boxes in zip(found.layers, expected.boxes, strict=True):
        assert torch.equal(layer.boxes, boxes)
        kind = SampledPoints if name.startswith(("dino", "deformable")) else DenseWeights
        assert isinstance(layer.attention, kind)
        is_conditional = isinstance(layer.attention, DenseWeights) and layer.attention.spatial is not None
        assert is_conditional == name.startswith(("conditional", "dab"))
        assert (layer.reference is None) == name.startswith("detr")
    assert not any(module._forward_hooks for module in detector.modules())
    assert all(torch.equal(value, before[key]) for key, value in detector.state_dict().items())


def test_hooks_are_removed_after_an_error() -> None:
    detector, images = detector_and_images("detr")
    detector.decoder.box_heads[0] = torch.nn.Linear(3, 4)
    with pytest.raises(RuntimeError, match="shapes"):
        explain(detector, images)
    assert not any(module._forward_hooks for module in detector.modules())


def test_each_layer_attends_at_the_box_of_the_layer_before() -> None:
    """With refinement, and where the heads get what the next layer gets (no norm in between)."""
    detector, images = detector_and_images("deformable_refine")
    for module in detector.decoder.box_heads:
        torch.nn.init.normal_(module.layers[-1].weight)
    first, second = explain(detector, images).layers
    assert torch.equal(second.reference, first.boxes)
    assert first.reference.shape[-1] == 2
    assert not torch.equal(first.boxes, second.boxes)


@pytest.mark.parametrize(
    "name", ["dino", "dino_without", "deformable_two_stage", "deformable_two_stage_best_class"]
)
def test_proposals_are_those_that_became_queries(name: str) -> None:
    detector, images = detector_and_images(name)
    proposals = detector.queries.proposals
    for head in (proposals.class_head, proposals.box_head.layers[-1]):
        torch.nn.init.normal_(head.weight)
    found = explain(detector, images)
    assert found.proposals is not None
    assert torch.equal(found.proposals.boxes, found.layers[0].reference)
    assert (found.proposals.scores.diff(dim=1) <= 0).all()
    # The side of a prior is doubled with every level
    sides = proposals.size * 2.0 ** found.proposals.levels[..., None]
    torch.testing.assert_close(found.proposals.priors[..., 2:], sides.expand(-1, -1, 2), rtol=1e-9, atol=0)
    if name != "deformable_two_stage_best_class":  # whose best tokens are all on the finest level
        assert len(set(found.proposals.levels.flatten().tolist())) > 1


def test_other_models_have_neither_proposals_nor_denoising_queries() -> None:
    detector, images = detector_and_images("deformable")
    assert explain(detector, images).proposals is None
    _, targets = batch((2,))
    assert explain_denoising(detector, images, targets) is None


@pytest.mark.parametrize("name", ["dino", "dino_without"])
def test_denoising_queries_are_those_of_training(name: str) -> None:
    detector, images = detector_and_images(name)
    before = {key: value.clone() for key, value in detector.state_dict().items()}
    _, targets = batch((3,))
    targets = type(targets)(targets.labels, targets.boxes.double(), targets.counts)
    draws = detector.denoising.draw_by_image(targets.counts, 3, [7])
    record = explain_denoising(detector, images, targets, draws)
    assert record is not None
    expected = detector.denoising(targets, draws)
    assert torch.equal(record.queries.reference, expected.reference)
    assert not any(module.training for module in detector.modules())
    assert all(torch.equal(value, before[key]) for key, value in detector.state_dict().items())
    assert record.predictions.boxes.shape[2] == record.queries.num_queries
    assert torch.equal(record.attn_mask, plain_mask(record.queries, detector.queries.num_queries))


def plain_mask(noised: Any, num_matching: int) -> Tensor:
    """DINO, section 3.3: matching queries do not see denoising queries, and groups do not see each other."""
    num_denoising = noised.num_groups * noised.num_blocks * noised.max_targets
    size = noised.num_blocks * noised.max_targets
    total = num_denoising + num_matching
    mask = torch.zeros(total, total, dtype=torch.bool)
    for query in range(total):
        for other in range(num_denoising):
            mask[query, other] = query >= num_denoising or query // size != other // size
    return mask
