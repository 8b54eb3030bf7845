"""Test the variants of the dense models that the official code does not have, against their equations."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import small_models
from detrs.neck import LearnedEncoding
from detrs.official_names import from_official, to_official
from detrs.queries import AnchorQueries, PositionQueries
from detrs.query_position import QueryPosition
from detrs.zoo import BackboneConfig, ConditionalDetrConfig, DabDetrConfig, DetrConfig, Model, build


def build_double(config: ConditionalDetrConfig | DabDetrConfig) -> Model:
    """Build with random weights in place of the zeros, which would hide differences."""
    torch.manual_seed(0)
    model = build(config)
    model.detector.double().eval()
    for parameter in model.detector.parameters():
        if parameter.abs().max() == 0:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def plain_sine(coordinate: float, dim: int) -> list[float]:
    angles = [2 * math.pi * coordinate / 10000 ** (2 * i / dim) for i in range(dim // 2)]
    return [value for angle in angles for value in (math.sin(angle), math.cos(angle))]


def test_learned_points_follow_the_equations_of_the_paper() -> None:
    """Conditional DETR, section 3.3: p_s = sinusoidal(sigmoid(s)), scaled from the second layer on, and equation 1:
    b = sigmoid(FFN(f) + [s, 0, 0]), for a free parameter s per query."""
    config = ConditionalDetrConfig(**small_models.SMALL, reference_point="learned")
    detector = build_double(config).detector
    positions: list[QueryPosition] = []
    contents: list[Tensor] = []
    for layer in detector.decoder.layers:
        layer.register_forward_pre_hook(lambda _, inputs: positions.append(inputs[1]))
        layer.register_forward_hook(lambda _, __, output: contents.append(output))
    images, _ = small_models.batch((1, 1))
    boxes = detector(replace(images, pixels=images.pixels.double())).predictions.boxes
    assert isinstance(detector.queries, PositionQueries)
    assert detector.queries.points is not None
    points = detector.queries.points.weight
    rows = []
    for x, y in points.sigmoid().tolist():
        rows.append(plain_sine(y, config.hidden_dim // 2) + plain_sine(x, config.hidden_dim // 2))
    encoding = torch.tensor(rows, dtype=torch.float64)
    scales = [torch.ones(()), detector.decoder.query_position.scale(contents[0])]
    for layer, position in enumerate(positions):
        spatial = (scales[layer] * encoding).expand(2, -1, -1)
        assert position.spatial is not None
        torch.testing.assert_close(position.spatial, spatial, rtol=1e-12, atol=1e-12)
        deltas = detector.decoder.box_heads[0](detector.decoder.norm(contents[layer]))
        expected = torch.cat((deltas[..., :2] + points, deltas[..., 2:]), dim=-1).sigmoid()
        torch.testing.assert_close(boxes[layer], expected, rtol=1e-12, atol=1e-12)
    boxes.sum().backward()
    assert points.grad is not None
    assert (points.grad != 0).all()


def test_fixed_points_stay_and_sides_are_trained() -> None:
    config = small_models.CONFIGS["dab_fixed_points"]
    model = build(config)
    queries = model.detector.queries
    assert isinstance(queries, AnchorQueries)
    points, sides = queries.points.clone(), queries.anchors.weight.detach().clone()
    images, targets = small_models.batch((2, 1))
    optimizer = torch.optim.AdamW(model.detector.parameters(), lr=1e-2, weight_decay=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        model.criterion(model.detector(images, targets), targets, 3.0).total.backward()
        optimizer.step()
    assert torch.equal(queries.points, points)
    assert (queries.anchors.weight != sides).all()
    assert 0 < points.sigmoid().min() < 0.3 < 0.7 < points.sigmoid().max() < 1


def test_fixed_points_predict_as_trained_ones_from_one_official_checkpoint() -> None:
    fixed = small_models.CONFIGS["dab_fixed_points"]
    assert isinstance(fixed, DabDetrConfig)
    trained = replace(fixed, fixed_points=False)
    model, other = build_double(fixed), build_double(trained)
    official = to_official(fixed, model.detector.state_dict())
    assert official["refpoint_embed.weight"].shape == (10, 4)
    other.detector.load_state_dict(from_official(trained, official, other.detector.state_dict()))
    images, _ = small_models.batch((1, 1))
    images = replace(images, pixels=images.pixels.double())
    found, expected = (x.detector(images).predictions for x in (model, other))
    assert torch.equal(found.boxes, expected.boxes)
    assert torch.equal(found.logits, expected.logits)
    del official["refpoint_embed.weight"]
    with pytest.raises(ValueError, match=r"missing 2 .*refpoint_embed"):
        from_official(fixed, official, model.detector.state_dict())


def test_without_self_attention_queries_do_not_interact() -> None:
    config = DabDetrConfig(**small_models.SMALL, decoder_self_attention=False)
    detector = build_double(config).detector
    images, _ = small_models.batch((1,))
    images = replace(images, pixels=images.pixels.double())
    before = detector(images).predictions
    assert isinstance(detector.queries, AnchorQueries)
    detector.queries.anchors.weight.data[3] += 0.5
    after = detector(images).predictions
    others = [query for query in range(10) if query != 3]
    assert torch.equal(after.boxes[:, :, others], before.boxes[:, :, others])
    assert (after.boxes[:, :, 3] != before.boxes[:, :, 3]).any()


def test_a_learned_encoding_has_a_vector_per_column_and_per_row() -> None:
    encoding = LearnedEncoding(8)
    found = encoding(3, 50)
    for row, column in ((0, 0), (2, 49), (1, 7)):
        expected = [*encoding.columns.weight[column].tolist(), *encoding.rows.weight[row].tolist()]
        assert found[row, column].tolist() == expected
    with pytest.raises(ValueError, match=r"model.position_encoding.*51 wide and 3 high.*'sine'"):
        encoding(3, 51)


def test_an_image_too_large_for_a_learned_encoding_is_refused() -> None:
    small = {**small_models.SMALL, "backbone": BackboneConfig("small", "batch", 0, dilation=True)}
    detector = build(DetrConfig(**small, position_encoding="learned")).detector.eval()
    images, _ = small_models.batch((1,), size=(16, 816))
    with pytest.raises(ValueError, match="51 wide and 1 high"):
        detector(images)


def test_detr_with_a_sigmoid_loss_has_no_no_object_class() -> None:
    """As in table 1 of the Deformable DETR paper, with the classifier and detections of that paper's code."""
    model = build(small_models.CONFIGS["detr_focal"])
    images, targets = small_models.batch((2, 1))
    outputs = model.detector.eval()(images)
    assert outputs.predictions.logits.shape[-1] == 4
    assert model.detector.decoder.class_heads[0].bias.sigmoid().tolist() == pytest.approx([0.01] * 4)
    assert "loss_ce" in model.criterion(outputs, targets, 3.0).terms
    (detections, _) = model.postprocess(outputs.predictions, torch.tensor([[64, 96]] * 2))
    scores = outputs.predictions.logits[-1, 0].sigmoid().flatten()
    torch.testing.assert_close(detections.scores, scores.sort(descending=True).values)  # of all 40 pairs
