"""The page is self-contained, and a real browser shows it."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

import browser
import planted_shards as made
from raydetr.doctor.examine import examine
from raydetr.doctor.findings import TrainingTarget
from raydetr.doctor.page import histogram_chart, to_html
from raydetr.doctor.report import Histogram

PROBE = """<script>
const errors = [];
addEventListener("error", event => errors.push(String(event.message || event.target.src)), true);
addEventListener("load", () => {
  const images = [...document.images];
  document.title = JSON.stringify({
    images: images.length,
    shown: images.filter(image => image.naturalWidth > 100 && image.getBoundingClientRect().width > 100).length,
    wide: document.documentElement.scrollWidth > innerWidth,
    charts: [...document.querySelectorAll("svg rect")].filter(bar => bar.getBoundingClientRect().height > 5).length,
    bars: [...document.querySelectorAll("td.barred i")].map(bar => bar.getBoundingClientRect().width),
    verdict: getComputedStyle(document.querySelector(".verdict")).backgroundColor,
    text: document.body.innerText,
    errors,
  });
});
</script>"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("page")
    train, val = made.healthy(30, 1), made.healthy(20, 2)
    for split in (train, val):
        split.categories[1]["name"] = "<script>alert('dog')</script>"
    val.samples[3].image = train.samples[5].image
    val.samples[4].image = val.samples[4].image[:300]
    train.samples[6].annotations[0]["bbox"] = [1, 1, 30, -9]
    train.samples[7].annotations[0]["bbox"] = [50, 1, 40, 40]
    train.samples[8].record["file_name"] = '"><b>8</b>.jpg'
    train.samples[9].image = train.samples[8].image
    locations = [str(made.write(train, folder / "train")), str(made.write(val, folder / "val"))]
    return to_html(examine(locations, TrainingTarget(), num_processes=1))


class Loaded(HTMLParser):
    """Collects the tags of a page, and the sources that it would load."""

    def __init__(self) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]


def test_the_page_loads_nothing_and_runs_nothing(page: str) -> None:
    loaded = Loaded()
    loaded.feed(page)
    assert loaded.sources
    assert all(source.startswith("data:") for source in loaded.sources)
    assert "script" not in loaded.tags
    assert "url(" not in page
    assert "@import" not in page


def test_names_are_shown_and_not_executed(page: str) -> None:
    assert "&lt;script&gt;alert" in page
    assert "<script" not in page
    assert "&quot;&gt;&lt;b&gt;8" in page


def test_a_browser_shows_the_full_page(page: str, tmp_path: Path) -> None:
    program = browser.find_browser()
    if program is None:
        pytest.skip("no chromium here (apt-get install chromium)")
    probed = tmp_path / "doctor.html"
    probed.write_text(page.replace("<title>", PROBE + "<title>", 1))
    document, console = browser.load(program, probed, tmp_path / "profile", "--window-size=1240,900")
    title = re.search(r"<title>(.*?)</title>", document, re.DOTALL)
    assert title, document[:1000]
    seen = json.loads(title[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert console == ""
    assert seen["errors"] == []
    assert seen["images"] == seen["shown"] >= 16 + 4  # Two galleries and the images of findings
    assert not seen["wide"]
    assert seen["charts"] > 6
    assert max(seen["bars"]) > 50
    assert seen["verdict"] == "rgb(198, 40, 40)"  # Red: there are errors
    for words in ("training must not start", "malformed-boxes", "image 1007 (1007.jpg)", "not readable",
                  "1 image of val (5.0%) is also in train", "Objects per image",
                  "<script>alert('dog')</script>"):  # fmt: skip
        assert words in seen["text"]


def test_heights_of_bars_are_proportional_to_fractions() -> None:
    one, other = Histogram((0, 1, 2), (1, 3, 0)), Histogram((0, 1, 2), (0, 0, 5))
    chart = histogram_chart("title", "unit", [one, other], ["train", "<val>"])
    heights = [float(height) for height in re.findall(r'<rect [^>]*height="([\d.]+)"', chart)]
    assert heights == pytest.approx([heights[5] / 4, heights[5] * 3 / 4, 0, 0, 0, heights[5]], abs=0.1)
    assert "&lt;val&gt;, 2 and more unit: 5 (100.0%)" in chart
    assert "train, 1 to under 2 unit: 3 (75.0%)" in chart


def test_values_are_counted_between_their_edges() -> None:
    import numpy as np

    counted = Histogram.of(np.array([0, 0, 1, 4, 5, 99]), (0, 1, 5))
    assert counted.counts == (2, 2, 2)
