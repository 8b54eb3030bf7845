"""The page is self-contained, and a real browser shows it."""

from __future__ import annotations

import json
import re
import tomllib
from fnmatch import fnmatch
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path

import pytest

import browser
import planted_shards as made
from raydetr.doctor.examine import examine
from raydetr.doctor.findings import TrainingTarget
from raydetr.doctor.report import COUNT_EDGES, histogram

PROBE = """<script>
const errors = [];
addEventListener("error", event => errors.push(String(event.message || event.target.src)), true);
addEventListener("load", () => {
  const images = [...document.images];
  document.title = JSON.stringify({
    images: images.length,
    shown: images.filter(image => image.naturalWidth > 100 && image.getBoundingClientRect().width > 100).length,
    wide: document.documentElement.scrollWidth > innerWidth,
    charts: [...document.querySelectorAll(".chart i")].filter(bar => bar.getBoundingClientRect().height > 5).length,
    bars: [...document.querySelectorAll(".bar i")].map(bar => bar.getBoundingClientRect().width),
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
    return examine(locations, TrainingTarget(), num_processes=1).to_html()


def test_a_drawing_that_fails_does_not_take_the_findings_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("no font")

    train, val = made.healthy(30, 1), made.healthy(20, 2)
    train.samples[7].annotations[0]["bbox"] = [50, 1, 40, 40]
    locations = [str(made.write(train, tmp_path / "train")), str(made.write(val, tmp_path / "val"))]
    monkeypatch.setattr("raydetr.doctor.report.draw_boxes", fail)
    report = examine(locations, TrainingTarget(), num_processes=1)
    assert "data:image/jpeg" not in report.to_html()
    assert report.findings
    assert "50, 1, 40, 40" in report.to_html()
    assert "warning: no picture of sample 7 of train: RuntimeError: no font" in capsys.readouterr().err


VOID_TAGS = {"img", "link", "meta"}


class Loaded(HTMLParser):
    """Collects tags, texts, and the sources that a page would load; every tag must be closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]
        self.texts += [value or "" for name, value in attrs if name == "alt"]
        self.open += [tag] if tag not in VOID_TAGS else []

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_the_page_loads_nothing_and_runs_nothing(page: str) -> None:
    loaded = Loaded(page)
    assert loaded.sources
    assert all(source.startswith("data:") for source in loaded.sources)
    assert "script" not in loaded.tags
    assert "url(" not in page
    assert "@import" not in page


def test_names_are_shown_and_not_executed(page: str) -> None:
    assert "<script" not in page
    assert "<b>8" not in page
    texts = Loaded(page).texts
    assert "<script>alert('dog')</script>" in texts
    assert texts.count('image 1009 ("><b>8</b>.jpg)') >= 2  # As a caption, and in place of its image


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


def test_heights_of_bars_are_proportional_to_fractions(tmp_path: Path) -> None:
    train, val = made.healthy(16, 1), made.healthy(5, 2)  # With two objects in each image
    for sample in train.samples[:4]:
        del sample.annotations[0]
    locations = [str(made.write(train, tmp_path / "train")), str(made.write(val, tmp_path / "<val>"))]
    page = examine(locations, num_processes=1).to_html()
    chart = page[page.index('<div class="chart"') : page.index("</figure>", page.index('<div class="chart"'))]
    bars = re.findall(r'<i style="height: ([\d.]+)%; [^"]*" title="(.*?), (.*?)"></i>', chart)
    assert len(bars) == 2 * len(COUNT_EDGES)
    assert {(split, tip): float(height) for height, split, tip in bars if float(height)} == {
        ("train", "1 to under 2 objects: 4 (25.0%)"): 25,
        ("train", "2 to under 3 objects: 12 (75.0%)"): 75,
        ("&lt;val&gt;", "2 to under 3 objects: 5 (100.0%)"): 100,
    }


def test_the_template_is_part_of_the_package() -> None:
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["*"]
    data = {file.name for file in resources.files("raydetr.doctor").iterdir() if file.is_file()}
    assert "page.html" in data
    assert [name for name in data if not any(fnmatch(name, one) for one in ("*.py", *patterns))] == []


def test_values_are_counted_between_their_edges() -> None:
    import numpy as np

    counted = histogram(np.array([0, 0, 1, 4, 5, 99]), (0, 1, 5))
    assert counted == {"edges": [0, 1, 5], "counts": [2, 2, 2]}
