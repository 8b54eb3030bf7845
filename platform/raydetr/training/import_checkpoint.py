"""Convert official checkpoints into checkpoints of this project, to evaluate, predict with, or fine-tune from.

An official file holds parameters only. The settings come from the recipe that it fits, the categories from the table of
COCO's 80 below or from an annotation file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from detrs import zoo
from detrs.checkpoints import OfficialFile, read_official, require_finite
from detrs.official_names import from_official, official_names, recognize_architecture
from detrs.zoo import ModelConfig
from raydetr import recipes
from raydetr.config import RunConfig, nearest, override, to_dict
from raydetr.shards.coco import read_categories
from raydetr.store.output_folder import atomic_folder
from raydetr.training.checkpoint import write

_UNUSED = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}  # COCO's ids are 1 to 90 without these

_NAMES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow",
    "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee",
    "skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard",
    "tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple",
    "sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch",
    "potted plant", "bed", "dining table", "toilet", "tv", "laptop", "mouse", "remote", "keyboard",
    "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock", "vase", "scissors",
    "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip

COCO_CATEGORIES: list[dict[str, Any]] = [
    {"id": category_id, "name": name}
    for category_id, name in zip((i for i in range(1, 91) if i not in _UNUSED), _NAMES, strict=True)
]


@dataclass(frozen=True)
class ImportedCheckpoint:
    """Summary of a conversion."""

    recipe: str  # its settings are in the checkpoint
    architecture: str
    num_classes: int
    num_parameters: int  # including the statistics of batch norm
    categories: list[dict[str, Any]]
    notes: list[str]


def import_checkpoint(
    file: Path, model: str, out: Path, annotations: Path | None = None, *, ema: bool = False
) -> ImportedCheckpoint:
    """Convert an official checkpoint into a checkpoint folder.

    Args:
        file: the official .pth file.
        model: a recipe (`dino_r50_4scale_12ep`), a recipe without its epochs (`dino_r50_4scale`), or an architecture
            (`dino`), of whose recipes the one that fits is chosen.
        out: the folder to write; new or empty.
        annotations: a COCO JSON file with the categories that the model was trained on; None: COCO's 80.
        ema: take the EMA weights (`ema_model`) of the file.

    Raises:
        ValueError: the file is not a checkpoint, or not of this model (the message names what was found), has weights
            that are NaN or infinite, the name of the model is unknown, or the categories do not fit its number of
            classes.
        OSError: `out` cannot be written.
    """
    candidates = _candidates(model)
    content = read_official(file)
    if ema and content.ema_model is None:
        raise ValueError(f"{file}: has no EMA weights (ema_model): omit --ema")
    official = content.ema_weights() if ema else content.weights
    require_finite(official, file)
    architecture = recognize_architecture(official)
    expected = candidates[0].model.architecture
    if architecture != expected:
        raise ValueError(
            f"{file}: {_found(official)}, not a checkpoint of {expected}"
            + (f": use --model {architecture}" if architecture else "")
        )
    config, state = _find_match(file, model, candidates, official)
    categories, label_map = _categories(file, _num_classes(config.model), annotations)
    config = override(config, {"data.label_map": label_map, "init.checkpoint": None})
    meta = {
        "config": to_dict(config),
        "categories": categories,
        "fingerprint": "",  # matches no data: a run can start from its weights, but not resume it
        "epoch": 0,
        "position": 0,
    }
    with atomic_folder(out, last="meta.json") as folder:
        write(folder, {"model": state, "ema": None}, meta)
    num_parameters = sum(tensor.numel() for tensor in state.values())
    return ImportedCheckpoint(
        config.recipe,
        expected,
        _num_classes(config.model),
        num_parameters,
        categories,
        _notes(content, ema),
    )


def _notes(content: OfficialFile, ema: bool) -> list[str]:
    notes = []
    if content.ema_model is not None and not ema:
        notes.append("the file also has EMA weights (ema_model), which are usually better: --ema takes them")
    if content.omitted:
        notes.append(f"objects of {', '.join(content.omitted)} in the file were not loaded")
    return notes


def _candidates(model: str) -> list[RunConfig]:
    """Return the recipes that a name can stand for, one per different model."""
    known: dict[str, list[RunConfig]] = {}
    official = [recipe for recipe in recipes.RECIPES if _is_official(recipe.__name__)]
    for config in (recipe() for recipe in official):
        for name in {config.recipe, _without_epochs(config.recipe), config.model.architecture}:
            same = [other.model for other in known.setdefault(name, [])]
            if config.model not in same:
                known[name].append(config)
    if model not in known:
        raise ValueError(f"--model {model}: no such recipe or architecture{nearest(model, known)}")
    return known[model]


def _find_match(
    file: Path, model: str, candidates: list[RunConfig], official: Mapping[str, Tensor]
) -> tuple[RunConfig, dict[str, Tensor]]:
    """Return the one candidate that the file's parameters fit, with its number of classes, and the state dict."""
    matches: list[tuple[RunConfig, dict[str, Tensor]]] = []
    mismatches: list[str] = []
    for candidate in candidates:
        own = _meta_state(candidate.model, 1)
        num_classes = _count_classes(candidate.model, own, official)
        config = override(candidate, {"model.num_classes": num_classes})
        try:
            state = from_official(config.model, official, _meta_state(config.model, num_classes))
            matches.append((config, state))
        except ValueError as error:
            mismatches.append(f"{_without_epochs(candidate.recipe)}: {error}")
    if not matches:
        raise ValueError(f"{file}: {_found(official)}, but {'; '.join(mismatches)}")
    names = [_without_epochs(config.recipe) for config, _ in matches]
    if len(matches) > 1:
        raise ValueError(
            f"{file}: the parameters fit {' and '.join(names)}, which differ in settings that a checkpoint does "
            f"not show: give --model {names[0]}, or another of them, instead of {model}"
        )
    return matches[0]


