"""`make race` and `make ablation`: both commands with a small budget, and the statistics of the ablations."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from detrs.zoo import build
from drawn_shards import write_drawn_shards
from raydetr import recipes
from raydetr.config import flatten, override, to_dict
from raydetr.evaluation import stored
from raydetr.runs.lease import Lease
from raydetr.tracking.events import read_events

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], dict[str, Any]]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return lambda name: runpy.run_path(str(BENCHMARKS / f"{name}.py"))


def command(name: str, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run a script of benchmarks/ in a folder, with few images where it expects those of the quickstart."""
    if not (folder / "build").exists():
        write_drawn_shards(folder / "build/quickstart", 48, 16)
    return subprocess.run(
        [sys.executable, BENCHMARKS / f"{name}.py", "--out", "out", "--storage", "runs", *options],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_race_is_what_its_runs_have_logged_and_is_not_repeated(tmp_path: Path) -> None:
    first = command("race", tmp_path, "--epochs", "2", "--images", "32")
    assert first.returncode == 0, first.stderr[-3000:]
    curves = json.loads((tmp_path / "out/race.json").read_text())
    assert list(curves) == ["DETR", "Conditional DETR", "DAB-DETR", "Deformable DETR", "DINO"]
    for (model, points), recipe in zip(curves.items(), SMALL, strict=True):
        (run,) = (tmp_path / "runs").glob(f"race-{recipe.removeprefix('small_')}-*")
        assert [point[0] for point in points] == [32, 64], model
        for samples, ap, ap50, _ in points:
            content = stored.read_evaluation(stored.folder_of(run, samples))
            assert content is not None
            assert (content["table"]["AP"], content["table"]["AP50"]) == (ap, ap50)
        assert 0 < points[0][3] < points[1][3]
        # Two workers with one thread each cannot take more CPU time than twice the time between start and end
        (started,) = (event for event in read_events(run) if event["kind"] == "started")
        assert started["workers"] == 2
        assert points[-1][3] < 2 * (read_events(run)[-1]["time"] - started["time"])
        (launched,) = (event for event in read_events(run) if event["kind"] == "launched")
        assert launched["experiment"] == "race"
    assert Image.open(tmp_path / "out/race.png").size == (1100, 420)
    assert "average precision" in first.stdout
    assert (tmp_path / "out/race.html").read_text().count("race-dino") > 1
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*.jsonl")}
    again = command("race", tmp_path, "--epochs", "2", "--images", "32")
    assert again.returncode == 0, again.stderr[-3000:]
    assert json.loads((tmp_path / "out/race.json").read_text()) == curves
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*.jsonl")} == before


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_ablations_end_with_the_ap_of_their_runs(tmp_path: Path) -> None:
    done = command("ablation", tmp_path, "--epochs", "1", "--images", "32", "--seeds", "2")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    content = json.loads((tmp_path / "out/ablation.json").read_text())
    assert (content["samples"], content["seeds"]) == (32, 2)
    assert {model: list(found["without"]) for model, found in content["models"].items()} == {
        "DINO": ["denoising", "contrastive negatives", "mixed selection", "look forward twice"],
        "Deformable DETR": ["several levels", "refinement"],
        "DAB-DETR": ["modulated attention"],
    }
    runs = tmp_path / "runs"
    for seed in range(2):
        for model, slug, ap in (
            ("dino", "whole", content["models"]["DINO"]["AP"][seed]),
            ("dino", "negatives", content["models"]["DINO"]["without"]["contrastive negatives"]["AP"][seed]),
        ):
            folder = runs / f"ablation-{model}-{slug}-1ep-32images-seed{seed}"
            evaluation = stored.read_evaluation(stored.folder_of(folder, 32))
            assert evaluation is not None
            assert evaluation["table"]["AP"] == ap


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_run_that_fails_ends_the_ablations_with_its_reason(tmp_path: Path) -> None:
    with Lease(tmp_path / "runs" / "ablation-dino-whole-1ep-16images-seed0"):
        done = command("ablation", tmp_path, "--epochs", "1", "--images", "16", "--seeds", "1")
    assert done.returncode != 0
    assert "is driving this run" in done.stderr
    assert not (tmp_path / "out/ablation.json").exists()


# --- Recipes ---

SMALL = ["small_detr", "small_conditional_detr", "small_dab_detr", "small_deformable_detr", "small_dino"]
# Where a model differs from the one before it, with the values of both; "-": it has no such setting
DIFFERENCES: dict[tuple[str, str], dict[str, tuple[Any, Any]]] = {
    ("small_detr", "small_conditional_detr"): {
        "architecture": ("detr", "conditional_detr"),
        "loss.kind": ("cross_entropy", "focal"),
        "loss.class_weight": (1.0, 2.0),
        "loss.class_cost": (1.0, 2.0),
    },
    ("small_conditional_detr", "small_dab_detr"): {
        "architecture": ("conditional_detr", "dab_detr"),
        "activation": ("relu", "prelu"),
    },
    ("small_dab_detr", "small_deformable_detr"): {
        "architecture": ("dab_detr", "deformable_detr"),
        "refinement": (True, False),
        "backbone.dilation": (True, False),
    },
    ("small_deformable_detr", "small_dino"): {
        "architecture": ("deformable_detr", "dino"),
        "two_stage": (False, True),
    },
}  # fmt: skip
# Settings that one of two models does not have, because its paper does not have what they set
OWN = {
    "small_detr": {"num_select", "position_encoding", "activation", "pre_norm"},
    "small_conditional_detr": {"num_select", "position_encoding", "activation", "reference_point"},
    "small_dab_detr": {
        "num_select", "position_encoding", "position_temperature", "position_temperature_y", "activation",
        "encoder_norm", "decoder_self_attention", "num_patterns", "anchor", "random_points", "fixed_points",
        "refinement", "modulate_attention", "position_scale", "keep_query_position", "shared_box_heads",
    },
    "small_deformable_detr": {
        "num_select", "strides", "num_feature_levels", "refinement", "two_stage", "proposal_score", "num_points",
        "num_encoder_points", "anchors", "num_patterns", "random_points",
    },
    "small_dino": {
        "num_select", "strides", "num_feature_levels", "position_temperature", "position_temperature_y",
        "position_offset", "num_points", "num_encoder_points", "two_stage", "mixed_selection", "proposal_size",
        "encoder_shares_class_head", "encoder_shares_box_head", "shared_class_heads", "shared_box_heads",
        "look_forward_twice", "num_denoising", "denoising_groups", "contrastive_denoising", "label_noise",
        "box_noise", "box_noise_kind",
    },
}  # fmt: skip


def settings(recipe: str) -> dict[str, Any]:
    return flatten(to_dict(recipes.find(recipe)))


@pytest.mark.parametrize("recipe", SMALL[1:])
def test_everything_but_the_model_is_the_same(recipe: str) -> None:
    first, other = settings("small_detr"), settings(recipe)
    differing = {path for path in first.keys() | other.keys() if first.get(path) != other.get(path)}
    assert {path for path in differing if not path.startswith("model.")} == {"recipe"}


@pytest.mark.parametrize(("one", "other"), DIFFERENCES)
def test_models_differ_in_what_the_papers_define(one: str, other: str) -> None:
    before, after = (
        {
            path.removeprefix("model."): value
            for path, value in settings(name).items()
            if path.startswith("model.")
        }
        for name in (one, other)
    )
    found = {
        path: (before[path], after[path])
        for path in before.keys() & after.keys()
        if before[path] != after[path]
    }
    assert found == DIFFERENCES[one, other]
    assert before.keys() - after.keys() == OWN[one] - OWN[other]
    assert after.keys() - before.keys() == OWN[other] - OWN[one]


def test_the_small_models_are_of_similar_size_with_the_same_backbone() -> None:
    totals, backbones = [], set()
    for recipe in SMALL:
        detector = build(override(recipes.find(recipe), {"model.num_classes": 4}).model).detector
        totals.append(sum(parameter.numel() for parameter in detector.parameters()))
        backbones.add(tuple((name, value.shape) for name, value in detector.backbone.state_dict().items()))
    assert len(backbones) == 1
    assert max(totals) < 1.25 * min(totals)


# --- Statistics and tables ---


def test_the_loss_of_two_variants_is_students_interval(script: Callable[[str], dict[str, Any]]) -> None:
    """With two variants, the pooled interval is that of the t-test of two samples with equal variances."""
    loss_of = script("ablation")["loss_of"]
    generator = np.random.default_rng(0)
    for seeds in (2, 3, 7):
        whole, without = (
            generator.normal(0.3, 0.02, seeds).tolist(),
            generator.normal(0.28, 0.01, seeds).tolist(),
        )
        expected = stats.ttest_ind(whole, without).confidence_interval(0.95)
        loss = loss_of(whole, without, [whole, without])
        assert loss.interval == pytest.approx((expected.low, expected.high))
        assert loss.difference == pytest.approx(np.mean(whole) - np.mean(without))


def test_five_percent_of_the_intervals_miss_the_difference(script: Callable[[str], dict[str, Any]]) -> None:
    loss_of = script("ablation")["loss_of"]
    generator = np.random.default_rng(1)
    missed = 0
    for _ in range(2000):
        family = generator.normal(0.3, 0.02, (5, 3)).tolist()
        low, high = loss_of(family[0], family[1], family).interval
        missed += not low <= 0 <= high
    # Three standard deviations of the binomial distribution around 100
    assert 70 < missed < 130


@pytest.mark.parametrize(
    ("whole", "without", "verdict"),
    [
        ([0.30, 0.31, 0.32], [0.20, 0.21, 0.22], "shows"),
        ([0.20, 0.21, 0.22], [0.30, 0.31, 0.32], "the opposite shows"),
        ([0.30, 0.31, 0.32], [0.29, 0.33, 0.30], "does not show at this size"),
        ([0.30], [0.20], "one seed: its noise is not known"),
    ],
)
def test_verdicts(
    script: Callable[[str], dict[str, Any]], whole: list[float], without: list[float], verdict: str
) -> None:
    assert script("ablation")["loss_of"](whole, without, [whole, without]).verdict == verdict


def test_every_ablation_builds_and_changes_only_its_part(script: Callable[[str], dict[str, Any]]) -> None:
    ablation, models = script("ablation"), {}
    for variant in ablation["VARIANTS"]:
        config = recipes.find(ablation["RECIPES"][variant.model])
        config = override(config, {"model.num_classes": 4, **variant.changes})
        models[variant.model, variant.without] = flatten(to_dict(config))
        build(config.model)
    changed = {
        without: {path.removeprefix("model.") for path in values if values[path] != models[model, None][path]}
        for (model, without), values in models.items()
        if without is not None
    }
    assert changed == {
        "denoising": {"num_denoising"},
        "contrastive negatives": {"contrastive_denoising"},
        "mixed selection": {"mixed_selection"},
        "look forward twice": {"look_forward_twice"},
        "several levels": {"strides", "num_feature_levels", "backbone.dilation"},
        "refinement": {"refinement"},
        "modulated attention": {"modulate_attention"},
    }


@pytest.mark.parametrize(
    ("aps", "expected"),
    [
        ((0.1, 0.2, 0.3), "The order of the papers shows: DETR < DAB-DETR < DINO."),
        ((0.1, 0.3, 0.2), "The order of the papers does not show: DETR < DINO < DAB-DETR."),
    ],
)
def test_the_order_is_that_of_the_last_ap(
    script: Callable[[str], dict[str, Any]], aps: tuple[float, ...], expected: str
) -> None:
    models = ("DETR", "DAB-DETR", "DINO")
    curves = {model: [(10, 0.9, 0.9, 1.0), (20, ap, ap, 2.0)] for model, ap in zip(models, aps, strict=True)}
    assert script("race")["order"](curves) == expected


def test_results_are_put_between_the_marks_of_a_page(
    script: Callable[[str], dict[str, Any]], tmp_path: Path
) -> None:
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- race: begin -->\nold\n<!-- race: end -->\nb\n")
    script("race")["put_into_docs"]("race", "new", page)
    assert page.read_text() == "a\n<!-- race: begin -->\nnew\n<!-- race: end -->\nb\n"
