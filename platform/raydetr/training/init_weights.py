"""Initialize the weights of a new run: from a checkpoint (`init.checkpoint`), or at random.

Weights that do not depend on the number of classes are kept. Where that number differs, the class heads are
reinitialized.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from detrs import zoo
from detrs.checkpoints import CLASS_DEPENDENT
from detrs.zoo import ModelConfig
from raydetr.config import ConfigError, RunConfig
from raydetr.config.paths import is_remote
from raydetr.training.checkpoint import load_for_inference, model_differences, read_meta, run_config

IMAGENET = "https://download.pytorch.org/models/"
IMAGENET_FILES = {
    "resnet18": "resnet18-f37072fd.pth",
    "resnet34": "resnet34-b627a593.pth",
    "resnet50": "resnet50-0676ba61.pth",
    "resnet101": "resnet101-63fe2227.pth",
}
# Model settings on which the weights that are kept do not depend
_IGNORED = (
    "num_classes",
    "dropout",
    "aux_loss",
    "num_select",
    "loss.",
    "backbone.weights",
    "backbone.num_frozen",
)


def summarize(config: RunConfig, categories: Sequence[str]) -> list[str]:
    """Return lines about the initial weights of a new run, to print before it starts.

    Args:
        config: of the run, resolved.
        categories: names of the training data's categories.

    Raises:
        CheckpointError: `init.checkpoint` is not a complete checkpoint.
        ConfigError: there is no such folder, or its weights do not fit the model; the message names the differences.
    """
    if config.init.checkpoint is None:
        return _describe_backbone(config)
    if not config.init.checkpoint.is_dir():
        raise ConfigError(
            f"init.checkpoint {config.init.checkpoint}: no such folder; name a checkpoint of a run, or write one "
            "from an official file with `raydetr import-checkpoint`"
        )
    meta = read_meta(config.init.checkpoint)
    theirs = run_config(config.init.checkpoint, meta)
    reinitialized = reinitialized_names(theirs, config)
    lines = [f"starting from {config.init.checkpoint}"]
    differences = model_differences(theirs, config, ignored=_IGNORED)
    if differences:
        lines.append(f"note: its model has other settings: {', '.join(differences)}")
    if reinitialized:
        there, here = theirs.model.num_classes, config.model.num_classes
        lines.append(
            f"reinitialized, because it has {there} classes and the data {here}: {', '.join(reinitialized)}; "
            "all other weights are kept"
        )
    elif categories != [category["name"] for category in meta.categories]:
        lines.append(
            "note: it was trained on the same number of classes, but with other names; its class heads are kept"
        )
    return lines


def load(detector: nn.Module, config: RunConfig) -> None:
    """Load the weights of `init.checkpoint`, if there is one, into a new detector.

    Raises:
        CheckpointError: it is not a complete checkpoint.
        ConfigError: its weights do not fit the model.
    """
    folder = config.init.checkpoint
    if folder is None:
        return
    reinitialized = reinitialized_names(run_config(folder, read_meta(folder)), config)
    weights = load_for_inference(folder).model.detector.state_dict()
    detector.load_state_dict({**weights, **{name: detector.state_dict()[name] for name in reinitialized}})


def reinitialized_names(start: RunConfig, config: RunConfig) -> list[str]:
    """Return the names of the parameters that are not loaded: those per class, if the number of classes differs.

    Raises:
        ConfigError: other parameters differ too, or the checkpoint is of another architecture.
    """
    theirs, ours = start.model, config.model
    if theirs.architecture != ours.architecture:
        raise ConfigError(
            f"init.checkpoint {config.init.checkpoint}: holds weights of {theirs.architecture}, and the run trains "
            f"{ours.architecture}: use a recipe of {theirs.architecture}, or another checkpoint"
        )
    there, here = _shapes(theirs), _shapes(ours)
    different = [name for name in here if name in there and here[name] != there[name]]
    reinitialized = [
        name for name in different if CLASS_DEPENDENT.fullmatch(name) and here[name][1:] == there[name][1:]
    ]
    if here.keys() != there.keys() or reinitialized != different:
        wrong = sorted(here.keys() ^ there.keys()) or [
            name for name in different if name not in reinitialized
        ]
        raise ConfigError(
            f"init.checkpoint {config.init.checkpoint}: weights of another {ours.architecture} model: "
            f"{', '.join(model_differences(start, config))} (first parameter that differs: {wrong[0]})"
        )
    return reinitialized


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
    return is_remote(weights) or Path(weights).is_file()


def _shapes(model: ModelConfig) -> Mapping[str, torch.Size]:
    with torch.device("meta"):  # shapes without memory
        built = zoo.build(replace(model, backbone=replace(model.backbone, weights=None)))
    return {name: tensor.shape for name, tensor in built.detector.state_dict().items()}
