"""Benchmark matcher and criterion against a straightforward implementation, at DINO's sizes, on one CPU thread.

    make bench-criterion

The straightforward implementation matches and scores layer by layer, with the class cost of all classes, distances to
the targets of all images, and one-hot targets. Both run alternately and give the same loss. The script prints a table
and writes build/bench/criterion.json, a list of {batch, targets, direction, ours_ms, plain_ms, ratio}. Times are CPU
times; ratios are medians over pairs of runs.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from detrs.criterion import Criterion, LossConfig
from detrs.structures import Denoised, FirstStage, Outputs, Predictions, Targets

OUT = Path("build/bench/criterion.json")
NUM_LAYERS, NUM_QUERIES, NUM_CLASSES, NUM_DENOISING = 6, 900, 91, 100
CASES = [(batch, targets) for batch in (2, 8) for targets in (1, 7, 20, 60)]


def main() -> None:
    """Measure all cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="pairs of runs per case")
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    ours = Criterion(LossConfig(), giou_eps=1e-6, denoising=True, first_stage="interm")
    rows = []
    print(f"{'batch':>5} {'targets':>7} {'direction':>17} {'ours ms':>9} {'plain ms':>9} {'ratio':>6}")
    for batch, num_targets in CASES:
        outputs, targets = synthetic(batch, num_targets)
        check_equal(ours, outputs, targets)
        for direction in ("forward", "forward+backward"):
            row = {"batch": batch, "targets": num_targets, "direction": direction}
            row |= measure(ours, outputs, targets, repeats, backward=direction != "forward")
            rows.append(row)
            print(
                f"{batch:5} {num_targets:7} {direction:>17} {row['ours_ms']:9.1f} {row['plain_ms']:9.1f} "
                f"{row['ratio']:6.2f}"
            )
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps(rows, indent=1) + "\n")


