"""Train the quickstart's DINO for a short time in three precisions: the last stage of `make gpu`.

bf16 and fp16 (with its scaler) must train as fp32 does: the loss falls, no weight is NaN, and the APs are close. The
data is the quickstart's, drawn in memory. The loop is plain torch, because Ray and the platform's other dependencies
may not be installed; the model and its loss are those of `detrs`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from average_precision import Objects, average_precision
from torch import Tensor

from detrs.boxes import to_xyxy
from detrs.ops import normalize_images
from detrs.structures import Images, Targets
from detrs.zoo import BackboneConfig, DinoConfig, LossConfig, Model, build
from raydetr.shards.synthetic import ORDINARY, SIDE, SPLITS, draw_image

# raydetr.recipes.quickstart_dino(), which needs pydantic; a test compares them
MODEL = DinoConfig(
    backbone=BackboneConfig(name="small", norm="batch", num_frozen_stages=0),
    num_feature_levels=3,
    hidden_dim=64,
    num_heads=4,
    num_encoder_layers=0,
    num_decoder_layers=2,
    ffn_dim=128,
    num_queries=25,
    proposal_size=0.1,
    shared_class_heads=False,
    shared_box_heads=False,
    num_denoising=8,
    denoising_groups="fill",
    loss=LossConfig(kind="mal", class_weight=2.0, gamma=1.5),
    num_select=100,
)
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # of ImageNet
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
LR, WARMUP, WEIGHT_DECAY, CLIP = 4e-3, 0.05, 1e-4, 0.1
Drawn = tuple[np.ndarray[Any, Any], list[int], list[list[float]]]  # pixels, labels, boxes cxcywh

AP_TOLERANCE = 0.06  # between precisions, whose weights differ ever more after the first step
MOST_SKIPPED = 0.05  # of the steps, by the scaler of fp16 while it finds its scale


@dataclass(frozen=True)
class Split:
    """Drawn images and their objects, on one device."""

    pixels: Tensor  # uint8 [n, 3, SIDE, SIDE]
    labels: list[Tensor]  # of each image
    boxes: list[Tensor]  # of each image, [t, 4] cxcywh in [0, 1]

    def batch(self, indices: Sequence[int], mirrored: bool) -> tuple[Images, Targets]:
        """Return a batch of the images with these indices."""
        device = self.pixels.device
        pixels = self.pixels[torch.tensor(indices, device=device)]
        boxes = torch.cat([self.boxes[index] for index in indices])
        if mirrored:
            pixels = pixels.flip(3)
            boxes = torch.cat((1 - boxes[:, :1], boxes[:, 1:]), dim=1)
        sizes = torch.full((len(indices), 2), SIDE, device=device)
        padding = torch.zeros(len(indices), SIDE, SIDE, dtype=torch.bool, device=device)
        labels = torch.cat([self.labels[index] for index in indices])
        counts = tuple(len(self.labels[index]) for index in indices)
        return Images(normalize_images(pixels, sizes, MEAN, STD), padding), Targets(labels, boxes, counts)


def main() -> None:
    """Train in every precision and compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="where to write a row for each precision")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument(
        "--images", type=int, nargs=2, default=(2400, 400), help="for training and for validation"
    )
    args = parser.parse_args()
    start = time.monotonic()
    train, val = draw(args.images, args.device)
    print(f"{sum(args.images)} images drawn in {time.monotonic() - start:.0f} s", flush=True)
    rows: list[dict[str, Any]] = []
    for name, dtype in PRECISIONS.items():
        rows.append({"precision": name, **run(dtype, train, val, args.steps, args.batch_size)})
        print(", ".join(f"{key} {_short(value)}" for key, value in rows[-1].items()), flush=True)
        if args.json is not None:
            args.json.write_text(json.dumps(rows, indent=1) + "\n")
    if problems := find_problems(rows):
        sys.exit("\n".join(problems))


