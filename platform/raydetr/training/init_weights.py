"""Initialize the weights of a new run: from a checkpoint (`init.checkpoint`), or at random.

Weights that do not depend on the classes are kept. The rows of the class heads are those of the classes with the same
names; classes that the checkpoint does not have keep their new rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from detrs import zoo
from detrs.official_names import CLASS_DEPENDENT
from detrs.zoo import ModelConfig
from raydetr.config import ConfigError, RunConfig
from raydetr.locations import scheme_of
from raydetr.shards.manifest import UNUSED, LabelMap, make_label_map
from raydetr.store.folders import open_folder
from raydetr.training.checkpoint import load_for_inference, model_differences, read_meta, run_config

IMAGENET = "https://download.pytorch.org/models/"
IMAGENET_FILES = {
    "resnet18": "resnet18-f37072fd.pth",
    "resnet34": "resnet34-b627a593.pth",
    "resnet50": "resnet50-0676ba61.pth",
    "resnet101": "resnet101-63fe2227.pth",
}
MAX_ROWS = 20  # of the table of classes
# Model settings on which the weights that are kept do not depend
_IGNORED = (
    "num_classes",
    "dropout",
    "aux_loss",
    "num_select",
    "loss.class_",
    "loss.box_",
    "loss.giou_",
    "loss.alpha",
    "loss.gamma",
    "loss.no_object",
    "backbone.weights",
    "backbone.num_frozen",
)


def summarize(config: RunConfig, label_map: LabelMap) -> list[str]:
    """Return lines about the initial weights of a new run, to print before it starts.

    Args:
        config: of the run, resolved.
        label_map: of the run.

    Raises:
        CheckpointError: `init.checkpoint` is not a complete checkpoint.
        ConfigError: there is no such folder, or its weights do not fit the model; the message names the differences.
    """
    if config.init.checkpoint is None:
        return _describe_backbone(config)
    folder = open_folder(config.init.checkpoint)
    if not folder.exists() and not (folder / "meta.json").exists():
        raise ConfigError(
            f"init.checkpoint {config.init.checkpoint}: no such folder; name a checkpoint of a run, or write one "
            "from an official file with `raydetr import-checkpoint`"
        )
    if config.model.backbone.weights is not None:
        raise ConfigError(
            f"model.backbone.weights {config.model.backbone.weights} has no effect with init.checkpoint, which has all "
            "weights: omit one of them"
        )
    meta = read_meta(folder)
    source = run_config(folder, meta)
    check_shapes(source, config)
    lines = [f"starting from {config.init.checkpoint}"]
    differences = model_differences(source, config, ignored=_IGNORED)
    if differences:
        lines.append(f"note: its model has other settings: {', '.join(differences)}")
    return lines + _describe_rows(make_label_map(meta.categories, source.data.label_map), label_map)


def _describe_rows(source: LabelMap, label_map: LabelMap) -> list[str]:
    """Return a table of the classes whose weights are taken from a checkpoint."""
    rows = matching_labels(source, label_map)
    names = {label: name for label, name in enumerate(label_map.names) if name != UNUSED}
    if list(rows.items()) == [(label, label) for label in names]:
        return [f"classes: all {len(names)} are taken from it, with the same labels"]
    lines = [f"classes: {len(rows)} of {len(names)} are taken from it, by name; the others start at random"]
    lines += [f"  {'label':>5}  {'in the checkpoint':>17}  class"]
    table = [f"  {label:>5}  {rows.get(label, 'new'):>17}  {name}" for label, name in names.items()]
    more = [f"  and {len(table) - MAX_ROWS} more"] if len(table) > MAX_ROWS else []
    return lines + table[:MAX_ROWS] + more


def matching_labels(source: LabelMap, label_map: LabelMap) -> dict[int, int]:
    """Return the label in `source` of each label of `label_map` whose name is in both."""
    labels = {name: label for label, name in enumerate(source.names)}
    names = enumerate(label_map.names)
    return {label: labels[name] for label, name in names if name in labels and name != UNUSED}


def load(detector: nn.Module, config: RunConfig, label_map: LabelMap) -> None:
    """Load the weights of `init.checkpoint`, if it is set, into the new detector of a run with this label map.

    Raises:
        CheckpointError: it is not a complete checkpoint.
        ConfigError: its weights do not fit the model.
    """
    if config.init.checkpoint is None:
        return
    loaded = load_for_inference(open_folder(config.init.checkpoint))
    check_shapes(loaded.config, config)
    weights = loaded.model.detector.state_dict()
    rows = matching_labels(loaded.label_map, label_map)
    sizes = loaded.config.model.num_classes, config.model.num_classes
    for name, own in detector.state_dict().items():
        if CLASS_DEPENDENT.fullmatch(name):
            weights[name] = _take_rows(weights[name], own, rows, *sizes)
    detector.load_state_dict(weights)


def _take_rows(
    given: Tensor, own: Tensor, rows: Mapping[int, int], num_given: int | None, num_own: int | None
) -> Tensor:
    """Return `own` with the rows of `given`, by label, and with those that follow the classes ("no object")."""
    assert num_given is not None
    assert num_own is not None
    taken = own.clone()
    taken[list(rows)] = given[list(rows.values())]
    if len(own) - num_own == len(given) - num_given:  # a sigmoid head has none
        taken[num_own:] = given[num_given:]
    return taken


def check_shapes(source: RunConfig, config: RunConfig) -> None:
    """Check that the weights of a checkpoint fit the model of a run, except for the number of classes.

    Args:
        source: configuration of the checkpoint.
        config: of the run.

    Raises:
        ConfigError: they do not, or the checkpoint is of another architecture.
    """
    start, model = source.model, config.model
    if start.architecture != model.architecture:
        raise ConfigError(
            f"init.checkpoint {config.init.checkpoint}: holds weights of {start.architecture}, and the run trains "
            f"{model.architecture}: use a recipe of {start.architecture}, or another checkpoint"
        )
    given, own = _shapes(start), _shapes(model)
    different = [name for name in own if name in given and own[name] != given[name]]
    wrong = sorted(own.keys() ^ given.keys()) + [
        name for name in different if not CLASS_DEPENDENT.fullmatch(name) or own[name][1:] != given[name][1:]
    ]
    if wrong:
        raise ConfigError(
            f"init.checkpoint {config.init.checkpoint}: weights of another {model.architecture} model: "
            f"{', '.join(model_differences(source, config))} (first parameter that differs: {wrong[0]})"
        )


def _describe_backbone(config: RunConfig) -> list[str]:
    backbone = config.model.backbone
    if backbone.weights is not None and not _exists(backbone.weights):
        raise ConfigError(
            f"model.backbone.weights {backbone.weights}: no such file; give the path or URL of a torchvision "
            f"state dict, for example {IMAGENET}{IMAGENET_FILES.get(backbone.name, IMAGENET_FILES['resnet50'])}"
        )
    is_frozen = backbone.norm == "frozen" or backbone.num_frozen_stages > 0
    if backbone.weights is not None or not is_frozen:
        return []
    return [
        "warning: model.backbone.weights is not set: the backbone starts from random numbers, and its frozen layers "
        "stay random. Give ImageNet weights, for example model.backbone.weights="
        f"{IMAGENET}{IMAGENET_FILES.get(backbone.name, IMAGENET_FILES['resnet50'])}, or set init.checkpoint"
    ]


def _exists(weights: str) -> bool:
    return scheme_of(weights) in ("http", "https") or Path(weights).is_file()


def _shapes(model: ModelConfig) -> Mapping[str, torch.Size]:
    with torch.device("meta"):  # shapes without memory
        built = zoo.build(replace(model, backbone=replace(model.backbone, weights=None)))
    return {name: tensor.shape for name, tensor in built.detector.state_dict().items()}
