"""What a job uploads."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
from ray._private.ray_constants import DASHBOARD_CLIENT_MAX_SIZE, get_runtime_env_default_excludes
from ray._private.runtime_env.packaging import create_package

from raydetr.config import ConfigError
from raydetr.submission.upload import UploadError, find_upload


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "checkout"
    for name, size in {
        "jobs/train_detector.py": 10,
        "weights/large.pth": 5000,
        "weights/small.pth": 1000,
        "notes.txt": 20,
        "runs/a/state.pt": 9000,
        "docs/page.md": 30,
        "docs/build/page.html": 40,
        ".git/objects/pack": 50,
        ".venv/bin/python": 60,
        "space name.yaml": 70,
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x" * size)
    (root / ".gitignore").write_text("/runs/\n")
    (root / "docs/.gitignore").write_text("build/\n")
    (root / ".rayignore").write_text("notes.txt\n")
    return root


def test_the_files_are_those_of_the_package_that_ray_makes(folder: Path, tmp_path: Path) -> None:
    package = tmp_path / "package.zip"
    create_package(str(folder), package, include_gitignore=True, excludes=get_runtime_env_default_excludes())
    with zipfile.ZipFile(package) as packed:
        sizes = {Path(entry.filename): entry.file_size for entry in packed.infolist() if not entry.is_dir()}
    found = find_upload(folder).sizes
    assert found == sizes
    assert Path("weights/large.pth") in found
    excluded = {
        "notes.txt",
        "runs/a/state.pt",
        "docs/build/page.html",
        ".git/objects/pack",
        ".venv/bin/python",
    }
    assert not excluded & {str(path) for path in found}


def test_an_upload_over_the_limit_names_the_largest_files_and_folders(folder: Path) -> None:
    assert DASHBOARD_CLIENT_MAX_SIZE == 100 * 2**20
    with (folder / "weights/huge.pth").open("wb") as file:
        file.truncate(101 * 2**20)
    with pytest.raises(
        UploadError, match=r"101\.0 MiB would be uploaded, and Ray accepts 100\.0 MiB"
    ) as refused:
        find_upload(folder).check_size()
    lines = [line.split(maxsplit=2) for line in str(refused.value).splitlines() if line.startswith("  ")]
    assert lines[0] == ["101.0", "MiB", "weights/huge.pth"]
    assert ["101.0", "MiB", "weights/"] in lines
    assert ".rayignore" in str(refused.value)
    (folder / ".rayignore").write_text("huge.pth\n")
    find_upload(folder).check_size()


def test_a_file_that_is_not_uploaded_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    upload = find_upload(folder)
    monkeypatch.chdir(folder)
    assert upload.check_contains(Path("space name.yaml")) == Path("space name.yaml")
    assert upload.check_contains(folder / "docs/page.md") == Path("docs/page.md")
    assert upload.check_contains(Path("weights/../docs/./page.md")) == Path("docs/page.md")
    for file in (Path("notes.txt"), folder / "runs/a/state.pt", folder.parent / "other.yaml"):
        with pytest.raises(ConfigError, match=f"{file.name}: is not in the upload of"):
            upload.check_contains(file)
