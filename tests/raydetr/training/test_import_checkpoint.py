"""Official checkpoints are converted; other files are recognized and refused."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path, PosixPath
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

import goldens
from detrs.official_names import to_official
from detrs.zoo import build
from raydetr import recipes
from raydetr.cli.main import app
from raydetr.inference.predict import predict
from raydetr.training.checkpoint import load_for_inference, read_meta
from raydetr.training.import_checkpoint import COCO_CATEGORIES, ImportedCheckpoint, import_checkpoint

# Full-size official model -> (value of --model, recipe whose settings it gets)
NAMED = {
    "detr": ("detr_r50", "detr_r50_500ep"),
    "conditional_detr": ("conditional_detr_r50_50ep", "conditional_detr_r50_50ep"),
    "dab_detr": ("dab_detr_r50", "dab_detr_r50_50ep"),
    "dab_detr_3pat": ("dab_detr_r50_dc5_3patterns", "dab_detr_r50_dc5_3patterns_50ep"),
    "deformable_detr": ("deformable_detr", "deformable_detr_r50_50ep"),
    "deformable_detr_refine": ("deformable_detr", "deformable_detr_r50_refine_50ep"),
    "deformable_detr_two_stage": ("deformable_detr", "deformable_detr_r50_two_stage_50ep"),
    "deformable_detr_single_scale": (
        "deformable_detr_r50_single_scale",
        "deformable_detr_r50_single_scale_50ep",
    ),
    "dino_4scale": ("dino_r50_4scale", "dino_r50_4scale_12ep"),
    "dino_5scale": ("dino", "dino_r50_5scale_12ep"),
}


def save(path: Path, state: dict[str, Tensor]) -> Path:
    """Write a file in the format of the official training scripts."""
    torch.save({"model": state, "args": argparse.Namespace(lr=1e-4), "epoch": 11}, path)
    return path


def official_zeros(full: str) -> dict[str, Tensor]:
    """A full-size state dict without its memory: every tensor is one expanded number."""
    shapes = goldens.read(f"full_{full}").manifest["state_dict"]
    return {name: torch.zeros(()).expand(shape) for name, (shape, _) in shapes.items()}


@pytest.mark.parametrize("full", NAMED)
def test_every_official_model_is_imported(full: str, tmp_path: Path) -> None:
    model, recipe = NAMED[full]
    file = save(tmp_path / "official.pth", official_zeros(full))
    found = import_checkpoint(file, model, tmp_path / "out")
    assert (found.recipe, found.num_classes) == (recipe, 91)
    meta = read_meta(tmp_path / "out")
    expected = recipes.find(recipe)
    assert meta.config["model"]["num_classes"] == 91
    assert meta.config["recipe"] == expected.recipe
    assert meta.config["data"]["label_map"] == "category_id"
    assert meta.categories == COCO_CATEGORIES


def test_the_weights_are_the_official_ones_and_predict(tmp_path: Path) -> None:
    """A complete DETR with random weights, from the file to drawn predictions."""
    torch.manual_seed(0)
    config = replace(recipes.find("detr_r50_500ep").model, num_classes=91)
    state = build(config).detector.state_dict()
    file = save(tmp_path / "official.pth", to_official(config, state))
    found = import_checkpoint(file, "detr_r50", tmp_path / "out")
    assert found.num_parameters == sum(tensor.numel() for tensor in state.values())
    loaded = load_for_inference(tmp_path / "out")
    for name, tensor in loaded.model.detector.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    assert loaded.label_map.names[18] == "dog"
    Image.new("RGB", (32, 24), "white").save(tmp_path / "white.png")
    results = predict(
        tmp_path / "out", [tmp_path / "white.png"], tmp_path / "predictions", device="cpu"
    ).results
    assert {result["category_id"] for result in results} <= {category["id"] for category in COCO_CATEGORIES}


def test_coco_categories_are_those_of_coco() -> None:
    if "RAYDETR_COCO_TINY" not in os.environ:
        pytest.skip("set RAYDETR_COCO_TINY to a folder in COCO's layout")
    annotations = Path(os.environ["RAYDETR_COCO_TINY"]) / "annotations/instances_val2017.json"
    categories = json.loads(annotations.read_text())["categories"]
    assert [{"id": c["id"], "name": c["name"]} for c in categories] == COCO_CATEGORIES


def test_a_model_of_other_classes_needs_its_annotations(tmp_path: Path) -> None:
    official = official_zeros("detr")
    official["class_embed.weight"] = torch.zeros(()).expand(4, 256)  # three classes and "no object"
    official["class_embed.bias"] = torch.zeros(()).expand(4)
    file = save(tmp_path / "official.pth", official)
    with pytest.raises(ValueError, match=r"a model of 3 classes, but COCO has 80 .* --annotations"):
        import_checkpoint(file, "detr_r50", tmp_path / "out")
    for ids, label_map in (((0, 1, 2), "category_id"), ((4, 6, 9), "contiguous")):
        annotations = tmp_path / "train.json"
        categories = [{"id": i, "name": f"class {i}"} for i in reversed(ids)]
        annotations.write_text(json.dumps({"categories": categories, "images": []}))
        found = import_checkpoint(file, "detr_r50", tmp_path / label_map, annotations)
        assert [category["id"] for category in found.categories] == list(ids)
        assert read_meta(tmp_path / label_map).config["data"]["label_map"] == label_map
    annotations.write_text("{}")
    with pytest.raises(ValueError, match=r"train\.json: holds no categories"):
        import_checkpoint(file, "detr_r50", tmp_path / "out", annotations)
    assert not (tmp_path / "out").exists()


def without_class_head(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if not name.startswith("class_embed")}


@pytest.mark.parametrize(
    ("full", "model", "message"),
    [
        ("dino_4scale", "detr_r50", r"official\.pth: a checkpoint of dino \(626 tensors.*use --model dino"),
        ("detr", "dino", r"a checkpoint of detr .*not a checkpoint of dino"),
        ("dino_5scale", "dino_r50_4scale", r"dino_r50_4scale: .*unexpected .*input_proj\.4"),
        ("deformable_detr_refine", "deformable_detr_r50", r"deformable_detr_r50: not a checkpoint of this"),
        ("detr_prenorm", "detr_r50", r"unexpected 2 \(transformer\.encoder\.norm\.bias"),
        ("dab_detr_diff_bbox", "dab_detr_r50", r"dab_detr_r50: not a checkpoint of this dab_detr model"),
        ("detr", "detr_r101", r"detr_r101: .*missing .*layer3"),
        ("detr", "detr", r"fit detr_r50 and detr_r50_dc5, which differ .* give --model detr_r50"),
        ("detr", "dinoo", r"--model dinoo: no such recipe or architecture; did you mean dino"),
        ("detr", "quickstart", r"--model quickstart: no such recipe or architecture"),
    ],
)
def test_what_does_not_fit_is_described(full: str, model: str, message: str, tmp_path: Path) -> None:
    file = save(tmp_path / "official.pth", official_zeros(full))
    with pytest.raises(ValueError, match=message):
        import_checkpoint(file, model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_missing_head_is_described(tmp_path: Path) -> None:
    file = save(tmp_path / "official.pth", without_class_head(official_zeros("detr")))
    with pytest.raises(ValueError, match=r"missing 2 \(class_embed\.bias, class_embed\.weight\)"):
        import_checkpoint(file, "detr_r50", tmp_path / "out")


def corrupt(kind: str, path: Path) -> None:
    if kind == "cut off":
        torch.save({"model": {"weight": torch.zeros(10000)}}, path)
        path.write_bytes(path.read_bytes()[:20000])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("<html>404: not found</html>")
    elif kind == "objects":
        torch.save({"model": Path("x")}, path)
    elif kind == "other tensors":
        torch.save({"fc.weight": torch.zeros(3)}, path)
    elif kind == "no tensors":
        torch.save({"epoch": 3}, path)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("cut off", "cannot be read as a checkpoint"),
        ("empty", "cannot be read as a checkpoint"),
        ("text", "cannot be read as a checkpoint"),
        ("objects", "no state dict"),
        ("other tensors", r"a checkpoint of none of the five architectures \(1 tensors: fc\.weight"),
        ("no tensors", "no state dict"),
        ("missing", "no such file"),
    ],
)
def test_other_files_are_refused_in_one_line(kind: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "official.pth"
    corrupt(kind, file)
    with pytest.raises(ValueError, match=message) as caught:
        import_checkpoint(file, "detr_r50", tmp_path / "out")
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_command_prints_what_it_found(tmp_path: Path) -> None:
    file = save(tmp_path / "official.pth", official_zeros("dino_4scale"))
    out = tmp_path / "out"
    arguments: list[Any] = ["import-checkpoint", file, "--model", "dino_r50_4scale", "--out", out]
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    assert "a checkpoint of dino" in done.output
    assert "91 classes" in done.output
    assert f"init.checkpoint={out}" in done.output
    assert isinstance(import_checkpoint(file, "dino", tmp_path / "again"), ImportedCheckpoint)


class Custom:
    """A class of a training script, which must not be loaded."""


def test_objects_in_the_file_are_omitted_and_named(tmp_path: Path) -> None:
    content = {
        "model": official_zeros("detr"),
        "args": argparse.Namespace(lr=1e-4, output_dir=PosixPath("/data/out"), custom=Custom()),
        "epoch": np.int64(49),
        "best": np.float64(0.4),
    }
    torch.save(content, tmp_path / "official.pth")
    found = import_checkpoint(tmp_path / "official.pth", "detr_r50", tmp_path / "out")
    assert found.num_classes == 91
    (note,) = found.notes
    for name in ("pathlib.PosixPath", f"{__name__}.Custom", "numpy"):
        assert name in note


def test_code_in_the_file_is_not_run(tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "made"),)

    torch.save({"model": official_zeros("detr"), "args": Attack()}, tmp_path / "official.pth")
    with pytest.raises(ValueError, match=r"cannot be read without running code \(posix.mkdir\)"):
        import_checkpoint(tmp_path / "official.pth", "detr_r50", tmp_path / "out")
    assert not (tmp_path / "made").exists()


def test_averaged_weights_are_mentioned_and_taken(tmp_path: Path) -> None:
    raw = official_zeros("detr")
    content = {"model": raw, "ema_model": {f"module.{name}": value + 1 for name, value in raw.items()}}
    torch.save(content, tmp_path / "official.pth")
    plain = import_checkpoint(tmp_path / "official.pth", "detr_r50", tmp_path / "plain")
    assert "--ema takes them" in plain.notes[0]
    averaged = import_checkpoint(tmp_path / "official.pth", "detr_r50", tmp_path / "averaged", ema=True)
    assert averaged.notes == []
    for folder, expected in (("plain", 0), ("averaged", 1)):
        state = torch.load(tmp_path / folder / "state.pt", weights_only=True)["model"]
        assert all((value == expected).all() for value in state.values())
    torch.save({"model": raw}, tmp_path / "official.pth")
    with pytest.raises(ValueError, match=r"has no EMA weights \(ema_model\): omit --ema"):
        import_checkpoint(tmp_path / "official.pth", "detr_r50", tmp_path / "none", ema=True)


def test_weights_that_are_not_numbers_are_refused(tmp_path: Path) -> None:
    official = {name: value.clone() for name, value in official_zeros("detr").items()}
    official["class_embed.bias"][5] = float("inf")
    torch.save({"model": official}, tmp_path / "official.pth")
    message = r"official.pth: 1 of the 92 values of class_embed.bias are NaN or infinite"
    with pytest.raises(ValueError, match=message):
        import_checkpoint(tmp_path / "official.pth", "detr_r50", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_value_that_is_no_tensor_is_named(tmp_path: Path) -> None:
    torch.save({"model": official_zeros("detr") | {"ema_step": 3}}, tmp_path / "official.pth")
    with pytest.raises(ValueError, match=r"no state dict in this file .*: 'ema_step' is int"):
        import_checkpoint(tmp_path / "official.pth", "detr_r50", tmp_path / "out")


def test_more_outputs_than_ids_are_unused(tmp_path: Path) -> None:
    """20 outputs for 10 classes with ids up to 10, as a model has whose number of classes was chosen generously."""
    official = official_zeros("detr")
    official["class_embed.weight"] = torch.zeros(()).expand(21, 256)  # and "no object"
    official["class_embed.bias"] = torch.zeros(()).expand(21)
    torch.save({"model": official}, tmp_path / "official.pth")
    annotations = tmp_path / "train.json"
    annotations.write_text(json.dumps({"categories": [{"id": i, "name": f"c{i}"} for i in range(1, 11)]}))
    found = import_checkpoint(tmp_path / "official.pth", "detr_r50", tmp_path / "out", annotations)
    assert found.num_classes == 20
    loaded = load_for_inference(tmp_path / "out")
    assert loaded.label_map.category_ids == tuple(range(11))
    annotations.write_text(json.dumps({"categories": [{"id": 40, "name": "c"}]}))
    with pytest.raises(
        ValueError, match=r"with ids up to 40: these are not the annotations that it was trained on"
    ):
        import_checkpoint(tmp_path / "official.pth", "detr_r50", tmp_path / "other", annotations)
