"""Draw what the queries of a checkpoint's detector look at in an image: the pictures with which the papers explain."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from detrs.boxes import to_xyxy
from detrs.explain import (
    DenseWeights,
    Explanation,
    LayerRecord,
    SampledPoints,
    explain,
    explain_denoising,
)
from detrs.structures import Detections, Images, Targets
from raydetr.console import counted
from raydetr.data.batch import to_model
from raydetr.inference.predict import open_image, to_batch
from raydetr.shards.images import ImageError
from raydetr.shards.manifest import UNUSED
from raydetr.store.output_folder import atomic_folder
from raydetr.training.checkpoint import LoadedModel, find, load_for_inference
from raydetr.visualization import attention as drawing
from raydetr.visualization.boxes import Box, draw_boxes

Array = NDArray[np.floating[Any]]

NUM_PROPOSALS = 10  # drawn, of the best
NUM_DETECTIONS = 3
DETECTIONS = "detections.jpg"
QUALITY = 90  # of the JPEG files


@dataclass(frozen=True)
class Picture:
    """A file that was written, and what it shows."""

    name: str
    caption: str


@dataclass(frozen=True)
class Detected:
    """A detection that is explained: the best of its query."""

    query: int
    label: int
    name: str
    score: float
    xyxy: Array  # [4], in pixels of the image

    @property
    def title(self) -> str:
        """Class and score."""
        return f"{self.name} {self.score:.2f}"


def explain_image(
    location: str | Path,
    image: Path,
    out: Path,
    *,
    num_detections: int = NUM_DETECTIONS,
    device: torch.device | str | None = None,
) -> list[Picture]:
    """Write pictures of what the queries with the best detections look at, into `out`.

    Args:
        location: folder or URL of a run (its best checkpoint), RUN/last, or the folder of a checkpoint.
        image: a file of any format that Pillow reads.
        out: the folder to write; new or empty.
        num_detections: number of queries to explain, those with the best detections.
        device: None: the GPU if there is one.

    Raises:
        CheckpointError: the checkpoint cannot be used.
        ValueError: the image cannot be read, or the output folder is not empty; the message names it.
        OSError: the output folder cannot be written.
    """
    if num_detections < 1:
        raise ValueError(f"num_detections is {num_detections}: give at least 1")
    if not image.exists():
        raise ValueError(f"{image}: no such file")
    if image.is_dir():
        raise ValueError(f"{image}: is a folder: name one image")
    try:
        picture, _ = open_image(image)
    except ImageError as error:
        raise ValueError(f"{image}: {error}") from None
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    pictures: list[Picture] = []
    with atomic_folder(out, last=DETECTIONS) as folder:
        loaded = load_for_inference(find(location), device)
        for name, caption, drawn in _draw(loaded, picture, num_detections, device):
            if isinstance(drawn, Figure):
                drawn.savefig(folder / name, pil_kwargs={"quality": QUALITY})
            else:
                drawn.save(folder / name, quality=QUALITY)
            pictures.append(Picture(name, caption))
    return pictures


def _draw(
    loaded: LoadedModel, image: Image.Image, num_detections: int, device: torch.device
) -> list[tuple[str, str, Figure | Image.Image]]:
    """Return file names, captions and pictures."""
    batch = to_batch(loaded, image, image_id=0)
    with torch.inference_mode():
        images, _ = to_model(batch, device)
        found = explain(loaded.model.detector, images)
        sizes = batch.original_sizes.to(device)
        (detections,) = loaded.model.postprocess(found.outputs.predictions, sizes)
        best = _best(detections, loaded, num_detections)
        boxes = tuple(Box(each.label, each.name, tuple(each.xyxy.tolist()), each.score) for each in best)
        pictures: list[tuple[str, str, Figure | Image.Image]] = [
            (
                DETECTIONS,
                f"The {counted(len(best), 'detection')} with the best scores, whose queries the others explain.",
                draw_boxes(image, boxes),
            )
        ]
        if isinstance(found.layers[0].attention, DenseWeights):
            pictures += _draw_dense(image, found, best)
        else:
            pictures += _draw_sampled(image, found, best)
        pictures.append(_draw_layers(image, found, best))
        if found.proposals is not None:
            pictures.append(_draw_proposals(image, found))
        pictures += _draw_denoising(image, images, loaded, best)
    return pictures


def _best(detections: Detections, loaded: LoadedModel, number: int) -> list[Detected]:
    """Return the best detection of each of the first queries; at least one, whatever its score."""
    best: dict[int, Detected] = {}
    rows = zip(
        detections.queries.tolist(),
        detections.labels.tolist(),
        detections.scores.tolist(),
        detections.boxes_xyxy.cpu().numpy(),
        strict=True,
    )
    names = loaded.label_map.names
    for query, label, score, xyxy in rows:
        # With data.label_map=category_id, some labels have no category
        name = names[label] if label < len(names) and names[label] != UNUSED else f"label {label}"
        if query not in best and len(best) < number:
            best[query] = Detected(query, label, name, score, xyxy)
    return list(best.values())


def _draw_dense(
    image: Image.Image, found: Explanation, best: list[Detected]
) -> list[tuple[str, str, Figure | Image.Image]]:
    maps, points = [], []
    for layer in found.layers:
        assert isinstance(layer.attention, DenseWeights)
        maps.append(layer.attention.combined[0].mean(0))
        points.append(None if layer.reference is None else _points(layer.reference[0, :, :2], image))
    rows = [
        drawing.MapRow(
            each.title,
            each.xyxy,
            np.stack([_on_grid(layer[each.query], found) for layer in maps]),
            None
            if points[0] is None
            else np.stack([layer[each.query] for layer in points if layer is not None]),
        )
        for each in best
    ]
    columns = [f"layer {i}" for i in range(1, len(maps) + 1)]
    pictures: list[tuple[str, str, Figure | Image.Image]] = [
        (
            "attention.jpg",
            "Cross-attention of each detection's query, the mean over the heads, in each decoder layer"
            + ("." if points[0] is None else "; + is the query's reference point."),
            drawing.draw_maps(image, rows, columns),
        )
    ]
    return [*pictures, _draw_heads(image, found, best[0])]


def _draw_heads(image: Image.Image, found: Explanation, shown: Detected) -> tuple[str, str, Figure]:
    last = found.layers[-1]
    weights = last.attention
    assert isinstance(weights, DenseWeights)
    kinds = {"spatial": weights.spatial, "content": weights.content, "combined": weights.combined}
    point = None if last.reference is None else _points(last.reference[0, shown.query, :2], image)
    rows = []
    for name, kind in kinds.items():
        if kind is not None:
            maps = np.stack([_on_grid(head, found) for head in kind[0, :, shown.query]])
            label = name if weights.spatial is not None else shown.title
            rows.append(
                drawing.MapRow(
                    label, shown.xyxy, maps, None if point is None else np.tile(point, (len(maps), 1))
                )
            )
    columns = [f"head {i}" for i in range(1, len(rows[0].maps) + 1)]
    caption = f"Cross-attention of the query of {shown.title} in the last decoder layer, head by head"
    if weights.spatial is not None:
        caption += ": from the spatial part alone, the content part alone, and both, as in Conditional DETR"
    return "heads.jpg", f"{caption}.", drawing.draw_maps(image, rows, columns)


def _draw_sampled(
    image: Image.Image, found: Explanation, best: list[Detected]
) -> list[tuple[str, str, Figure | Image.Image]]:
    layers = range(1, len(found.layers) + 1)
    rows = [
        drawing.SampleRow(
            each.title, each.xyxy, tuple(_samples(layer, each.query, image) for layer in found.layers)
        )
        for each in best
    ]
    shown, last = best[0], found.layers[-1]
    by_level = tuple(_samples(last, shown.query, image, level) for level in range(len(found.shapes)))
    return [
        (
            "points.jpg",
            "Sampled points of each detection's query in each decoder layer, of all heads and levels, colored by "
            "attention weight; + is the center of the reference.",
            drawing.draw_samples(image, rows, [f"layer {i}" for i in layers]),
        ),
        (
            "levels.jpg",
            f"Sampled points of the query of {shown.title} in the last decoder layer, level by level.",
            drawing.draw_samples(
                image,
                [drawing.SampleRow(shown.title, shown.xyxy, by_level)],
                [f"level {i}: {height}x{width}" for i, (height, width) in enumerate(found.shapes, 1)],
            ),
        ),
    ]


def _samples(layer: LayerRecord, query: int, image: Image.Image, level: int | None = None) -> drawing.Samples:
    """Return the points of a query, of one level or all."""
    assert isinstance(layer.attention, SampledPoints)
    assert layer.reference is not None
    locations, weights = (
        layer.attention.locations[0, query],
        layer.attention.weights[0, query],
    )  # [m, l, p, ...]
    if level is not None:
        locations, weights = locations[:, level], weights[:, level]
    return drawing.Samples(
        _points(locations.reshape(-1, 2), image),
        weights.flatten().cpu().numpy(),
        _reference(layer.reference[0, query], image),
    )


def _draw_layers(image: Image.Image, found: Explanation, best: list[Detected]) -> tuple[str, str, Figure]:
    first = found.layers[0].reference
    queries = [
        drawing.BoxesByLayer(
            each.title,
            None if first is None else _reference(first[0, each.query], image),
            np.stack([_corners(layer.boxes[0, each.query], image) for layer in found.layers]),
        )
        for each in best
    ]
    start = (
        ""
        if first is None
        else f", and the reference {'point' if first.shape[-1] == 2 else 'box'} it starts from"
    )
    caption = f"The box of each detection's query after each decoder layer{start}."
    return "boxes.jpg", caption, drawing.draw_boxes_by_layer(image, queries)


def _draw_proposals(image: Image.Image, found: Explanation) -> tuple[str, str, Figure]:
    proposals = found.proposals
    assert proposals is not None
    # A prior at infinity is of a token that cannot be a proposal, chosen where there are too few others
    finite = proposals.boxes[0].isfinite().all(-1) & proposals.priors[0].isfinite().all(-1)
    kept = finite.nonzero()[:NUM_PROPOSALS, 0]
    figure = drawing.draw_proposals(
        image,
        _corners(proposals.priors[0, kept], image),
        _corners(proposals.boxes[0, kept], image),
        proposals.scores[0, kept].cpu().numpy(),
        proposals.levels[0, kept].cpu().numpy(),
    )
    caption = (
        f"The encoder's {len(kept)} best proposals of {proposals.scores.shape[1]}: the square priors around their "
        "tokens, by level, and the boxes that it makes of them, with their scores."
    )
    return "proposals.jpg", caption, figure


def _draw_denoising(
    image: Image.Image, images: Images, loaded: LoadedModel, best: list[Detected]
) -> list[tuple[str, str, Figure | Image.Image]]:
    """Draw the denoising queries that a training step would make if the detections were its targets."""
    denoising = loaded.model.detector.denoising
    if denoising is None:
        return []
    scale = np.array([image.width, image.height] * 2)
    corners = np.stack([each.xyxy for each in best]) / scale
    corners = corners.clip(0, 1)
    boxes = np.concatenate([(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]], axis=1)
    device = images.pixels.device
    targets = Targets(
        torch.tensor([each.label for each in best], device=device),
        torch.tensor(boxes, dtype=images.pixels.dtype, device=device),
        (len(best),),
    )
    seeds = [0]  # the same picture every time
    draws = denoising.draw_by_image(targets.counts, len(best), seeds).to(device)
    record = explain_denoising(loaded.model.detector, images, targets, draws)
    assert record is not None
    noised = record.queries
    blocks = noised.reference[0, : noised.group_size].reshape(noised.num_blocks, len(best), 4)
    names = ["positives", "negatives"][: noised.num_blocks]
    denoised = record.predictions.boxes[-1][0, : len(best)]
    figure = drawing.draw_denoising(
        image,
        np.stack([each.xyxy for each in best]),
        [(name, _corners(block, image)) for name, block in zip(names, blocks, strict=True)],
        _corners(denoised, image),
    )
    about = f"as in training, with the {counted(len(best), 'detection')} as targets (dashed)"
    negatives = ", the negatives, which it must reject," if noised.num_blocks > 1 else ""
    mask = drawing.draw_mask(record.attn_mask.cpu().numpy(), noised.num_groups, noised.group_size)
    return [
        (
            "denoising.jpg",
            f"Denoising queries of the first group, {about}: the positives{negatives} and the boxes that the decoder "
            "makes of the positives.",
            figure,
        ),
        (
            "attention_mask.jpg",
            f"The attention mask between all queries in training: {counted(noised.num_groups, 'group')} of "
            f"{noised.group_size} denoising queries and the matching queries, which do not see any of them.",
            mask,
        ),
    ]


def _on_grid(weights: Tensor, found: Explanation) -> Array:
    """Return the weights of the tokens of a single level as a map."""
    ((height, width),) = found.shapes
    grid: Array = weights.reshape(height, width).cpu().numpy()
    return grid


def _points(points: Tensor, image: Image.Image) -> Array:
    """Convert points in [0, 1] to pixels of the image."""
    scaled: Array = points.cpu().numpy() * np.array([image.width, image.height])
    return scaled


def _corners(boxes: Tensor, image: Image.Image) -> Array:
    """Convert boxes in [0, 1] to corners in pixels of the image."""
    scaled: Array = to_xyxy(boxes).cpu().numpy() * np.array([image.width, image.height] * 2)
    return scaled


def _reference(reference: Tensor, image: Image.Image) -> Array:
    return _points(reference, image) if len(reference) == 2 else _corners(reference, image)
