from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from detrs.criterion import Criterion, LossConfig
from detrs.structures import Detections, Images, Outputs, Predictions, Targets
from raydetr.data.batch import Batch, Sample, collate, to_model
from raydetr.data.transforms.pixels import LazyImage
from raydetr.evaluation.coco_metrics import coco_ap
from raydetr.evaluation.detections import PackedDetections
from raydetr.evaluation.evaluator import evaluate
from raydetr.shards.manifest import LabelMap

LABEL_MAP = LabelMap("contiguous", (3, 7), ("disc", "ring"))


class Detector(nn.Module):
    """Finds one box per image, whose class is the brighter of two channels."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.frozen = nn.Dropout().eval()
        self.seen_modes: list[tuple[bool, bool, bool]] = []

    def forward(self, images: Images) -> Outputs:
        self.seen_modes.append((self.training, torch.is_inference_mode_enabled(), torch.is_grad_enabled()))
        brightness = images.pixels.mean(dim=(2, 3))[:, :2] * self.scale
        boxes = torch.tensor([0.5, 0.5, 0.5, 0.25]).expand(len(brightness), 1, 4)
        return Outputs(Predictions(brightness[None, :, None], boxes[None]), None)


def postprocess(predictions: Predictions, sizes: Tensor) -> list[Detections]:
    scores, labels = predictions.logits[-1].sigmoid().max(-1)
    center, extent = predictions.boxes[-1][..., :2], predictions.boxes[-1][..., 2:] / 2
    boxes = torch.cat([center - extent, center + extent], dim=-1) * sizes.flip(1).repeat(1, 2)[:, None]
    queries = torch.arange(scores.shape[1]).expand(len(scores), -1)
    return [Detections(*parts) for parts in zip(scores, labels, boxes, queries, strict=True)]


def make_batch(*image_ids: int) -> Batch:
    samples = []
    for image_id in image_ids:
        pixels = np.random.default_rng(image_id).integers(0, 256, (8, 12, 3), np.uint8)
        pixels[..., image_id % 2] //= 2
        labels, boxes = np.array([image_id % 2]), np.array([[2.0, 1.0, 8.0, 3.0]])
        samples.append(Sample(LazyImage.unresized(pixels), labels, boxes, image_id, (80, 120)))
    return collate(samples, position=0)


def truth(num_images: int) -> dict[str, Any]:
    annotations = [
        {"id": i, "image_id": i, "category_id": (3, 7)[1 - i % 2], "bbox": [30.0, 30.0, 60.0, 25.0]}
        for i in range(num_images)
    ]
    categories = [{"id": 3, "name": "disc"}, {"id": 7, "name": "ring"}]
    return {
        "images": [{"id": i} for i in range(num_images)],
        "annotations": annotations,
        "categories": categories,
    }


def test_results_are_in_pixels_and_category_ids() -> None:
    packed = evaluate(Detector(), postprocess, iter([make_batch(0, 1), make_batch(2)]), LABEL_MAP)
    results = packed.results()
    assert results.image_ids.tolist() == packed.evaluated_ids.tolist() == [0, 1, 2]
    assert results.category_ids.tolist() == [7, 3, 7]
    assert results.boxes_xywh[0].tolist() == pytest.approx([30, 30, 60, 20])
    assert 0 < results.scores[0] < 1
    assert (packed.seconds > 0).all()
    assert packed.ended[0] == packed.ended[1] < packed.ended[2]
    assert packed.ended[2] >= packed.seconds.sum()
    assert packed.image_losses() == {}


def test_the_arrays_have_the_loss_of_each_image() -> None:
    """Also of those beside an image whose loss is not finite, which does not end the evaluation."""
    criterion = Criterion(LossConfig(), giou_eps=1e-6)
    batches = [make_batch(0, 1), make_batch(2)]
    detector = Detector()
    packed = evaluate(detector, postprocess, iter(batches), LABEL_MAP, criterion=criterion)
    expected = {}
    for batch in batches:
        images, targets = to_model(batch, "cpu")
        outputs = detector(images)
        for row, image_id in enumerate(batch.image_ids.tolist()):
            only = Predictions(outputs.predictions.logits[:, [row]], outputs.predictions.boxes[:, [row]])
            target = Targets(targets.labels[[row]], targets.boxes[[row]], (1,))
            expected[image_id] = criterion(Outputs(only), target, 1.0).total.item()
    assert packed.image_losses() == pytest.approx(expected, rel=1e-6)
    assert packed.of_images([2]).image_losses() == pytest.approx({2: expected[2]}, rel=1e-6)

    class Diverged(Detector):
        def forward(self, images: Images) -> Outputs:
            found = super().forward(images).predictions
            return Outputs(
                Predictions(found.logits * (np.nan if len(images.pixels) == 2 else 1), found.boxes)
            )

    packed = evaluate(Diverged(), postprocess, iter(batches), LABEL_MAP, criterion=criterion)
    assert packed.image_losses() == pytest.approx({2: expected[2]}, rel=1e-6)
    assert np.isnan(packed.losses[:2]).all()


def test_the_arrays_are_what_the_model_returned_bit_for_bit() -> None:
    """And COCO's boxes are computed from them in float64, as from Python's numbers."""
    kept: list[Detections] = []

    def keep(predictions: Predictions, sizes: Tensor) -> list[Detections]:
        found = postprocess(predictions, sizes)
        odd = [replace(d, boxes_xyxy=d.boxes_xyxy * 1.2345678 + 0.1) for d in found]
        kept.extend(odd)
        return odd

    packed = evaluate(Detector(), keep, iter([make_batch(0, 1), make_batch(2)]), LABEL_MAP)
    assert (packed.boxes_xyxy.dtype, packed.scores.dtype) == (np.float32, np.float32)
    assert torch.equal(torch.from_numpy(packed.boxes_xyxy), torch.cat([d.boxes_xyxy for d in kept]))
    assert torch.equal(torch.from_numpy(packed.scores), torch.cat([d.scores for d in kept]))
    left, top, right, bottom = kept[0].boxes_xyxy[0].tolist()
    result = packed.results().to_coco()[0]
    assert result["bbox"] == [left, top, right - left, bottom - top]
    assert result["score"] == kept[0].scores[0].item()


def test_the_forward_pass_alone_is_under_autocast() -> None:
    seen: list[tuple[str, bool]] = []

    class Watched(Detector):
        def forward(self, images: Images) -> Outputs:
            seen.append(("forward", torch.is_autocast_enabled("cpu")))
            return super().forward(images)

    def watch(predictions: Predictions, sizes: Tensor) -> list[Detections]:
        seen.append(("postprocess", torch.is_autocast_enabled("cpu")))
        return postprocess(predictions, sizes)

    batches = [make_batch(0), make_batch(1)]
    evaluate(Watched(), watch, iter(batches), LABEL_MAP, None, lambda: torch.autocast("cpu", torch.bfloat16))
    assert seen == [("forward", True), ("postprocess", False)] * 2


def test_modes_are_restored() -> None:
    detector = Detector().train()
    detector.frozen.eval()
    evaluate(detector, postprocess, iter([make_batch(0)]), LABEL_MAP)
    assert detector.seen_modes == [(False, True, False)]
    assert (detector.training, detector.frozen.training) == (True, False)

    def broken(predictions: Predictions, sizes: Tensor) -> list[Detections]:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        evaluate(detector, broken, iter([make_batch(0)]), LABEL_MAP)
    assert (detector.training, detector.frozen.training) == (True, False)


def test_sharded_equals_single_to_the_last_digit() -> None:
    batches = [make_batch(*range(start, min(start + 3, 20))) for start in range(0, 20, 3)]
    single = evaluate(Detector(), postprocess, iter(batches), LABEL_MAP)
    expected = coco_ap(truth(20), single.results()).to_dict()
    assert 0 < expected["AP"] < 1
    for world_size in (2, 3, 4):
        shares = []
        for rank in range(world_size):
            mine: list[Batch | None] = [*batches[rank::world_size]]
            padding: list[Batch | None] = [None] * (-(-len(batches) // world_size) - len(mine))
            shares.append(evaluate(Detector(), postprocess, iter(mine + padding), LABEL_MAP))
        sharded = PackedDetections.concatenate(shares)
        assert sharded.image_ids.tolist() != single.image_ids.tolist()
        assert coco_ap(truth(20), sharded.results()).to_dict() == expected


def test_a_rank_without_images_has_empty_arrays() -> None:
    packed = evaluate(Detector(), postprocess, iter([None]), LABEL_MAP)
    assert (len(packed.scores), len(packed.evaluated_ids), packed.boxes_xyxy.shape) == (0, 0, (0, 4))
    assert PackedDetections.from_npz(packed.to_npz()).boxes_xyxy.shape == (0, 4)


def test_arrays_survive_their_file_and_a_corrupt_file_is_named(tmp_path: Path) -> None:
    packed = evaluate(Detector(), postprocess, iter([make_batch(0, 1), make_batch(2)]), LABEL_MAP)
    file = tmp_path / "00000.npz"
    file.write_bytes(packed.to_npz())
    read = PackedDetections.from_npz(file)
    for field in fields(PackedDetections):
        before, after = getattr(packed, field.name), getattr(read, field.name)
        assert before.dtype == after.dtype
        assert before.tobytes() == after.tobytes()
    only = read.of_images([2, 99])
    assert (only.image_ids.tolist(), only.evaluated_ids.tolist(), len(only.boxes_xyxy)) == ([2], [2], 1)
    file.write_bytes(packed.to_npz()[:-50])
    with pytest.raises(ValueError, match=r"00000\.npz: not detections of an evaluation"):
        PackedDetections.from_npz(file)
    np.savez(file, **{**packed.__dict__, "scores": packed.scores[:1]})
    with pytest.raises(ValueError, match=r"00000\.npz: image_ids is int64\[3\], expected int64\[1\]"):
        PackedDetections.from_npz(file)