def find_problems(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return what is wrong with the trainings, compared with the first, which is that in fp32."""
    problems = []
    for row in rows:
        name = row["precision"]
        if not row["finite"]:
            problems.append(f"{name}: a weight or a loss is NaN or infinite")
        if not row["last_loss"] < 0.7 * row["first_loss"]:
            problems.append(
                f"{name}: the loss fell from {row['first_loss']:.2f} to {row['last_loss']:.2f} only"
            )
        if row["skipped_steps"] > MOST_SKIPPED * row["steps"]:
            problems.append(f"{name}: {row['skipped_steps']} of {row['steps']} steps were skipped")
        if abs(row["ap"] - rows[0]["ap"]) > AP_TOLERANCE:
            problems.append(f"{name}: AP {row['ap']:.3f}, and {rows[0]['ap']:.3f} in fp32")
    return problems


def draw(counts: Sequence[int], device: str) -> tuple[Split, Split]:
    """Draw so many images for training and for validation, on all processors."""
    keys = [(split, index) for split, count in zip(SPLITS, counts, strict=True) for index in range(count)]
    with ProcessPoolExecutor(
        os.cpu_count()
    ) as pool:  # before CUDA is initialized, because the processes are forked
        drawn = list(pool.map(_draw_one, keys, chunksize=25))
    return _split(drawn[: counts[0]], device), _split(drawn[counts[0] :], device)


def _split(drawn: Sequence[Drawn], device: str) -> Split:
    pixels = torch.from_numpy(np.stack([image for image, _, _ in drawn])).permute(0, 3, 1, 2).contiguous()
    labels = [torch.tensor(labels, dtype=torch.int64, device=device) for _, labels, _ in drawn]
    boxes = [torch.tensor(boxes, dtype=torch.float32, device=device).reshape(-1, 4) for _, _, boxes in drawn]
    return Split(pixels.to(device), labels, boxes)


def _draw_one(key: tuple[str, int]) -> Drawn:
    image, shapes = draw_image(ORDINARY, 0, *key)
    boxes = []
    for shape in shapes:
        columns, rows = np.flatnonzero(shape.mask.any(0)), np.flatnonzero(shape.mask.any(1))
        x, y, right, bottom = (int(n) / SIDE for n in (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))
        boxes.append([(x + right) / 2, (y + bottom) / 2, right - x, bottom - y])
    return np.asarray(image), [shape.label for shape in shapes], boxes


def run(dtype: torch.dtype | None, train: Split, val: Split, steps: int, batch_size: int) -> dict[str, Any]:
    """Train and evaluate; return a row of the results."""
    torch.manual_seed(0)
    device = train.pixels.device
    model = build(replace(MODEL, num_classes=len(ORDINARY.class_names)))
    detector = model.detector.to(device).train()
    parameters = list(detector.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    order, losses = np.random.default_rng(0), []
    skipped = torch.zeros((), device=device)
    start = time.perf_counter()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LR * _lr_factor(step, steps)
        indices = order.choice(len(train.labels), batch_size, replace=False).tolist()
        images, targets = train.batch(indices, mirrored=bool(order.integers(2)))
        with torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None):
            outputs = detector(images, targets)
        loss = model.criterion(outputs, targets, float(max(len(targets.labels), 1))).total
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        skipped += ~norm.isfinite()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.detach())
    curve = torch.stack(losses).float().cpu()
    seconds = time.perf_counter() - start
    finite = bool(curve.isfinite().all()) and all(
        bool(p.isfinite().all()) for p in detector.state_dict().values()
    )
    tenth = max(1, steps // 10)
    return {
        "ap": evaluate(model, val, dtype),
        "first_loss": float(curve[:tenth].mean()),
        "last_loss": float(curve[-tenth:].mean()),
        "finite": finite,
        "skipped_steps": int(skipped),
        "steps": steps,
        "milliseconds_per_step": 1e3 * seconds / steps,
    }


def _lr_factor(step: int, steps: int) -> float:
    """Return warmup, then a cosine: the quickstart's schedule."""
    warmup = max(1, round(WARMUP * steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - 1 - warmup)))


@torch.no_grad()
def evaluate(model: Model, val: Split, dtype: torch.dtype | None) -> float:
    """Return the AP on a split."""
    model.detector.eval()
    found, truth = [], []
    for first in range(0, len(val.labels), 50):
        indices = list(range(first, min(first + 50, len(val.labels))))
        images, _ = val.batch(indices, mirrored=False)
        with torch.autocast(val.pixels.device.type, dtype or torch.bfloat16, enabled=dtype is not None):
            outputs = model.detector(images)
        sizes = torch.full((len(indices), 2), SIDE, device=val.pixels.device)
        for index, detections in zip(indices, model.postprocess(outputs.predictions, sizes), strict=True):
            found.append(_objects(detections.labels, detections.boxes_xyxy, detections.scores))
            boxes = to_xyxy(val.boxes[index]) * SIDE
            truth.append(_objects(val.labels[index], boxes, torch.ones(len(boxes))))
    return average_precision(truth, found)


def _objects(labels: Tensor, boxes: Tensor, scores: Tensor) -> Objects:
    return Objects(labels.cpu().numpy(), boxes.double().cpu().numpy(), scores.double().cpu().numpy())


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
