"""Plant each problem once, alone, in healthy data, and check that exactly its finding is reported."""

from __future__ import annotations

import copy
import io
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import planted_shards as made
from planted_shards import Split
from raydetr.doctor.examine import examine
from raydetr.doctor.findings import TrainingTarget
from raydetr.doctor.report import Report

DOCUMENT = Path(__file__).parents[3] / "docs/data/doctor.md"
TARGET = TrainingTarget(recipe="test", num_queries=20, batch_size=8)


def healthy() -> tuple[Split, Split]:
    return made.healthy(30, seed=1), made.healthy(20, seed=2)


def examined(folder: Path, *splits: Split, target: TrainingTarget = TARGET) -> Report:
    names = ("train", "val", "test")[: len(splits)]
    locations = [str(made.write(split, folder / name)) for name, split in zip(names, splits, strict=True)]
    return examine(locations, target, num_processes=1)


def test_healthy_data_has_no_findings(tmp_path: Path) -> None:
    report = examined(tmp_path, *healthy())
    assert report.findings == ()
    assert report.may_start
    assert report.verdict() == "training may start: nothing was found"


# --- Each of these functions plants one problem into a pair of healthy splits ---


def undecodable(train: Split, val: Split) -> None:
    train.samples[3].image = train.samples[3].image[:300]


def other_size(train: Split, val: Split) -> None:
    train.samples[3].record |= {"width": made.WIDTH + 1}


def exif_orientation(train: Split, val: Split) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    rng = np.random.default_rng(9)
    val.samples[5].image = made.encoded(made.random_image(rng), exif=exif)


def narrow(train: Split, val: Split) -> None:
    _resized(train, 0, (330, 64))


def thumbnail(train: Split, val: Split) -> None:
    _resized(train, 0, (60, 31))


def _resized(split: Split, number: int, size: tuple[int, int]) -> None:
    sample = split.samples[number]
    sample.image = made.encoded(made.random_image(np.random.default_rng(9), size))
    sample.record |= {"width": size[0], "height": size[1]}
    for annotation in sample.annotations:
        annotation["bbox"] = [annotation["id"] % 5, 1, 25, 19]


def areas_in_shares(train: Split, val: Split) -> None:
    train.areas_follow_boxes = False
    for sample in train.samples[:4]:
        for annotation in sample.annotations:
            annotation["area"] /= 64 * 48


def copies_with_other_labels(train: Split, val: Split) -> None:
    """List one file twice, each time with a part of its objects."""
    for number in (3, 7):
        copy_of = train.samples[number]
        train.samples[number + 10].image = copy_of.image


def box_of_text(train: Split, val: Split) -> None:
    train.samples[2].annotations[0]["bbox"][2] = "9"


def huge_box(train: Split, val: Split) -> None:
    train.samples[2].annotations[0]["bbox"][2] = 1e300  # a number, but the reader refuses it


def negative_box(train: Split, val: Split) -> None:
    val.samples[2].annotations[1]["bbox"][3] = -4


def short_box(train: Split, val: Split) -> None:
    train.samples[2].annotations[0]["bbox"].pop()


def no_box(train: Split, val: Split) -> None:
    del train.samples[2].annotations[0]["bbox"]


def unknown_category(train: Split, val: Split) -> None:
    train.samples[2].annotations[0]["category_id"] = 77


def ids_off_by_one(train: Split, val: Split) -> None:
    for sample in train.samples:
        for annotation in sample.annotations:
            annotation["category_id"] -= 1


def relative(train: Split, val: Split) -> None:
    for sample in train.samples:
        for annotation in sample.annotations:
            x, y, w, h = annotation["bbox"]
            annotation["bbox"] = [x / made.WIDTH, y / made.HEIGHT, w / made.WIDTH, h / made.HEIGHT]


def corners(train: Split, val: Split) -> None:
    for sample in train.samples:
        for annotation in sample.annotations:
            x, y, w, h = annotation["bbox"]
            annotation["bbox"] = [x, y, x + w, y + h]


def exceeding(train: Split, val: Split) -> None:
    train.samples[0].annotations[0]["bbox"] = [50, 10, 20, 20]


def many_exceeding(train: Split, val: Split) -> None:
    for number in range(6):
        train.samples[number].annotations[0]["bbox"] = [50, 10 + number, 20, 20]


