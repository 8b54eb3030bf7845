"""Data on a server gives the same findings as on the disk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import planted_shards as made
from object_stores import WebServer
from raydetr.doctor.examine import examine, quick_warnings
from raydetr.doctor.findings import TrainingTarget
from raydetr.doctor.report import Report


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    train, val = made.healthy(30, 1), made.healthy(20, 2)
    val.samples[3].image = train.samples[5].image
    train.samples[6].annotations[0]["bbox"] = [1, 1, 30, -9]
    train.samples[8].image = train.samples[8].image[:300]
    for name, split in (("train", train), ("val", val)):
        made.write(split, tmp_path / name)
    return tmp_path


@pytest.fixture
def web(folder: Path) -> Iterator[WebServer]:
    server = WebServer(folder)
    yield server
    server.close()


def findings(report: Report) -> object:
    return report.to_dict()["findings"]


def test_a_server_and_file_urls_give_the_findings_of_the_disk(folder: Path, web: WebServer) -> None:
    on_disk = examine([str(folder / name) for name in ("train", "val")], num_processes=1)
    assert {finding.code for finding in on_disk.findings} == {
        "corrupt-samples", "malformed-boxes", "leaked-images"
    }  # fmt: skip
    for root in (web.url, folder.as_uri()):
        report = examine([f"{root}/train", f"{root}/val"], num_processes=1)
        assert findings(report) == findings(on_disk)
        assert [s["name"] for s in report.statistics] == ["train", "val"]
    assert len(web.requests) < 50 / 2  # Neighboring samples are read together


def test_the_quick_part_reads_no_samples_from_a_server(folder: Path, web: WebServer) -> None:
    from raydetr.shards.reader import open_shards

    shards = [open_shards(f"{web.url}/{name}") for name in ("train", "val")]
    before = len(web.requests)
    assert quick_warnings(shards[0], shards[1], TrainingTarget()) == []
    assert len(web.requests) == before
