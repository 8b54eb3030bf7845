"""The command line: output, exit codes and error messages."""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path

import pytest
import typer
import yaml

from command_line import CommandLine
from raydetr import recipes
from raydetr.cli import main as cli
from raydetr.cli.track import exit_if_incomplete
from raydetr.config import from_yaml, override
from raydetr.shards.source import coco_source
from raydetr.shards.writer import write_source
from raydetr.tracking.events import read_events
from small_checkpoint import write_checkpoint


@pytest.fixture
def raydetr(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    """Return a function that runs `raydetr ARGUMENTS` in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return CommandLine(monkeypatch, capsys)


def test_help_lists_every_command_with_a_line(raydetr) -> None:
    text = raydetr("--help").out
    for command in ("synthetic-data", "shards", "train", "evaluate", "predict", "overfit", "recipes", "config",
                    "tune", "compare", "doctor", "explain", "model"):  # fmt: skip
        assert command in text
        assert raydetr(command, "--help").code == 0


def test_recipes_are_listed_with_one_line_each(raydetr) -> None:
    lines = raydetr("recipes").out.splitlines()
    assert [line.split()[0] for line in lines] == [recipe.__name__ for recipe in recipes.RECIPES]


def test_a_printed_config_is_read_back(raydetr, tmp_path: Path) -> None:
    text = raydetr("config", "quickstart", "optim.lr=2e-4", "cluster.num_workers=3").out
    (tmp_path / "mine.yaml").write_text(text)
    expected = override(recipes.quickstart(), {"optim.lr": 2e-4, "cluster.num_workers": 3})
    assert from_yaml(tmp_path / "mine.yaml") == expected
    again = raydetr("config", "--config", "mine.yaml", "seed=5").out
    assert yaml.safe_load(again)["seed"] == 5
    assert yaml.safe_load(again)["optim"]["lr"] == 2e-4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["config", "quickstart", "optim.lrr=1"], ["optim.lrr: no such setting; did you mean optim.lr?"]),
        (["config", "quickstrat"], ["no recipe 'quickstrat' (`raydetr recipes` lists them); did you mean quickstart?"]),
        (["config"], ["name a recipe first", "raydetr recipes"]),
        (["config", "quickstart", "--config", "x.yaml"], ["keep one"]),
        (["config", "--config", "x.yaml"], ["x.yaml", "cannot be read"]),
        (["train", "quickstart", "--resume", "runs/none", "--local"], ["not an override", "quickstart"]),
        (["train", "--resume", "runs/none", "--local"], ["runs/none", "not the folder of a run"]),
        (["train", "dino_r50_4scale_12ep", "--local"], ["train2017", "no shards found", "raydetr shards write"]),
        (["evaluate", "nowhere", "--local"], ["nowhere", "no checkpoint"]),
        (["predict", "nowhere", "a.jpg", "--out", "p"], ["a.jpg: no such file"]),
        (["predict", "nowhere", ".", "--out", "p"], ["no images"]),
        (["shards", "write", "--images", "i", "--annotations", "a.json", "--out", "o"], ["i", "no such folder"]),
        (["shards", "info", "nowhere"], ["nowhere: no shards found"]),
        (["shards", "check", "nowhere"], ["nowhere: no shards found"]),
        (["shards", "browse", "nowhere", "--out", "no/a.png"], ["no/a.png: there is no folder no: create it first"]),
        (["evaluate", "nowhere", "--local", "--out", "no/ap.json"], ["no/ap.json: there is no folder no"]),
        (["evaluate", "nowhere", "--local", "--out", "."], ["is a folder: name a file"]),
        (["doctor", "--json", "no/machine.json"], ["no/machine.json: there is no folder no"]),
        (["tune", "quickstart", "--space", "space.yaml"], ["space.yaml"]),
    ],
)  # fmt: skip
def test_a_mistake_ends_in_one_clear_line_and_exit_code_1(
    raydetr, arguments: list[str], words: list[str]
) -> None:
    outcome = raydetr(*arguments)
    assert outcome.code == 1
    assert outcome.err.startswith("error: ")
    assert "Traceback" not in outcome.err
    for word in words:
        assert word in outcome.err


def test_errors_from_inside_libraries_keep_their_traceback(raydetr, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error from inside a library is a bug of this project, not a mistake of the user."""
    monkeypatch.setattr(cli, "read_config", lambda *_: json.loads("{"))
    monkeypatch.setattr(sys, "argv", ["raydetr", "config", "quickstart"])
    with pytest.raises(json.JSONDecodeError):
        cli.main()


def test_the_home_folder_is_found_where_the_shell_leaves_its_sign(
    raydetr, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    assert raydetr("synthetic-data", "--out=~/shapes", "--num-train", 8, "--num-val", 8).code == 0
    assert (tmp_path / "home/shapes/train").is_dir()
    assert not Path("~").exists()
    (tmp_path / "home/settings.yaml").write_text(raydetr("config", "quickstart").out)
    assert raydetr("config", "--config", "~/settings.yaml").code == 0


def test_from_synthetic_data_to_predictions(raydetr, tmp_path: Path) -> None:
    """Follow the first steps of a new user, on a few images and in one process."""
    made = raydetr("synthetic-data", "--out", "my shapes", "--num-train", 32, "--num-val", 12)
    assert made.code == 0
    for command in made.out.splitlines()[1:]:  # the printed commands can be copied
        written = raydetr(*shlex.split(command)[1:])
        assert written.code == 0
        assert "4 classes" in written.out
    assert Path("my shapes/shards/train").is_dir()
    Path("my shapes/shards").rename("shards")
    trained = raydetr(
        "train", "quickstart", "--local", "data.synthetic=null", "data.train=shards/train", "data.val=shards/val",
        "data.batch_size=8", "optim.epochs=1",
    )  # fmt: skip
    assert trained.code == 0
    for word in (
        "AP50",
        "triangle",
        "checkpoint",
        "raydetr predict",
        "mlflow ui --backend-store-uri sqlite:///",
    ):
        assert word in trained.out
    (run,) = tmp_path.glob("runs/quickstart-*")
    checkpoint = run / "best"
    evaluated = raydetr("evaluate", checkpoint, "--local", "--out", "ap.json")
    assert evaluated.code == 0
    (evaluation,) = [event for event in read_events(run) if event["kind"] == "evaluation"]
    assert json.loads((tmp_path / "ap.json").read_text())["AP"] == evaluation["metrics"]["AP"]
    predicted = raydetr("predict", checkpoint, "my shapes/val", "--out", "predictions")
    assert predicted.code == 0
    results = json.loads((tmp_path / "predictions" / "results.json").read_text())
    assert {"image_id", "category_id", "bbox", "score"} <= results[0].keys()
    assert len(list((tmp_path / "predictions").glob("*.jpg"))) == 12
    assert (
        raydetr("predict", checkpoint, "my shapes/val", "--out", "predictions").code == 1
    )  # The folder is not empty
    compared = raydetr("compare", run.name)
    assert compared.code == 0
    assert "AP50" in compared.out


def test_a_checkpoint_is_refused_on_data_with_other_categories(raydetr, tmp_path: Path) -> None:
    raydetr("synthetic-data", "--out", "hard", "--hard", "--num-train", 8, "--num-val", 1)
    write_source(
        coco_source(Path("hard/train"), Path("hard/annotations/instances_train.json")), Path("shards")
    )
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    refused = raydetr("evaluate", checkpoint, "--data", "shards", "--local")
    assert refused.code == 1
    assert "other categories" in refused.err


def test_overfit_writes_its_numbers_and_image_grid(
    raydetr, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # It takes all cores, and threads that wait for each other beside other tests take ten times as long
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    raydetr("synthetic-data", "--out", "shapes", "--num-train", 8, "--num-val", 1)
    write_source(
        coco_source(Path("shapes/train"), Path("shapes/annotations/instances_train.json")), Path("shards")
    )
    outcome = raydetr(
        "overfit", "quickstart", "--data", "shards", "--images", 2, "--steps", 60, "--long-side", 96,
        # They take seconds, and others test them
        "evaluation.report=false", "tracking.upload=false", "tracking.register_model=false",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    numbers = json.loads((tmp_path / "build" / "overfit.json").read_text())
    assert numbers["images"] == 2
    assert numbers["AP50"] > 0.3  # 60 steps are few; memorizing takes 300
    assert (tmp_path / "build" / "overfit.png").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_eight_real_photographs_are_overfitted(raydetr, tmp_path: Path) -> None:
    if "RAYDETR_COCO_TINY" not in os.environ:
        pytest.skip("RAYDETR_COCO_TINY names no folder of photographs")
    photographs = Path(os.environ["RAYDETR_COCO_TINY"])
    annotations = photographs / "annotations" / "instances_train2017.json"
    write_source(coco_source(photographs / "train2017", annotations), Path("shards"))
    assert raydetr("overfit", "quickstart", "--data", "shards", "--images", 8).code == 0
    numbers = json.loads((tmp_path / "build" / "overfit.json").read_text())
    assert numbers["AP50"] >= 0.8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["train", "quickstart", "--local", "cluster.num_workers=2"],
            "cluster.num_workers has no effect with --local",
        ),
        (
            ["train", "quickstart", "--local", "cluster.address=auto"],
            "cluster.address has no effect with --local",
        ),
        (
            ["evaluate", "checkpoint", "--local", "cluster.num_workers=1"],
            "cluster.num_workers has no effect with",
        ),
        (["overfit", "quickstart", "optim.epochs=3"], "optim.epochs has no effect on overfitting"),
        (["overfit", "quickstart", "cluster.use_gpu=false"], "cluster.use_gpu has no effect on overfitting"),
    ],
)
def test_overrides_without_effect_are_refused(raydetr, arguments: list[str], message: str) -> None:
    result = raydetr(*arguments)
    assert result.code == 1
    assert message in result.err


def test_or_resume_needs_a_name(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    done = CommandLine(monkeypatch, capsys, "train")("quickstart", "--or-resume")
    assert done.code == 1
    assert done.err == "error: --or-resume needs the name of the run: add --name NAME"


def test_a_run_that_mlflow_lacks_is_incomplete_and_a_job_has_succeeded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    exit_if_incomplete(None)
    with pytest.raises(typer.Exit) as ended:
        exit_if_incomplete("3 metric values")
    assert ended.value.exit_code == 5
    # Ray sets it for the driver of a job, and what repeats a failed job would start the run again
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    exit_if_incomplete("3 metric values")
