"""The table and the pictures of docs/models.md are those of the commands that make them."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/models.md").read_text()


@pytest.fixture
def table() -> list[list[str]]:
    text = PAGE.partition("<!-- models: begin -->\n")[2].partition("<!-- models: end -->")[0]
    return [line.strip("| ").split(" | ") for line in text.splitlines()]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return lambda name: runpy.run_path(str(ROOT / f"benchmarks/{name}.py"))


def test_the_table_has_all_rows_and_the_counts_of_one(script: Any, table: list[list[str]]) -> None:
    models = script("docs_models")
    rows = [(model, row) for model, rows in models["ROWS"].items() for row in rows]
    assert [cells[:7] for cells in table[2:]] == [
        [model, row.option, f"`{row.recipe}`", row.place, row.paper, row.official, row.best]
        for model, row in rows
    ]
    assert models["cells"](*rows[0]) == table[2]


@pytest.mark.slow
def test_all_counts_of_the_table(script: Any, table: list[list[str]]) -> None:
    (_, *rows) = script("docs_models")["table_rows"]()
    assert rows == table[2:]


def test_figures_that_the_page_calls_equal_are_within_a_percent(table: list[list[str]]) -> None:
    ours = table[0].index("G at 800x1136")
    checked = 0
    for model, option, *cells in table[2:]:
        is_claimed = model in ("DETR", "Conditional DETR") or (model, option) == ("Deformable DETR", "R50")
        if is_claimed and cells[-1] != "-" and "DC5+" not in option:
            checked += 1
            assert float(cells[ours - 2]) == pytest.approx(float(cells[-1]), rel=0.01), (model, option)
    assert checked == 11


def test_the_page_shows_the_pictures_of_the_command(script: Any) -> None:
    pictures = script("docs_pictures")
    short = script("race")["short"]
    names = {
        f"models-{short(recipe)}-{kind}.jpg"
        for model, recipe in pictures["RECIPES"].items()
        for kind in pictures["KEPT"][model]
    }
    assert set(re.findall(r"\]\((models-.*?\.jpg)\)", PAGE)) == names
    assert {file.name for file in (ROOT / "docs").glob("models-*")} == names