def _count_classes(model: ModelConfig, own: Mapping[str, Tensor], official: Mapping[str, Tensor]) -> int:
    """Return the number of classes of the file's class head; 91 (COCO's ids) if it has no such parameter."""
    head = next(name for name in own if re.fullmatch(r"decoder\.class_heads\.0\.(.*\.)?weight", name))
    given = official.get(official_names(model, own)[head][0])
    if given is None or not given.shape:
        return 91
    return max(1, given.shape[0] - (model.loss.kind == "cross_entropy"))  # minus "no object"


def _meta_state(model: ModelConfig, num_classes: int) -> dict[str, Tensor]:
    """Return the state dict of a model on the meta device: names and shapes, no data."""
    with torch.device("meta"):
        built = zoo.build(
            replace(model, num_classes=num_classes, backbone=replace(model.backbone, weights=None))
        )
    return built.detector.state_dict()


def _categories(file: Path, num_classes: int, annotations: Path | None) -> tuple[list[dict[str, Any]], str]:
    """Return the categories, and the kind of the label map of the model."""
    categories = COCO_CATEGORIES if annotations is None else read_categories(annotations)
    last = max(category["id"] for category in categories)
    if num_classes == last + 1:
        return categories, "category_id"
    if num_classes == len(categories):
        return categories, "contiguous"
    # The official code may have unused outputs at the end
    if annotations is not None and num_classes > last + 1:
        return categories, "category_id"
    source = "COCO has" if annotations is None else f"{annotations} has"
    remedy = (
        "give the annotations it was trained on, as --annotations FILE"
        if annotations is None
        else "these are not the annotations that it was trained on"
    )
    raise ValueError(
        f"{file}: a model of {num_classes} classes, but {source} {len(categories)} categories with ids up to "
        f"{last}: {remedy}"
    )


def _found(official: Mapping[str, Tensor]) -> str:
    first = ", ".join(sorted(official)[:2])
    what = recognize_architecture(official) or "none of the five architectures"
    return f"a checkpoint of {what} ({len(official)} tensors: {first}, ...)"


def _num_classes(model: ModelConfig) -> int:
    assert model.num_classes is not None
    return model.num_classes


def _is_official(recipe: str) -> bool:
    return _without_epochs(recipe) != recipe


def _without_epochs(recipe: str) -> str:
    return re.sub(r"_\d+ep$", "", recipe)
