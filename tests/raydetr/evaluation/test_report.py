"""The report: its numbers, its files, and a page that a real browser shows."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import browser
from raydetr.evaluation.analysis import FORMAT_VERSION
from raydetr.evaluation.coco_metrics import coco_ap
from raydetr.evaluation.report import analyze, report_files, write_report
from raydetr.evaluation.report_page import MAX_MATRIX
from raydetr.evaluation.results import Results

ROOT = Path(__file__).parents[3]
NAMES = [
    "cat",
    "<script>alert('dog')</script>",
    "日本語の名前",
    "a class name that is long enough to need two lines, or to be shortened somewhere in the middle of it",
    "$x^2$ \\frac{1}{2} under_score",
    "_private",
    "line\nbreak",
]


def made(num_classes: int, seed: int = 0, num_images: int = 40) -> tuple[dict[str, Any], Results]:
    """Return ground truth with a class without objects, crowds, and detections of every kind."""
    rng = np.random.default_rng(seed)
    categories = [
        {"id": 5 * k, "name": NAMES[k] if k < len(NAMES) else f"class {k}"} for k in range(num_classes)
    ]
    images = [
        {"id": 3 * i, "file_name": f'"><b>{i}</b>.jpg', "width": 160, "height": 120}
        for i in range(num_images)
    ]
    annotations, rows = [], []
    for image in images:
        for _ in range(rng.integers(0, 6)):
            width, height = rng.uniform(10, 60, 2)
            box = [rng.uniform(0, 160 - width), rng.uniform(0, 120 - height), width, height]
            kind = int(rng.integers(max(1, num_classes - 1)))
            annotations.append(
                {
                    "id": len(annotations),
                    "image_id": image["id"],
                    "category_id": 5 * kind,
                    "bbox": box,
                    "area": width * height,
                    "iscrowd": int(rng.random() < 0.05),
                }
            )
            for _ in range(rng.integers(0, 3)):
                moved = [*(box[:2] + rng.normal(0, 4, 2)), *box[2:]]
                other = kind if rng.random() < 0.7 else int(rng.integers(num_classes))
                rows.append((image["id"], 5 * other, moved, rng.random()))
    names = ("image_id", "category_id", "bbox", "score")
    results = Results.from_coco(dict(zip(names, row, strict=True)) for row in rows)
    return {"images": images, "annotations": annotations, "categories": categories}, results


def read_image(image_id: int) -> Image.Image | None:
    if image_id == 0:
        return None
    pixels = np.random.default_rng(image_id).integers(0, 256, (6, 8, 3), np.uint8)
    return Image.fromarray(pixels).resize((160, 120))


def test_the_numbers_are_those_of_coco() -> None:
    truth, results = made(6)
    report = analyze(truth, results)
    assert report.table == coco_ap(truth, results, "hotcoco")
    reference = coco_ap(truth, results, "pycocotools")
    assert dict(report.table.numbers) == pytest.approx(dict(reference.numbers), abs=1e-12)
    assert [row.ap for row in report.classes] == pytest.approx(
        [row.ap if row.ap >= 0 else None for row in reference.classes], abs=1e-12
    )
    assert report.tide is not None
    assert report.tide.ap50 == pytest.approx(report.table["AP50"], abs=1e-12)
    assert report.curves.means["0.50"].mean() == pytest.approx(report.table["AP50"], abs=1e-12)
    assert report.curves.means["0.75"].mean() == pytest.approx(report.table["AP75"], abs=1e-12)
    assert report.curves.means["0.50:0.95"].mean() == pytest.approx(report.table["AP"], abs=1e-12)


def test_ap_of_a_class_and_a_size_is_that_of_pycocotools_for_this_class_alone() -> None:
    truth, results = made(5)
    report = analyze(truth, results)
    for row in report.classes:
        alone = {
            **truth,
            "categories": [c for c in truth["categories"] if c["id"] == row.category_id],
            "annotations": [a for a in truth["annotations"] if a["category_id"] == row.category_id],
        }
        table = coco_ap(alone, results[results.category_ids == row.category_id], "pycocotools")
        found = [row.ap, row.ap50, row.ap75, row.ap_small, row.ap_medium, row.ap_large, row.ar100]
        names = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR100")
        wanted = [table[name] if table[name] >= 0 else None for name in names]
        assert found == pytest.approx(wanted, abs=1e-12)


EMPTY: dict[str, Any] = {"images": [], "annotations": [], "categories": []}
ONE = {
    "images": [{"id": 1, "file_name": "1.jpg", "width": 50, "height": 50}],
    "annotations": [{"id": 0, "image_id": 1, "category_id": 0, "bbox": [5, 5, 20, 20], "area": 400, "iscrowd": 0}],
    "categories": [{"id": 0, "name": "thing"}],
}  # fmt: skip
HIT = {"image_id": 1, "category_id": 0, "bbox": [5, 5, 20, 20], "score": 0.9}


@pytest.mark.parametrize(
    ("truth", "rows", "sentence"),
    [
        (EMPTY, [], "no objects in the ground truth"),
        ({**ONE, "categories": []}, [], "no objects in the ground truth"),
        ({**ONE, "annotations": []}, [HIT], "no objects in the ground truth"),
        (
            {**ONE, "annotations": [{**ONE["annotations"][0], "iscrowd": 1}]},
            [HIT],
            "no objects in the ground truth",
        ),
        (ONE, [], "all objects were missed"),
        (ONE, [{**HIT, "bbox": [40, 40, 5, 5]}], "No detection matches an object"),
        (ONE, [HIT], "No single kind of error costs AP50"),
        (ONE, [{**HIT, "score": 37.5}], "best: F1 1.000"),
        (ONE, [{**HIT, "bbox": [5, 5, 0, 0]}], "No detection matches an object"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_nothing_to_measure_is_said(truth: dict[str, Any], rows: list[dict[str, Any]], sentence: str) -> None:
    report = analyze(truth, Results.from_coco(rows))
    files = report_files(report, lambda _: Image.new("RGB", (50, 50)))
    assert sentence in files["report.html"].decode()
    assert strict_json(files["report.json"])["format_version"] == FORMAT_VERSION


def strict_json(content: bytes) -> dict[str, Any]:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    value: dict[str, Any] = json.loads(content, parse_constant=refuse)
    return value


def test_detections_of_unknown_classes_do_not_count() -> None:
    report = analyze(ONE, Results.from_coco([HIT, {**HIT, "category_id": 8}]))
    assert report.counts["detections"] == 1
    assert report.table["AP"] == pytest.approx(1.0)


def test_losses_and_speed_are_shown_if_they_are_given() -> None:
    truth, results = made(3)
    without = report_files(analyze(truth, results), read_image)
    assert "losses.jpg" not in without
    assert "largest losses" not in without["report.html"].decode()
    assert "Speed" not in without["report.html"].decode()
    losses = {image["id"]: float(number) for number, image in enumerate(truth["images"])}
    report = analyze(truth, results, losses=losses, speed={"latency_ms": 12.34, "images_per_second": 81.0})
    assert report.losses[0] == (truth["images"][-1]["id"], 39.0)
    assert [loss for _, loss in report.losses] == sorted(losses.values(), reverse=True)[:12]
    files = report_files(report, read_image)
    page = files["report.html"].decode()
    assert "Speed: 12.3 ms for an image (median), 81.0 images per second." in page
    assert "loss 39" in page
    assert Image.open(BytesIO(files["losses.jpg"])).width > 600
    assert strict_json(files["report.json"])["losses"][0]["file_name"] == '"><b>39</b>.jpg'


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"losses": {1: 0.5}}, "a loss is for image 1"),
        ({"losses": {3: float("nan")}}, "the loss of image 3 is nan"),
        ({"speed": {"ms": 3.0}}, "speed has 'ms': it can have latency_ms"),
        ({"speed": {"latency_p95_ms": float("inf")}}, "latency_p95_ms is inf"),
    ],
)
def test_wrong_losses_and_speed_are_refused(extra: dict[str, Any], message: str) -> None:
    truth, results = made(3)
    with pytest.raises(ValueError, match=message):
        analyze(truth, results, **extra)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("num_classes", [1, 7, 90])
def test_the_files_are_complete_pictures(num_classes: int, tmp_path: Path) -> None:
    truth, results = made(num_classes)
    write_report(analyze(truth, results), tmp_path / "new" / "report", read_image)
    files = {path.name: path.read_bytes() for path in (tmp_path / "new" / "report").iterdir()}
    plots = {"precision_recall.png", "classes.png", "tide.png", "confusion.png", "calibration.png"}
    assert set(files) == {*plots, "mistakes.jpg", "report.json", "report.html"}
    for name in plots | {"mistakes.jpg"}:
        image = Image.open(BytesIO(files[name]))
        image.load()
        assert min(image.size) > 150
        assert len(image.convert("RGB").getcolors(2**24) or []) > 5
    assert len(files["report.html"]) < 2_500_000
    page, numbers = files["report.html"].decode(), strict_json(files["report.json"])
    rows = re.search(r'<table class="matrix">.*?</table>', page, re.DOTALL)
    assert rows is not None
    assert rows[0].count("<tr>") == min(num_classes, MAX_MATRIX) + 2  # With the header and background
    assert (f"the {MAX_MATRIX} of {num_classes} classes" in page) == (num_classes > MAX_MATRIX)
    assert len(numbers["classes"]) == num_classes
    num_objects = sum(not a["iscrowd"] for a in truth["annotations"])
    pairs = numbers["confusion"]["rows"]
    assert sum(count for true, _, count in pairs if true is not None) == num_objects


class Loaded(HTMLParser):
    """Collects tags and the sources that a page would load."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.texts: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        loads = ("src", "srcset", "data", *(["href"] if tag == "link" else []))
        self.sources += [value or "" for name, value in attrs if name in loads]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_the_page_loads_nothing_and_executes_nothing() -> None:
    truth, results = made(7)
    files = report_files(
        analyze(truth, results), read_image, title="<b>title</b>", about={"<i>": "</table><script>"}
    )
    page = files["report.html"].decode()
    loaded = Loaded(page)
    assert "img" in loaded.tags
    assert {"script", "b>1", "iframe"} & set(loaded.tags) == set()
    assert all(source.startswith("data:") for source in loaded.sources)
    assert "url(" not in page
    assert "@import" not in page
    text = "".join(loaded.texts)
    for name in ("<b>title</b>", "</table><script>", *NAMES[:5]):
        assert name in text
    assert re.search(r'"><b>\d+</b>\.jpg', text)


