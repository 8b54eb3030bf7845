"""Interrupted writers: what they leave, and how the next run resumes."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from PIL import Image

from made_coco import folder_bytes, write_json
from raydetr.shards.reader import Shards, open_shards
from raydetr.shards.source import coco_source
from raydetr.shards.verify import check_shards
from raydetr.shards.writer import write_source
from raydetr.store.output_folder import publish, resumable_folder

LIMITED = """
import resource, signal, sys
from pathlib import Path
from raydetr.shards.source import coco_source
from raydetr.shards.writer import write_source
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
source, out = coco_source(*map(Path, sys.argv[1:3])), Path(sys.argv[3])
write_source(source, out, samples_per_shard=int(sys.argv[4]))
"""

STOPPED = """
import os, psutil, signal, sys
from pathlib import Path
from raydetr.shards.source import coco_source
from raydetr.shards.writer import write_source
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background of a shell ignores it
def progress(done, total):
    if done >= 40:
        print(*(process.pid for process in psutil.Process().children(recursive=True)), flush=True)
        os.kill(os.getpid(), getattr(signal, sys.argv[4]))
if __name__ == "__main__":
    source, out = coco_source(*map(Path, sys.argv[1:3])), Path(sys.argv[3])
    write_source(source, out, samples_per_shard=15, workers=int(sys.argv[5]), progress=progress)
