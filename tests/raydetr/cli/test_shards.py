"""The commands of `raydetr shards`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from made_coco import folder_bytes, write_coco
from raydetr.cli.shards import shards_app


def run(*arguments: object) -> Result:
    return CliRunner().invoke(shards_app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_coco(tmp_path_factory.mktemp("coco"), 30)


@pytest.fixture(scope="module")
def written(coco: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("written") / "out"
    result = run(
        "write", "--images", coco[0], "--annotations", coco[1], "--out", out, "--samples-per-shard", 8
    )
    assert result.exit_code == 0, result.output
    assert f"wrote {out}: 30 images, 4 shards, 3 classes, fingerprint" in result.stdout
    assert "note: " in result.stdout
    return out


WRONG: list[tuple[list[str], str]] = [
    (
        [],
        "name one data set: --images with --annotations .COCO., --yolo with --split, --voc .*or --webdataset",
    ),
    (["--images", "i"], "--images and --annotations need each other: give both"),
    (["--yolo", "y", "--voc", "v", "--split", "train"], "name one data set"),
    (["--images", "i", "--annotations", "a", "--yolo", "y"], "name one data set"),
    (
        ["--images", "i", "--annotations", "a", "--split", "train"],
        "--split has no effect without --yolo or --voc: omit it",
    ),
    (["--yolo", "y"], "which part of the data set.*--split train"),
    (
        ["--yolo", "y", "--split", "train", "--zero-based"],
        "--zero-based has no effect without --voc: omit it",
    ),
    (["--yolo", "y", "--split", "train"], "y: cannot be read"),
    (["--voc", "v", "--split", "train"], "v: has no folder Annotations"),
    (["--webdataset", "w.tar", "--split", "train"], "--split has no effect without"),
    (["--webdataset", "w.tar"], "w.tar: there is no such file"),
    (["--yolo", "y", "--split", "train", "--boxes", "xyxy"], "--boxes has no effect without --webdataset"),
    (
        ["--voc", "v", "--split", "train", "--categories", "c"],
        "--categories has no effect without --webdataset",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG)
def test_exactly_one_source_must_be_named(tmp_path: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CliRunner().invoke(
            shards_app, ["write", "--out", str(tmp_path / "out"), *arguments], catch_exceptions=False
        )
    assert not (tmp_path / "out").exists()


def test_check_passes_and_fails_with_the_exit_code(written: Path, tmp_path: Path) -> None:
    result = run("check", written, "--workers", 1)
    assert result.exit_code == 0
    assert "30 images with" in result.stdout
    assert "in 4 shards: every byte matches the manifest" in result.stdout
    corrupt = tmp_path / "corrupt"
    shutil.copytree(written, corrupt)
    with (corrupt / "shard-00001.tar").open("r+b") as file:
        file.seek(700)
        file.write(b"\0\1\2\3")
    result = run("check", corrupt, "--workers", 1)
    assert result.exit_code == 1
    assert "shard-00001.tar: its sha256 is" in str(result.exception)


REMOTE: list[list[str]] = [
    ["write", "--images", "i", "--annotations", "a", "--out"],
    ["check"],
    ["export-index", "--format", "dali"],
]


@pytest.mark.parametrize("arguments", REMOTE)
def test_commands_that_need_a_local_folder_refuse_urls(arguments: list[str]) -> None:
    with pytest.raises(ValueError, match="s3://bucket/data: this needs a local folder"):
        CliRunner().invoke(shards_app, [*arguments, "s3://bucket/data"], catch_exceptions=False)


def test_info_as_text_and_json(coco: tuple[Path, Path], written: Path) -> None:
    data = json.loads(coco[1].read_text())
    counts = {3: 0, 7: 0, 90: 0}
    for annotation in data["annotations"]:
        counts[annotation["category_id"]] += 1
    info: dict[str, Any] = json.loads(run("info", written, "--json").stdout)
    assert {category["id"]: category["annotations"] for category in info["categories"]} == counts
    assert info["images"] == 30
    assert info["annotations"] == len(data["annotations"])
    widths = sorted(record["width"] for record in data["images"])
    assert (info["percentiles"]["width"]["0"], info["percentiles"]["width"]["100"]) == (widths[0], widths[-1])
    assert info["percentiles"]["width"]["50"] == widths[14]
    assert info["bytes"] == sum(len(c) for name, c in folder_bytes(written).items() if name.endswith("tar"))
    text = run("info", written).stdout
    assert f"fingerprint  {info['fingerprint']}" in text
    assert any(line.split() == ["toothbrush", "90", str(counts[90])] for line in text.splitlines())


def test_import_and_export(written: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    pattern = f"{written}/shard-{{00000..00003}}.tar"
    result = run("write", "--webdataset", pattern, "--samples-per-shard", 8, "--out", folder)
    assert f"wrote {folder}: 30 images, 4 shards, 3 classes, fingerprint" in result.stdout
    assert run("check", folder, "--workers", 1).exit_code == 0
    for kind, suffix in (("dali", ".idx"), ("energon", ".tar.idx")):
        result = run("export-index", folder, "--format", kind)
        assert result.stdout == f"wrote {folder}/shard-00000{suffix} and 3 more\n"
        assert (folder / f"shard-00003{suffix}").is_file()