def without_area(train: Split, val: Split) -> None:
    train.samples[0].annotations.append(_another(train, 0, [10, 10, 0, 20]))


def outside(train: Split, val: Split) -> None:
    train.samples[0].annotations.append(_another(train, 0, [70, 10, 9, 20]))


def _another(split: Split, number: int, box: list[float], category_id: int = 1) -> dict[str, object]:
    sample = split.samples[number]
    numbered = 100_000 * sample.record["id"] + len(sample.annotations)
    return {**copy.deepcopy(sample.annotations[0]), "id": numbered, "bbox": box, "category_id": category_id}


def full_images(train: Split, val: Split) -> None:
    for sample in train.samples[:15]:
        sample.annotations[0]["bbox"] = [0, 0, made.WIDTH, made.HEIGHT]


def equal_boxes(train: Split, val: Split) -> None:
    for sample in train.samples[:12]:
        sample.annotations[0]["bbox"] = [10, 10, 20, 20]


def duplicate_object(train: Split, val: Split) -> None:
    train.samples[0].annotations.append(_another(train, 0, train.samples[0].annotations[0]["bbox"]))


def tiny(train: Split, val: Split) -> None:  # The resize to 800 pixels enlarges 16.7 times
    for number in range(10):
        train.samples[number].annotations[0]["bbox"] = [10 + number, 10, 20, 0.2]


def small_class(train: Split, val: Split) -> None:
    for number in range(16):
        train.samples[number].annotations[1]["bbox"] = [10 + number, 10, 20, 0.4]


def crowded(count: int) -> Callable[[Split, Split], None]:
    def plant(train: Split, val: Split) -> None:
        rng = np.random.default_rng(5)
        boxes = rng.uniform((0, 0, 5, 5), (40, 30, 20, 18), (count, 4)).tolist()
        train.samples[4].annotations = [
            _another(train, 4, box, 1 + number % 2) | {"id": number + 1} for number, box in enumerate(boxes)
        ]

    return plant


def nothing_to_learn(train: Split, val: Split) -> None:
    for sample in train.samples:
        sample.annotations.clear()


def nothing_to_evaluate(train: Split, val: Split) -> None:
    for sample in val.samples:
        sample.annotations.clear()


def only_crowds(train: Split, val: Split) -> None:
    for sample in train.samples:
        for annotation in sample.annotations:
            annotation["iscrowd"] = 1


def another_class(train: Split, val: Split) -> None:
    for split in (train, val):
        split.categories.append({"id": 3, "name": "horse"})


def class_of_train_only(train: Split, val: Split) -> None:
    another_class(train, val)
    _relabelled(train, 10)


def class_of_val_only(train: Split, val: Split) -> None:
    another_class(train, val)
    _relabelled(val, 10)


def rare_class(train: Split, val: Split) -> None:
    another_class(train, val)
    _relabelled(train, 9)
    _relabelled(val, 10)


def _relabelled(split: Split, count: int) -> None:
    for sample in split.samples[:count]:
        sample.annotations[0]["category_id"] = 3


def imbalanced(train: Split, val: Split) -> None:
    rng = np.random.default_rng(5)
    another_class(train, val)
    _relabelled(train, 10)
    _relabelled(val, 10)
    for number in range(30):
        boxes = rng.uniform((0, 0, 8, 8), (40, 30, 20, 18), (40, 4)).tolist()
        train.samples[number].annotations += [_another(train, number, box) for box in boxes]
        for at, annotation in enumerate(train.samples[number].annotations):
            annotation["id"] = 1000 * number + at + 1


def background(train: Split, val: Split) -> None:
    for split in (train, val):
        split.categories[0]["name"] = "__background__"


def similar_names(train: Split, val: Split) -> None:
    for split in (train, val):
        split.categories[1]["name"] = "Cat "


def gaps(train: Split, val: Split) -> None:
    _moved(train, 2, 7)
    _moved(val, 2, 7)


def large_ids(train: Split, val: Split) -> None:
    _moved(train, 2, 12_345)
    _moved(val, 2, 12_345)


