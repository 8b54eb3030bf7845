"""The page of a comparison is self-contained, and a real browser shows it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

import browser
from evaluated_run import make_detections, write_evaluated_run
from raydetr.runs.compare import compare
from raydetr.runs.compare_page import to_html
from raydetr.shards.reader import Shards, open_shards

NAME = "<script>alert('b')</script>"

PROBE = """<script>
const errors = [];
addEventListener("error", event => errors.push(String(event.message || event.target.src)), true);
addEventListener("load", () => {
  const images = [...document.images], box = node => node.getBoundingClientRect();
  document.title = JSON.stringify({
    images: images.length,
    shown: images.filter(image => image.naturalWidth > 100 && box(image).width > 100).length,
    wide: document.documentElement.scrollWidth > innerWidth,
    charts: [...document.querySelectorAll("svg.chart")].map(chart => box(chart).width),
    lines: [...document.querySelectorAll("polyline")].map(box).filter(one => one.height > 20).length,
    outside: [...document.querySelectorAll("svg.chart")].filter(chart =>
      [...chart.querySelectorAll("text, polyline, circle")].some(part =>
        box(part).left < box(chart).left - 1 || box(part).right > box(chart).right + 1 ||
        box(part).top < box(chart).top - 1 || box(part).bottom > box(chart).bottom + 1)).length,
    bars: [...document.querySelectorAll(".bar")].map(bar => box(bar).width),
    verdict: getComputedStyle(document.querySelector(".verdict")).backgroundColor,
    best: document.querySelectorAll(".best").length,
    significant: document.querySelectorAll("td.better, td.worse").length,
    text: document.body.innerText,
    errors,
  });
});
</script>"""


@pytest.fixture(scope="module")
def val(tiny_data: Path) -> Shards:
    return open_shards(str(tiny_data / "val"))


@pytest.fixture
def runs(tmp_path: Path, val: Shards) -> list[str]:
    for name, settings in (("base", (4.0, 0.4, 2.0)), ("b", (1.0, 0.05, 0.2))):
        noise, missed, false = settings
        rows = make_detections(val, noise=noise, missed=missed, false=false)
        write_evaluated_run(tmp_path / name, val, rows, settings={"optim": {"lr": noise}}, workers=2)
    (tmp_path / "b").rename(tmp_path / "other")
    return [str(tmp_path / "base"), str(tmp_path / "other")]


def seen_by_browser(page: str, tmp_path: Path) -> tuple[dict[str, Any], str]:
    program = browser.find_browser()
    if program is None:
        pytest.skip("no chromium here (apt-get install chromium)")
    file = tmp_path / "compare.html"
    file.write_text(page.replace("<title>", PROBE + "<title>", 1))
    document, console = browser.load(program, file, tmp_path / "profile", "--window-size=1240,900")
    title = re.search(r"<title>(.*?)</title>", document, re.DOTALL)
    assert title, document[:1000]
    return json.loads(title[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")), console


def test_a_browser_shows_the_full_page(runs: list[str], val: Shards, tmp_path: Path) -> None:
    comparison = compare(runs)
    page = to_html(comparison)
    assert "<script" not in page
    assert set(re.findall(r'(?:src|href)="(\w+:)', page)) == {"data:"}
    seen, console = seen_by_browser(page, tmp_path)
    assert (console, seen["errors"], seen["wide"], seen["outside"]) == ("", [], False, 0)
    assert seen["images"] == seen["shown"] == 3 * 12
    widths = seen["charts"]
    assert isinstance(widths, list)
    assert len(widths) == 2 * 4  # AP and loss, over four axes
    assert min(widths) > 200
    assert seen["lines"] == 2 * 4  # losses of two runs; AP has one point
    assert seen["verdict"] == "rgb(46, 125, 79)"  # green: the second is better
    base, other = comparison.runs
    differing = [name for name, value in base.numbers.items() if value != other.numbers[name]]
    assert seen["best"] == len(differing) + len(comparison.class_names)
    assert len(differing) > 7
    assert seen["significant"] > 3
    text = str(seen["text"])
    interval = comparison.interval(1, "AP")
    assert interval is not None
    verdict = f"other has a higher AP than base: {interval.difference:+.3f} ["
    for words in ("2 runs, compared with base", verdict, "and AP by class", "classification", "worker-hours",
                  "optim.lr", val.fingerprint, "ground truth: "):  # fmt: skip
        assert words in text


def test_names_are_shown_and_not_executed(tmp_path: Path, val: Shards) -> None:
    folder = tmp_path / "<img src=x onerror=alert(1)>"
    write_evaluated_run(folder, val, make_detections(val))
    page = to_html(compare([str(folder), str(folder)]))
    assert "<img src=x" not in page
    assert "&lt;img src=x onerror=alert(1)&gt;" in page


def test_shards_that_cannot_be_reached_or_have_changed_are_named(
    runs: list[str], val: Shards, tmp_path: Path
) -> None:
    gone = tmp_path / "gone"
    shutil.copytree(val.location, gone)
    moved = open_shards(str(gone))
    for name in ("a", "b"):
        write_evaluated_run(tmp_path / name, moved, make_detections(moved, seed=len(name)), settings={"x": 1})
    rows = make_detections(moved, seed=7)
    write_evaluated_run(tmp_path / "c", moved, rows)
    comparison = compare([str(tmp_path / "a"), str(tmp_path / "c")])
    shutil.rmtree(gone)
    page = to_html(comparison)
    assert "the images cannot be read: " in page
    assert str(gone) in page
    assert page.count("<img") == 0
    shutil.copytree(Path(val.location).parent / "train", gone)
    assert "has other data now (fingerprint" in to_html(comparison)


def test_different_validation_data_is_said_plainly(runs: list[str], tiny_data: Path, tmp_path: Path) -> None:
    other = open_shards(str(tiny_data / "train"))
    write_evaluated_run(tmp_path / "elsewhere", other, make_detections(other))
    page = to_html(compare([runs[0], str(tmp_path / "elsewhere")]))
    seen, _ = seen_by_browser(page, tmp_path)
    assert (seen["best"], seen["significant"], seen["images"]) == (0, 0, 0)
    assert seen["verdict"] == "rgb(198, 40, 40)"  # red
    assert "elsewhere was evaluated on other validation data than base: no comparison" in str(seen["text"])
    assert "DIFFERENT VALIDATION DATA" in str(seen["text"])