def synthetic(batch: int, num_targets: int) -> tuple[Outputs, Targets]:
    """Draw predictions of a six-layer DINO, and `num_targets` targets per image."""
    torch.manual_seed(0)

    def predictions(layers: int, queries: int) -> Predictions:
        logits = torch.randn(layers, batch, queries, NUM_CLASSES) - 4
        boxes = torch.rand(layers, batch, queries, 4) * 0.5 + 0.2
        return Predictions(logits.requires_grad_(), boxes.requires_grad_())

    total, groups = batch * num_targets, max(NUM_DENOISING // num_targets, 1)
    labels, boxes = torch.randint(0, NUM_CLASSES, (total,)), torch.rand(total, 4) * 0.3 + 0.3
    first = FirstStage(predictions(1, NUM_QUERIES), torch.zeros(batch, NUM_QUERIES, 4))
    denoised = Denoised(predictions(NUM_LAYERS, 2 * groups * num_targets), groups, num_targets)
    outputs = Outputs(predictions(NUM_LAYERS, NUM_QUERIES), first, denoised)
    return outputs, Targets(labels, boxes, (num_targets,) * batch)


def measure(
    ours: Criterion, outputs: Outputs, targets: Targets, repeats: int, *, backward: bool
) -> dict[str, float]:
    """Measure median times and ratio."""
    num_boxes = float(len(targets.labels))
    both = [lambda: ours(outputs, targets, num_boxes).total, lambda: plain_total(outputs, targets, num_boxes)]
    pairs = [tuple(cpu_milliseconds(run, backward) for run in both) for _ in range(repeats + 1)][1:]
    return {
        "ours_ms": round(median(a for a, _ in pairs), 2),
        "plain_ms": round(median(b for _, b in pairs), 2),
        "ratio": round(median(b / a for a, b in pairs), 3),
    }


def cpu_milliseconds(run: Callable[[], Tensor], backward: bool) -> float:
    """Return the CPU time of one run."""
    start = time.process_time()
    total = run()
    if backward:
        total.backward()
    return 1e3 * (time.process_time() - start)


def check_equal(ours: Criterion, outputs: Outputs, targets: Targets) -> None:
    """Raise unless both compute the same loss."""
    num_boxes = float(len(targets.labels))
    totals = ours(outputs, targets, num_boxes).total, plain_total(outputs, targets, num_boxes)
    torch.testing.assert_close(*totals, rtol=1e-4, atol=0)


def plain_total(outputs: Outputs, targets: Targets, num_boxes: float) -> Tensor:
    """Return the weighted loss, computed layer by layer."""
    assert outputs.first_stage is not None
    assert outputs.denoised is not None
    labels, boxes = targets.labels.split(targets.counts), targets.boxes.split(targets.counts)
    total = torch.zeros(())
    for predictions in (outputs.predictions, outputs.first_stage.predictions):
        for logits, predicted in zip(predictions.logits, predictions.boxes, strict=True):
            pairs = plain_match(logits, predicted, labels, boxes)
            total = total + plain_losses(logits, predicted, labels, boxes, pairs, num_boxes)
    denoised = outputs.denoised
    rows = torch.arange(denoised.max_targets).repeat(denoised.num_groups)
    starts = (
        torch.arange(denoised.num_groups).repeat_interleave(denoised.max_targets) * 2 * denoised.max_targets
    )
    fixed = [(starts + rows, rows)] * len(labels)
    for logits, predicted in zip(denoised.predictions.logits, denoised.predictions.boxes, strict=True):
        normalizer = num_boxes * denoised.num_groups
        total = total + plain_losses(logits, predicted, labels, boxes, fixed, normalizer)
    return total


Pairs = list[tuple[Tensor, Tensor]]  # for each image: queries, targets


@torch.no_grad()
def plain_match(
    logits: Tensor, predicted: Tensor, labels: tuple[Tensor, ...], boxes: tuple[Tensor, ...]
) -> Pairs:
    """Match one layer."""
    score = logits.flatten(0, 1).sigmoid()
    positive = 0.25 * (1 - score) ** 2 * -(score + 1e-8).log()
    negative = 0.75 * score**2 * -(1 - score + 1e-8).log()
    all_boxes, flat = torch.cat(boxes), predicted.flatten(0, 1)
    cost = 2 * (positive - negative)[:, torch.cat(labels)] + 5 * torch.cdist(flat, all_boxes, p=1)
    cost = cost - 2 * plain_giou(flat[:, None], all_boxes[None])
    cost = cost.view(*logits.shape[:2], -1).cpu()
    parts = cost.split([len(x) for x in labels], dim=-1)
    found = [linear_sum_assignment(part[i].numpy()) for i, part in enumerate(parts)]
    return [(torch.as_tensor(queries), torch.as_tensor(rows)) for queries, rows in found]


def plain_losses(
    logits: Tensor,
    predicted: Tensor,
    labels: tuple[Tensor, ...],
    boxes: tuple[Tensor, ...],
    pairs: Pairs,
    normalizer: float,
) -> Tensor:
    """Return the weighted losses of one layer."""
    one_hot = torch.zeros(*logits.shape[:2], NUM_CLASSES + 1)
    classes = torch.full(logits.shape[:2], NUM_CLASSES)
    for i, (queries, rows) in enumerate(pairs):
        classes[i, queries] = labels[i][rows]
    one_hot = one_hot.scatter(2, classes[..., None], 1)[..., :-1]
    score = logits.sigmoid()
    entropy = F.binary_cross_entropy_with_logits(logits, one_hot, reduction="none")
    missed = score * (1 - one_hot) + (1 - score) * one_hot
    focal = (0.25 * one_hot + 0.75 * (1 - one_hot)) * entropy * missed**2
    matched = torch.cat([predicted[i, queries] for i, (queries, _) in enumerate(pairs)])
    target_boxes = torch.cat([boxes[i][rows] for i, (_, rows) in enumerate(pairs)])
    l1, giou = (
        F.l1_loss(matched, target_boxes, reduction="sum"),
        (1 - plain_giou(matched, target_boxes)).sum(),
    )
    return (focal.sum() + 5 * l1 + 2 * giou) / normalizer


def plain_giou(a: Tensor, b: Tensor) -> Tensor:
    """Return generalized IoU, elementwise."""
    a, b = (torch.cat((x[..., :2] - x[..., 2:] / 2, x[..., :2] + x[..., 2:] / 2), -1) for x in (a, b))
    overlap = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0)
    hull = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).prod(-1)
    inter = overlap.prod(-1)
    union = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - inter
    return inter / (union + 1e-6) - (hull - union) / (hull + 1e-6)


if __name__ == "__main__":
    main()