def _moved(split: Split, old: int, new: int) -> None:
    for category in split.categories:
        category["id"] = new if category["id"] == old else category["id"]
    for sample in split.samples:
        for annotation in sample.annotations:
            annotation["category_id"] = new if annotation["category_id"] == old else annotation["category_id"]


def other_names(train: Split, val: Split) -> None:
    val.categories[1]["name"] = "wolf"


def ids_moved_in_val(train: Split, val: Split) -> None:
    _moved(val, 2, 3)
    _moved(val, 1, 2)


def other_spelling(train: Split, val: Split) -> None:
    val.categories[1]["name"] = "Dog"


def same_data(train: Split, val: Split) -> None:
    val.samples[:] = train.samples


def less_than_a_batch(train: Split, val: Split) -> None:
    del train.samples[7:]
    for sample in train.samples:  # Otherwise its classes are rare
        rng = np.random.default_rng(sample.record["id"])
        boxes = rng.uniform((0, 0, 8, 8), (40, 30, 20, 18), (4, 4)).tolist()
        sample.annotations += [
            _another(train, train.samples.index(sample), box, 1 + k % 2)
            | {"id": sample.record["id"] * 100 + k}
            for k, box in enumerate(boxes)
        ]


def leaked(train: Split, val: Split) -> None:
    for number in (3, 8):
        val.samples[number].image = train.samples[2 * number].image


def leaked_near_duplicate(train: Split, val: Split) -> None:
    val.samples[3].image = _recompressed(train.samples[7].image)


def copied(train: Split, val: Split) -> None:
    for number in (3, 8, 9):
        train.samples[number].image = train.samples[20].image


def near_duplicate(train: Split, val: Split) -> None:
    train.samples[3].image = _recompressed(train.samples[7].image)


def _recompressed(content: bytes) -> bytes:
    with Image.open(io.BytesIO(content)) as image:
        return made.encoded(image, quality=40)


PLANTED = [
    (undecodable, "corrupt-samples", "error", 1, "cannot be decoded"),
    (areas_in_shares, "wrong-areas", "warning", 8, "image 1001 (1001.jpg): box ["),
    (
        copies_with_other_labels, "duplicate-images", "warning", 2,
        "in 2 groups; in 2 groups their annotations differ",
    ),
    (box_of_text, "malformed-boxes", "error", 1, "image 1003 (1003.jpg): annotation 0 has the box ["),
    (huge_box, "malformed-boxes", "error", 1, "1e+300"),
    (negative_box, "malformed-boxes", "error", 1, "val"),
    (short_box, "malformed-boxes", "error", 1, "bbox"),
    (no_box, "malformed-boxes", "error", 1, "bbox"),
    (unknown_category, "unknown-categories", "error", 1, "ids 77"),
    (ids_off_by_one, "unknown-categories", "error", 30, "all would fit with 1 added"),
    (other_size, "size-mismatch", "error", 1, "the file holds 64x48 pixels, the record has 65x48"),
    (relative, "relative-boxes", "error", 60, "fractions of the image's size"),
    (nothing_to_learn, "no-objects", "error", 1, "nothing to learn"),
    (only_crowds, "no-objects", "error", 1, "nothing to learn"),
    (other_names, "different-categories", "error", 1, "wolf"),
    (ids_moved_in_val, "different-categories", "error", 1, "all by +1"),
    (other_spelling, "different-categories", "error", 1, "'dog' and 'Dog'"),
    (nothing_to_evaluate, "no-objects", "warning", 1, "AP will be undefined"),
    (corners, "corner-boxes", "warning", None, "[x1, y1, x2, y2]"),
    (many_exceeding, "boxes-exceed-image", "warning", 6, "6 boxes that exceed the image (10.00%)"),
    (exceeding, "boxes-exceed-image", "warning", 1, "1 box that exceeds the image (1.67%)"),
    (without_area, "boxes-without-area", "warning", 1, "zero width or height"),
    (outside, "boxes-outside", "warning", 1, "entirely outside"),
    (full_images, "full-image-boxes", "warning", 15, "25%"),
    (equal_boxes, "equal-boxes", "warning", 12, "[10, 10, 20, 20] is in 12 images"),
    (duplicate_object, "duplicate-objects", "warning", 1, "annotated twice"),
    (tiny, "tiny-objects", "warning", 10, "17% of the objects"),
    (crowded(21), "more-objects-than-queries", "warning", 1, "queries (20)"),
    (another_class, "classes-without-objects", "warning", 1, "horse"),
    (class_of_train_only, "classes-without-objects", "note", 1, "horse"),
    (class_of_val_only, "classes-not-trained", "warning", 1, "horse"),
    (rare_class, "rare-classes", "warning", 1, "horse 9"),
    (background, "background-category", "warning", 1, "__background__"),
    (similar_names, "similar-names", "warning", 1, "'cat' and 'Cat '"),
    (same_data, "same-data", "warning", 1, "exactly the same samples"),
    (less_than_a_batch, "less-than-a-batch", "warning", 1, "7 images are fewer than a batch has (8)"),
    (leaked, "leaked-images", "warning", 2, "2 images of val (10.0%) are also in train"),
    (leaked_near_duplicate, "leaked-near-duplicates", "warning", 1, "1 image of val (5.0%) is almost the same"),
    (copied, "duplicate-images", "warning", 3, "3 images (10.0%) have the same bytes as another one, in 1 group"),
    (near_duplicate, "near-duplicates", "warning", 1, "1 image (3.3%)"),
    (exif_orientation, "exif-orientation", "note", 1, "EXIF"),
    (narrow, "narrow-images", "note", 1, "330x64"),
    (thumbnail, "tiny-images", "note", 1, "60x31"),
    (small_class, "small-classes", "note", 1, "dog 53%"),
    (crowded(101), "more-objects-than-detections", "note", 1, "101 objects"),
    (imbalanced, "imbalance", "note", 1, "'cat' has"),
    (gaps, "gaps-in-ids", "note", 5, "category_id 8"),
    (large_ids, "large-ids", "note", 1, "12345"),
]  # fmt: skip

