"""Folders of runs: the same behavior on a disk and at a URL."""

from __future__ import annotations

import pickle
import threading
import time
from pathlib import Path

import pytest

from faulty_proxy import Fault, FaultyProxy
from raydetr.store import node_copies
from raydetr.store.folders import (
    Folder,
    create_file,
    file_sizes,
    local_file,
    local_output,
    modified,
    open_folder,
    read_part,
    remove_folder,
    with_retry_seconds,
    write_file,
)
from raydetr.store.retry import RemoteError
from raydetr.store.url_path import UrlPath


def test_files_are_written_found_and_removed(run_folder: Folder) -> None:
    assert not run_folder.exists()
    assert list(run_folder.glob("*/meta.json")) == []
    content = bytes(range(256)) * 40_000  # more than one part of an upload
    write_file(run_folder / "checkpoints" / "0048" / "state.pt", memoryview(content))
    for position in ("0048", "0096"):
        write_file(run_folder / "checkpoints" / position / "meta.json", position.encode())
    write_file(run_folder / "config.yaml", "größer: 1".encode())
    assert run_folder.exists()
    assert (run_folder / "checkpoints").exists()
    assert (run_folder / "config.yaml").read_text() == "größer: 1"
    write_file(run_folder / "config.yaml", b"seed: 2")
    assert (run_folder / "config.yaml").read_bytes() == b"seed: 2"
    found = sorted((run_folder / "checkpoints").glob("*/meta.json"))
    assert [path.parent.name for path in found] == ["0048", "0096"]
    assert [path.stem for path in found] == ["meta", "meta"]
    assert sorted(path.name for path in run_folder.iterdir()) == ["checkpoints", "config.yaml"]
    assert local_file(run_folder / "checkpoints" / "0048" / "state.pt").read_bytes() == content
    remove_folder(run_folder / "checkpoints" / "0048")
    remove_folder(run_folder / "checkpoints" / "0048")
    assert [path.name for path in (run_folder / "checkpoints").iterdir()] == ["0096"]
    assert not (run_folder / "checkpoints" / "0048" / "meta.json").exists()
    with pytest.raises(FileNotFoundError):
        (run_folder / "checkpoints" / "0048" / "meta.json").read_bytes()
    with pytest.raises(FileNotFoundError):
        (run_folder / "no such file").unlink()
    (run_folder / "no such file").unlink(missing_ok=True)
    with local_output(run_folder / "skipped") as folder:
        (folder / "step.json").write_text("{}")
    assert (run_folder / "skipped" / "step.json").read_text() == "{}"


def test_of_several_processes_one_creates_a_file(run_folder: Folder) -> None:
    created = list[bytes]()

    def create(content: bytes) -> None:
        if create_file(run_folder / "lease" / "000001.json", content):
            created.append(content)

    threads = [threading.Thread(target=create, args=(b"%d" % number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [(run_folder / "lease" / "000001.json").read_bytes()] == created
    assert [path.name for path in (run_folder / "lease").iterdir()] == ["000001.json"]


def test_paths_of_a_url(s3_url: str) -> None:
    path = open_folder(f"{s3_url}/run/")
    assert isinstance(path, UrlPath)
    assert str(path / "a" / "b.json") == f"{s3_url}/run/a/b.json"
    assert str((path / "a").parent) == f"{s3_url}/run"
    assert path / "a" == open_folder(f"{s3_url}/run/a") != path
    assert len({path / "a", path / "a", path}) == 2
    assert pickle.loads(pickle.dumps(path)) == path
    assert with_retry_seconds(path, 1.0) == path
    with pytest.raises(ValueError, match="ftp:// is not supported"):
        UrlPath.parse("ftp://host/run")


def test_a_location_of_this_machine_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert open_folder("runs/a") == tmp_path / "runs" / "a"
    assert open_folder(f"file://{tmp_path}/a%20b") == tmp_path / "a b"
    assert open_folder("~/runs") == Path.home() / "runs"


def test_what_is_in_a_folder_is_listed_without_what_is_below(run_folder: Folder) -> None:
    assert file_sizes(run_folder) == {}
    began = time.time()
    write_file(run_folder / "a.txt", b"0123456789")
    write_file(run_folder / "b" / "c.txt", b"below")
    write_file(run_folder / "b" / "d" / "e.txt", b"far below")
    assert sorted(path.name for path in run_folder.iterdir()) == ["a.txt", "b"]
    assert sorted(path.name for path in (run_folder / "b").iterdir()) == ["c.txt", "d"]
    assert file_sizes(run_folder) == {"a.txt": 10}
    assert read_part(run_folder / "a.txt", 3, 6) == b"345"
    assert abs(modified(run_folder / "a.txt") - began) < 5
    with pytest.raises(FileNotFoundError):
        modified(run_folder / "gone.txt")


def test_a_file_is_downloaded_once_per_node(
    s3_proxy: FaultyProxy, s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_copies.tempfile, "gettempdir", lambda: str(tmp_path))
    write_file(open_folder(s3_url) / "state.pt", b"x" * 3_000_000)
    sizes = list[int]()
    read = node_copies.Store.read
    monkeypatch.setattr(
        node_copies.Store,
        "read",
        lambda self, name: sizes.append(1) or read(self, name),  # type: ignore[func-returns-value]
    )
    copies = [local_file(open_folder(s3_url) / "state.pt") for _ in range(4)]
    assert len(set(copies)) == 1
    assert len(sizes) == 1
    write_file(open_folder(s3_url) / "state.pt", b"y" * 3_000_000)
    assert local_file(open_folder(s3_url) / "state.pt").read_bytes() == b"y" * 3_000_000
    with pytest.raises(FileNotFoundError):
        local_file(open_folder(s3_url) / "other.pt")


def test_a_server_that_does_not_answer_is_an_error_after_the_time(s3_proxy: FaultyProxy, s3_url: str) -> None:
    s3_proxy.faults = lambda request: Fault("busy")
    with pytest.raises(RemoteError, match=r"state.pt: no answer for .* check the server and the network$"):
        write_file(with_retry_seconds(open_folder(s3_url), 0.5) / "state.pt", b"content")