"""


def run_python(folder: Path, code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    script = folder / "script.py"  # a file, because the processes of a pool import the main module
    script.write_text(code)
    return subprocess.run(
        [sys.executable, script, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )


def write_again(coco: tuple[Path, Path], out: Path) -> list[str]:
    """Write with the parameters of the fixture `shards`; return the messages about the earlier run."""
    messages: list[str] = []
    write_source(coco_source(*coco), out, samples_per_shard=15, notify=messages.append)
    return messages


@pytest.mark.parametrize(("kind", "workers"), [("SIGKILL", 1), ("SIGKILL", 2), ("SIGINT", 2)])
def test_interrupted_writer_leaves_nothing_that_looks_complete_and_is_resumed(
    coco: tuple[Path, Path], shards: Shards, tmp_path: Path, kind: str, workers: int
) -> None:
    out = tmp_path / "out"
    run = run_python(tmp_path, STOPPED, *coco, out, kind, workers)
    assert run.returncode == -getattr(signal, kind), run.stderr
    assert [path.name for path in out.iterdir()] == [".partial"]
    with pytest.raises(ValueError, match="did not finish: run that command again"):
        open_shards(out)
    children = [int(word) for word in run.stdout.split()]
    assert len(children) >= 3 or workers == 1  # two workers, and the server that they were forked from
    wait_for_the_end_of(children)
    # A tar whose record is missing was killed just before it was finished
    finished = [record.with_suffix("") for record in (out / ".partial").glob("*.tar.json")]
    kept = {path: path.stat().st_ino for path in finished}
    assert kept
    messages = write_again(coco, out)
    assert messages == [f"an earlier run did not finish: {len(kept)} of its finished shards were reused"]
    assert all((out / path.name).stat().st_ino == inode for path, inode in kept.items())
    assert folder_bytes(out) == folder_bytes(shards.path)


def wait_for_the_end_of(children: list[int]) -> None:
    for _ in range(200):
        alive = [pid for pid in children if is_running(pid)]
        if not alive:
            return
        time.sleep(0.05)
    raise AssertionError(f"still running: {alive}")


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def interrupted_run(coco: tuple[Path, Path], tmp_path: Path) -> Path:
    """Return a folder in which two of four shards are finished."""

    class Stop(Exception):
        pass

    def progress(done: int, total: int) -> None:
        if done == 40:
            raise Stop

    with pytest.raises(Stop):
        write_source(coco_source(*coco), tmp_path / "out", samples_per_shard=15, progress=progress)
    assert len(list((tmp_path / "out" / ".partial").glob("*.tar"))) == 2
    return tmp_path / "out"


@pytest.mark.parametrize("repair", ["restore", "skip"])
def test_corrupt_images_cost_only_their_shards(
    coco: tuple[Path, Path], shards: Shards, tmp_path: Path, repair: str
) -> None:
    """All corrupt images are listed, finished shards stay, and the run goes on after the repair."""
    images = tmp_path / "images"
    shutil.copytree(coco[0], images)
    names = [record["file_name"] for record in json.loads(coco[1].read_text())["images"]]
    bad = [names[16], names[17], names[50]]
    for name in bad:
        (images / name).write_bytes((coco[0] / name).read_bytes()[:-60])
    source, out = coco_source(images, coco[1]), tmp_path / "out"
    with pytest.raises(ValueError, match=r"3 invalid images\n") as caught:
        write_source(source, out, samples_per_shard=15)
    lines = str(caught.value).splitlines()
    assert [line.partition(" (image id")[0].strip() for line in lines[1:-1]] == [
        f"{images}/{name}" for name in bad
    ]
    assert "the other 2 shards are finished and stay in" in lines[-1]
    assert "--on-corrupt skip" in lines[-1]
    kept = {path: path.stat().st_ino for path in (out / ".partial").glob("*.tar")}
    assert len(kept) == 2
    messages: list[str] = []
    if repair == "restore":
        for name in bad:
            shutil.copy2(coco[0] / name, images / name)
        write_source(source, out, samples_per_shard=15, notify=messages.append)
        assert folder_bytes(out) == folder_bytes(shards.path)
    else:
        manifest = write_source(source, out, samples_per_shard=15, on_corrupt="skip", notify=messages.append)
        assert [shard.num_samples for shard in manifest.shards] == [15, 13, 15, 7]
        assert (
            "3 images are missing or corrupt and were skipped: skipped_images.txt lists them"
            in manifest.notices
        )
        listed = (out / "skipped_images.txt").read_text().splitlines()
        assert [line.partition(" (image id")[0] for line in listed] == [f"{images}/{name}" for name in bad]
        assert all("cannot be decoded" in line for line in listed)
        left = [name for name in names if name not in bad]
        assert [image["file_name"] for image in open_shards(out).coco()["images"]] == left
        check_shards(out)
    assert messages == ["an earlier run did not finish: 2 of its finished shards were reused"]
    assert all((out / path.name).stat().st_ino == inode for path, inode in kept.items())


def test_shards_without_any_valid_image_are_omitted(coco: tuple[Path, Path], tmp_path: Path) -> None:
    images = tmp_path / "images"
    shutil.copytree(coco[0], images)
    names = [record["file_name"] for record in json.loads(coco[1].read_text())["images"]]
    for name in names[15:30]:
        (images / name).unlink()
    source = coco_source(images, coco[1])
    write_source(source, tmp_path / "out", samples_per_shard=15, on_corrupt="skip")
    shards = open_shards(tmp_path / "out")
    assert [image["file_name"] for image in shards.coco()["images"]] == names[:15] + names[30:]
    check_shards(tmp_path / "out")
    for name in names:
        (images / name).unlink(missing_ok=True)
    with pytest.raises(ValueError, match=r"every image is corrupt, such as .*cannot be read"):
        write_source(source, tmp_path / "none", samples_per_shard=15, on_corrupt="skip")
    assert not (tmp_path / "none").exists()


def test_shards_of_other_annotations_are_discarded(
    coco: tuple[Path, Path], shards: Shards, tmp_path: Path
) -> None:
    data = json.loads(coco[1].read_text())
    data["images"][2]["note"] = "another record"
    out = interrupted_run((coco[0], write_json(tmp_path / "other.json", data)), tmp_path)
    assert write_again(coco, out) == [
        "an earlier run did not finish: 1 of its finished shards were reused, "
        "1 (corrupt, or with other input) were discarded"
    ]
    assert folder_bytes(out) == folder_bytes(shards.path)


def test_shards_of_other_images_are_discarded(coco: tuple[Path, Path], tmp_path: Path) -> None:
    images = tmp_path / "images"
    shutil.copytree(coco[0], images)
    out = interrupted_run((images, coco[1]), tmp_path)
    first = images / json.loads(coco[1].read_text())["images"][0]["file_name"]
    content = first.read_bytes()
    first.write_bytes(content + b"\0")
    assert "1 of its finished shards were reused, 1 (" in write_again((images, coco[1]), out)[0]
    assert open_shards(out).read(0).image == content + b"\0"


def test_other_parameters_discard_all(coco: tuple[Path, Path], tmp_path: Path) -> None:
    out = interrupted_run(coco, tmp_path)
    write_source(coco_source(*coco), out, samples_per_shard=20)
    assert sorted(path.name for path in out.iterdir()) == [
        "index.npz", "manifest.json", "shard-00000.tar", "shard-00001.tar", "shard-00002.tar"
    ]  # fmt: skip
    write_source(coco_source(*coco), tmp_path / "fresh", samples_per_shard=20)
    assert folder_bytes(out) == folder_bytes(tmp_path / "fresh")


@pytest.mark.parametrize("name", ["shard-00001.tar", "shard-00001.tar.json"])
def test_corrupt_leftovers_are_rewritten(
    coco: tuple[Path, Path], shards: Shards, tmp_path: Path, name: str
) -> None:
    out = interrupted_run(coco, tmp_path)
    path = out / ".partial" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    assert "1 of its finished shards were reused, 1 (" in write_again(coco, out)[0]
    assert folder_bytes(out) == folder_bytes(shards.path)


def test_resumed_run_repeats_the_notices_about_images_in_finished_shards(
    coco: tuple[Path, Path], tmp_path: Path
) -> None:
    images = tmp_path / "images"
    shutil.copytree(coco[0], images)
    for number, record in enumerate(json.loads(coco[1].read_text())["images"][:2]):
        size = (record["width"], record["height"])
        if number == 0:  # 12 of 16 bits
            Image.new("I;16", size, 3000).save(images / record["file_name"], "PNG")
        else:
            exif = Image.Exif()
            exif[0x0112] = 6
            Image.new("RGB", size).save(images / record["file_name"], "JPEG", exif=exif)
    write_source(coco_source(images, coco[1]), tmp_path / "fresh", samples_per_shard=15)
    notices = " ".join(open_shards(tmp_path / "fresh").manifest.notices)
    assert "1 images have 16 bits per pixel and use at most 12 of them" in notices
    assert "1 images have an EXIF orientation" in notices
    out = interrupted_run((images, coco[1]), tmp_path)
    assert "2 of its finished shards were reused" in write_again((images, coco[1]), out)[0]
    assert folder_bytes(out) == folder_bytes(tmp_path / "fresh")


def test_records_of_another_version_are_discarded(
    coco: tuple[Path, Path], shards: Shards, tmp_path: Path
) -> None:
    out = interrupted_run(coco, tmp_path)
    record = out / ".partial" / "shard-00001.tar.json"
    state = json.loads(record.read_text())
    record.write_text(json.dumps({"input": state["input"], "shard": state["shard"], **state["counts"]}))
    assert "1 of its finished shards were reused, 1 (" in write_again(coco, out)[0]
    assert folder_bytes(out) == folder_bytes(shards.path)


@pytest.mark.parametrize("num_renamed", range(6))
def test_stop_while_renaming_into_place(
    coco: tuple[Path, Path], shards: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_renamed: int
) -> None:
    out = tmp_path / "out"
    left = num_renamed
    rename = Path.rename

    def renaming(path: Path, target: Path) -> Path:
        nonlocal left
        if target.parent == out:
            if left == 0:
                raise KeyboardInterrupt
            left -= 1
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", renaming)
        with pytest.raises(KeyboardInterrupt):
            write_source(coco_source(*coco), out, samples_per_shard=15)
    with pytest.raises(ValueError, match="did not finish: run that command again"):
        open_shards(out)
    assert write_again(coco, out) == ["an earlier run did not finish: 4 of its finished shards were reused"]
    assert folder_bytes(out) == folder_bytes(shards.path)


def test_stop_after_the_last_rename_leaves_a_complete_folder(tmp_path: Path) -> None:
    def write_and_stop() -> None:
        with resumable_folder(tmp_path / "out") as folder:
            for name in ("a", "last"):
                (folder / name).write_text(name)
            publish(folder, ["a", "last"])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_and_stop()
    with (
        pytest.raises(ValueError, match="is not empty"),
        resumable_folder(tmp_path / "out"),
    ):
        raise AssertionError
    assert folder_bytes(tmp_path / "out") == {"a": b"a", "last": b"last"}


def test_two_writers_at_once_are_an_error(coco: tuple[Path, Path], tmp_path: Path) -> None:
    with resumable_folder(tmp_path / "out") as folder:
        with pytest.raises(ValueError, match="out: another process is writing there: wait for it, or name"):
            write_source(coco_source(*coco), tmp_path / "out")
        assert folder.is_dir()


def test_failed_write_can_be_resumed(coco: tuple[Path, Path], shards: Shards, tmp_path: Path) -> None:
    """A file size limit stands in for a full disk, which needs its own mount (below)."""
    run = run_python(tmp_path, LIMITED, *coco, tmp_path / "out", 53)
    assert run.returncode == 1
    assert f"{tmp_path}/out: writing stopped (File too large); free space" in run.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".partial"]
    assert write_again(coco, tmp_path / "out") == []  # no shard was finished
    assert folder_bytes(tmp_path / "out") == folder_bytes(shards.path)


@pytest.mark.parametrize("workers", [1, 2])
def test_full_disk(coco: tuple[Path, Path], shards: Shards, tmp_path: Path, workers: int) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", "size=150k", "tmpfs", str(tmp_path)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here (needs root)")
    out = tmp_path / "out"
    try:
        with pytest.raises(
            OSError,
            match=r"writing stopped .*No space left on device.*; free space.*resumes where it stopped",
        ) as caught:
            write_source(coco_source(*coco), out, samples_per_shard=15, workers=workers)
        assert caught.value.errno == errno.ENOSPC
        assert [path.name for path in out.iterdir()] == [".partial"]
        subprocess.run(["mount", "-o", "remount,size=10m", str(tmp_path)], check=True)
        assert "finished shards were reused" in write_again(coco, out)[0]
        assert folder_bytes(out) == folder_bytes(shards.path)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_killed_worker_process_is_reported(coco: tuple[Path, Path], tmp_path: Path) -> None:
    def progress(done: int, total: int) -> None:
        for process in multiprocessing.active_children():
            process.kill()

    with pytest.raises(RuntimeError, match=r"a worker process died .*run again, with fewer --workers"):
        write_source(coco_source(*coco), tmp_path / "out", samples_per_shard=5, workers=2, progress=progress)
    write_source(coco_source(*coco), tmp_path / "out", samples_per_shard=5)
    assert open_shards(tmp_path / "out").num_samples == 53