# Findings that another one necessarily entails
COMPANIONS = {
    "malformed-boxes": {"corrupt-samples"},  # The reader refuses them
    "unknown-categories": {"corrupt-samples", "no-objects", "classes-not-trained", "classes-without-objects",
                           "rare-classes"},
    "relative-boxes": {"tiny-objects", "small-classes"},
    "no-objects": {"classes-not-trained"},
    "classes-not-trained": {"classes-without-objects"},
    "classes-without-objects": {"classes-without-objects"},
    "more-objects-than-detections": {"more-objects-than-queries"},
    "imbalance": {"more-objects-than-queries"},
}  # fmt: skip


@pytest.mark.parametrize(
    ("plant", "code", "level", "count", "words"),
    PLANTED,
    ids=[f"{row[1]}-{n}" for n, row in enumerate(PLANTED)],
)
def test_a_planted_problem_is_found_and_nothing_else(
    tmp_path: Path, plant: Callable[..., None], code: str, level: str, count: int | None, words: str
) -> None:
    train, val = healthy()
    plant(train, val)
    report = examined(tmp_path, train, val)
    found = {(finding.code, finding.level): finding for finding in report.findings}
    assert (code, level) in found, report.to_text()
    finding = found[code, level]
    assert count is None or finding.count == count
    text = " ".join([*finding.splits, finding.line(), *map(str, finding.examples)])
    assert words in text
    assert {found_code for found_code, _ in found} - {code} <= COMPANIONS.get(code, set()), report.to_text()
    assert report.may_start == (level != "error")
    assert finding.remedy
    assert code in report.to_text()


def test_every_finding_is_documented_with_its_level() -> None:
    table = re.findall(r"^\| `([a-z-]+)` \| ([a-z, ]+) \| .+ \|$", DOCUMENT.read_text(), re.MULTILINE)
    documented = {(code, level) for code, levels in table for level in levels.split(", ")}
    planted = {(code, level) for _, code, level, *_ in PLANTED}
    elsewhere = {("unusable-shards", "error"), ("shared-samples", "warning")}
    few = {
        (code, "note")
        for code in (
            "boxes-exceed-image",
            "boxes-without-area",
            "boxes-outside",
            "duplicate-objects",
            "near-duplicates",
            "rare-classes",
            "wrong-areas",
        )
    }
    few |= {(code, "warning") for code in ("corrupt-samples", "malformed-boxes", "unknown-categories")}
    assert documented == planted | elsewhere | few