def test_without_images_the_page_says_so() -> None:
    truth, results = made(3)
    files = report_files(analyze(truth, results), None)
    assert "No images were given" in files["report.html"].decode()
    assert "mistakes.jpg" not in files


PROBE = """<script>
const errors = [];
addEventListener("error", event => errors.push(String(event.message || event.target.src)), true);
addEventListener("load", () => {
  const images = [...document.images];
  const ids = [...document.querySelectorAll("nav a")].map(link => link.getAttribute("href").slice(1));
  document.title = JSON.stringify({
    images: images.length,
    shown: images.filter(image => image.naturalWidth > 90 && image.getBoundingClientRect().width > 90).length,
    wide: document.documentElement.scrollWidth > innerWidth,
    dead: ids.filter(id => !document.getElementById(id)),
    bars: [...document.querySelectorAll(".bar i")].map(bar => bar.getBoundingClientRect().width),
    cells: document.querySelectorAll(".matrix td").length,
    text: document.body.innerText,
    errors,
  });
});
</script>"""


@pytest.mark.parametrize(("num_classes", "width"), [(7, 1366), (90, 1280)])
def test_a_browser_shows_the_full_page(num_classes: int, width: int, tmp_path: Path) -> None:
    program = browser.find_browser()
    if program is None:
        pytest.skip("no chromium here (apt-get install chromium)")
    truth, results = made(num_classes)
    losses = {image["id"]: 1.0 for image in truth["images"]}
    page = report_files(analyze(truth, results, losses=losses), read_image)["report.html"].decode()
    file = tmp_path / "report.html"
    file.write_text(page.replace("<title>", PROBE + "<title>", 1), encoding="utf-8")
    document, console = browser.load(program, file, tmp_path / "profile", f"--window-size={width},800")
    title = re.search(r"<title>(.*?)</title>", document, re.DOTALL)
    assert title, document[:1000]
    seen = json.loads(title[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert console == ""
    assert seen["errors"] == []
    assert seen["images"] == seen["shown"] >= 3 + 12 + 10
    assert not seen["wide"]
    assert seen["dead"] == []
    assert max(seen["bars"]) > 10
    assert seen["cells"] == (min(num_classes, MAX_MATRIX) + 1) ** 2
    for words in ("Where AP is lost", "Most confident mistakes", "<script>alert('dog')</script>", "日本語の名前",
                  "not readable", "classification: the object is:"):  # fmt: skip
        assert words in seen["text"]


def test_neither_torch_nor_ray_is_loaded() -> None:
    program = (
        f"import sys; sys.path[:0] = [{str(ROOT / 'models')!r}, {str(ROOT / 'platform')!r}]; "
        "import raydetr.evaluation.report; print(*{name.partition('.')[0] for name in sys.modules})"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert {"torch", "ray", "mlflow", "detrs"} & set(result.stdout.split()) == set()
