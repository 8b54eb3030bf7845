"""The command `raydetr evaluate`: a checkpoint's page, and the results of other tools."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import small_checkpoint
from command_line import CommandLine
from made_coco import write_coco
from raydetr.shards.coco import load_coco
from raydetr.shards.source import coco_source
from raydetr.shards.writer import write_source

ROOT = Path(__file__).parents[3]
PLOTS = ["calibration.png", "classes.png", "confusion.png", "precision_recall.png", "tide.png"]


@pytest.fixture
def evaluate(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    return CommandLine(monkeypatch, capsys, "evaluate")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("data")
    images, annotations = write_coco(folder, 24)
    write_source(coco_source(images, annotations), folder / "shards")
    results = folder / "results.json"
    results.write_text(json.dumps(perfect(annotations)))
    return {"images": images, "annotations": annotations, "shards": folder / "shards", "results": results}


def perfect(annotations: Path) -> list[dict[str, Any]]:
    """Results that find every object, and one that finds nothing."""
    records = json.loads(annotations.read_text())["annotations"]
    found = [
        {"image_id": a["image_id"], "category_id": a["category_id"], "bbox": a["bbox"], "score": 0.9}
        for a in records
        if not a["iscrowd"]
    ]
    return [*found, {**found[0], "bbox": [0, 0, 2, 2], "score": 0.95}]


def file_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_results_of_another_tool_against_shards_and_against_a_file(
    evaluate: CommandLine, data: dict[str, Path], tmp_path: Path
) -> None:
    pages = [tmp_path / "shards.html", tmp_path / "file.html", tmp_path / "plain.html"]
    runs = [
        ("--data", data["shards"], "--html", pages[0]),
        ("--data", data["annotations"], "--images", data["images"], "--html", pages[1]),
        ("--data", data["annotations"], "--html", pages[2], "--out", tmp_path / "ap.json"),
        ("--data", data["shards"], "--report", tmp_path / "new" / "shards"),
        ("--data", data["annotations"], "--report", tmp_path / "plain"),
    ]
    texts = []
    for options in runs:
        done = evaluate("--results", data["results"], *options)
        assert done.code == 0, done.err
        texts.append(done.out)
    assert set(texts) == {texts[0]}
    assert "AR100  1.000" in texts[0]
    contents = [page.read_text() for page in pages]
    assert [content.count("data:image/jpeg") for content in contents] == [1, 1, 0]
    assert all("background: no object here" in content for content in contents)
    assert "Evaluation of" in contents[0]
    table = json.loads((tmp_path / "ap.json").read_text())
    assert table["AR100"] == pytest.approx(1.0)
    with_images, without = tmp_path / "new" / "shards", tmp_path / "plain"
    assert file_names(with_images) == sorted([*PLOTS, "mistakes.jpg", "report.html", "report.json"])
    assert file_names(without) == sorted([*PLOTS, "report.html", "report.json"])
    assert (with_images / "report.html").read_text() == contents[0]
    assert (without / "report.html").read_text() == contents[2]
    numbers = json.loads((without / "report.json").read_text())
    known = {name: value for name, value in numbers["metrics"].items() if value is not None}
    assert "AP" in known
    assert known == {name: table[name] for name in known}
    assert [row["name"] for row in numbers["classes"]] == [row["name"] for row in table["classes"]]


def test_the_report_of_a_checkpoint(evaluate: CommandLine, data: dict[str, Path], tmp_path: Path) -> None:
    checkpoint = small_checkpoint.write_checkpoint(tmp_path / "checkpoint")
    meta = json.loads((checkpoint / "meta.json").read_text())
    meta["categories"] = load_coco(data["annotations"]).categories
    (checkpoint / "meta.json").write_text(json.dumps(meta))
    page, report = tmp_path / "report.html", tmp_path / "report"
    done = evaluate(checkpoint, "--data", data["shards"], "--local", "--html", page, "--report", report)
    assert done.code == 0, done.err
    text = page.read_text()
    assert file_names(report) == sorted([*PLOTS, "losses.jpg", "mistakes.jpg", "report.html", "report.json"])
    assert (report / "report.html").read_text() == text
    numbers = json.loads((report / "report.json").read_text())
    assert (numbers["counts"]["images"], len(numbers["losses"])) == (24, 12)
    assert numbers["speed"]["images_per_second"] > 0
    assert text.count("<b>loss ") > 1
    assert f"Evaluation of {checkpoint}" in text
    assert str(data["shards"]) in text
    assert "images per second" in text
    assert "24 images" in text
    assert text.count("data:image/jpeg") == 24  # mistakes and largest losses


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a run or a checkpoint to evaluate, or give --results FILE"),
        (["RUN", "--images", "."], "--images has no effect without --results"),
        (["--results", "{results}"], "--results needs the ground truth: add --data SHARDS"),
        (["RUN", "--results", "{results}", "--data", "{shards}"], "RUN has no effect with --results"),
        (["--results", "{results}", "--data", "{shards}", "--local"], "--local has no effect with --results"),
        (
            ["--results", "{results}", "--data", "{shards}", "--images", ".", "--html", "x.html"],
            "--images has no effect with shards",
        ),
        (
            ["--results", "{results}", "--data", "{annotations}", "--images", "."],
            "has no effect without --html or --report",
        ),
        (
            ["--results", "{results}", "--data", "{annotations}", "--images", "none", "--html", "x.html"],
            "--images none: there is no such folder",
        ),
        (
            ["--results", "{results}", "--data", "{annotations}", "--images", ".", "--html", "x.html"],
            "has none of the images",
        ),
        (
            ["--results", "{results}", "--data", "{annotations}", "--html", "none/x.html"],
            "there is no folder none",
        ),
        (["--results", "{annotations}", "--data", "{annotations}"], "holds a dataset with annotations"),
        (["--results", "{results}", "--data", "{results}"], "not an object with images, annotations"),
        (["--results", "{results}", "--data", "none"], "no shards found"),
        (["--results", "{results}", "--data", "s3://b/val.json"], "is read from this machine: download it"),
        (["RUN", "data.val=a", "--data", "b"], "--data b and data.val=a are given: keep one"),
    ],
)
def test_options_that_contradict_each_other(
    evaluate: CommandLine,
    data: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    done = evaluate(*(argument.format(**data) for argument in arguments))
    assert done.code == 1
    assert message in done.err
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_holds_something_is_refused_first(
    evaluate: CommandLine, data: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "report.json").write_text("{}")
    done = evaluate("no such run", "--report", tmp_path)
    assert done.code == 1
    assert f"{tmp_path} is not empty (it holds report.json): name another output folder" in done.err
    done = evaluate("no such run", "--report", data["results"])
    assert f"{data['results']} is a file, not a folder" in done.err
    assert file_names(tmp_path) == ["report.json"]


def test_results_need_neither_ray_nor_mlflow(data: dict[str, Path]) -> None:
    program = (
        f"import sys; sys.path[:0] = [{str(ROOT / 'models')!r}, {str(ROOT / 'platform')!r}]; "
        f"sys.argv = ['raydetr', 'evaluate', '--results', {str(data['results'])!r}, '--data', "
        f"{str(data['annotations'])!r}]\nfrom raydetr.cli.main import main\ntry:\n    main()\nfinally:\n"
        "    print('loaded', *{name.partition('.')[0] for name in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    loaded = done.stdout.partition("loaded")[2].split()
    assert loaded, done.stderr
    assert {"ray", "mlflow"} & set(loaded) == set()