def test_an_orientation_of_0_is_none(tmp_path: Path) -> None:
    train, val = healthy()
    exif = Image.Exif()
    exif[0x0112] = 0
    image = made.random_image(np.random.default_rng(9))
    train.samples[4].image = made.encoded(image, exif=exif)
    assert Image.open(io.BytesIO(train.samples[4].image)).getexif()[0x0112] == 0
    assert examined(tmp_path, train, val).findings == ()


def test_a_few_minor_problems_are_only_notes(tmp_path: Path) -> None:
    """The same problems as above, each in less than 1% of the objects or images."""
    train, val = made.healthy(220, seed=1), made.healthy(20, seed=2)
    for plant in (exceeding, without_area, outside, duplicate_object, near_duplicate):
        plant(train, val)
    found = {finding.code: finding.level for finding in examined(tmp_path, train, val).findings}
    assert found == dict.fromkeys(
        ("boxes-exceed-image", "boxes-without-area", "boxes-outside", "duplicate-objects", "near-duplicates"),
        "note",
    )


def test_a_few_wrong_areas_are_only_a_note(tmp_path: Path) -> None:
    train, val = made.healthy(220, seed=1), made.healthy(20, seed=2)
    train.areas_follow_boxes = False
    train.samples[5].annotations[0]["area"] = 0
    (finding,) = examined(tmp_path, train, val).findings
    assert (finding.code, finding.level, finding.count) == ("wrong-areas", "note", 1)


def test_rare_classes_of_the_validation_split_are_a_note(tmp_path: Path) -> None:
    train, val = healthy()
    another_class(train, val)
    _relabelled(train, 12)
    _relabelled(val, 9)
    (finding,) = examined(tmp_path, train, val).findings
    assert (finding.code, finding.level, finding.splits) == ("rare-classes", "note", ("val",))


def test_a_changed_byte_is_reported_with_shard_and_key(tmp_path: Path) -> None:
    train, _ = healthy()
    folder = made.write(train, tmp_path / "train")
    shard = folder / "shard-00000.tar"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    report = examine([str(folder)], TARGET, num_processes=1)
    (finding,) = report.findings
    assert (finding.code, finding.level, finding.count) == ("corrupt-samples", "error", 1)
    assert re.search(r"shard-00000.tar, key 00000000\d{4}: .*crc32", str(finding.examples[0]))
    assert report.statistics[0]["unusable_images"] == 1


def test_corrupt_samples_that_a_run_tolerates_are_a_warning(tmp_path: Path) -> None:
    train, val = healthy()
    undecodable(train, val)
    box_of_text(train, val)
    locations = [str(made.write(train, tmp_path / "train")), str(made.write(val, tmp_path / "val"))]
    codes = {"corrupt-samples", "malformed-boxes"}
    for max_corrupt, level in ((0, "error"), (1, "error"), (2, "warning"), (None, "warning")):
        report = examine(locations, replace(TARGET, max_corrupt=max_corrupt), num_processes=1)
        assert {(found.code, found.level) for found in report.findings} == {(code, level) for code in codes}
        assert report.may_start == (level == "warning")


def test_shards_that_cannot_be_opened_are_an_error_and_the_rest_is_examined(tmp_path: Path) -> None:
    train, _ = healthy()
    locations = [str(made.write(train, tmp_path / "train")), str(tmp_path / "nowhere")]
    report = examine(locations, TARGET, num_processes=1)
    (finding,) = report.findings
    assert (finding.code, finding.level) == ("unusable-shards", "error")
    assert "no shards found" in finding.text
    assert not report.may_start
    assert [numbers["images"] for numbers in report.statistics] == [30]


def test_the_same_location_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="given twice"):
        examine(["a", "a"])


def test_three_splits_are_compared_with_each_other(tmp_path: Path) -> None:
    splits = [made.healthy(30, seed) for seed in (1, 2, 3)]
    splits[2].samples[0].image = splits[1].samples[0].image
    (finding,) = examined(tmp_path, *splits).findings
    assert (finding.code, finding.splits) == ("leaked-images", ("val", "test"))
    assert "image 2001 (2001.jpg)" in str(finding.examples[0])
    assert "image 3001 (3001.jpg)" in str(finding.examples[0])
