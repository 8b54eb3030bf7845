"""`raydetr model`: the table of a model, without data."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from command_line import CommandLine


@pytest.fixture
def raydetr(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> CommandLine:
    monkeypatch.chdir(tmp_path)
    return CommandLine(monkeypatch, capsys)


def numbers(line: str) -> tuple[int, float]:
    parameters, multiply_adds = re.fullmatch(r".*?([\d,]+) +([\d.,]+) G", line).groups()
    return int(parameters.replace(",", "")), float(multiply_adds.replace(",", ""))


def test_the_published_detr(raydetr: CommandLine, tmp_path: Path) -> None:
    """41,524,768 parameters are those of the official checkpoint; no shards are there, none are written."""
    result = raydetr("model", "detr_r50_500ep")
    assert result.code == 0, result.err
    rows = result.out.split("\n\n")[0].splitlines()
    assert rows[0].split() == ["part", "output", "parameters", "multiply-adds"]
    parts, total = [numbers(line) for line in rows[1:-1]], numbers(rows[-1])
    assert total[0] == sum(part[0] for part in parts) == 41_524_768
    assert total[1] == pytest.approx(sum(part[1] for part in parts), abs=1e-3 * len(parts))
    assert total[1] == pytest.approx(96.954, abs=1e-3)
    assert "image: 800x1280 (data.val_transform" in result.out
    assert "classes: 91 (as the official models for COCO; model.num_classes=N changes it)" in result.out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["small_dino"], ["image: 96x96 (that of the synthetic data); classes: 4 (those of the synthetic data)"]),
        (["quickstart_hard", "model.num_classes=7"], ["classes: 7 (model.num_classes)"]),
        (["small_detr", "--size", "64x128"], ["image: 64x128 (--size)", "4 x 8"]),
        (["small_detr", "data.val_transform.short_sides=[192]"], ["image: 192x192 (data.val_transform, square"]),
        (["small_detr", "model.num_decoder_layers=3"], ["decoder, 3 layers"]),
        (["small_detr", "data.synthetic=null", "--size", "96x96"], ["classes: 91"]),
    ],
)  # fmt: skip
def test_size_and_classes_are_stated(raydetr: CommandLine, arguments: list[str], words: list[str]) -> None:
    result = raydetr("model", *arguments)
    assert result.code == 0, result.err
    for word in words:
        assert word in result.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["small_detr", "--size", "96"], "--size 96: give height and width in pixels, such as 800x1280"),
        (["small_detr", "data.synthetic=null"], "images keep their size: add --size"),
        (["small_detr", "model.hidden_dim=30"], "model.hidden_dim: 30 is not a multiple"),
        (["small_detrr"], "no recipe 'small_detrr'"),
        ([], "name a recipe first"),
    ],
)
def test_mistakes_are_one_line(raydetr: CommandLine, arguments: list[str], message: str) -> None:
    result = raydetr("model", *arguments)
    assert result.code == 1
    assert result.err.startswith("error: ")
    assert message in result.err
