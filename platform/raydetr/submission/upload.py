"""Determine what a job uploads, with the rules that Ray applies: .gitignore, .rayignore and its own exclusions."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ray._private.ray_constants import DASHBOARD_CLIENT_MAX_SIZE, get_runtime_env_default_excludes
from ray._private.runtime_env.packaging import _dir_travel, _get_excludes

from raydetr.config import ConfigError

CHECKOUT = Path("jobs/train_detector.py")  # a working directory with this file is a checkout
NUM_NAMED = 5  # files, and folders, in an error


class UploadError(ValueError):
    """The working directory cannot be uploaded; the message names the files, and the remedy."""


@dataclass(frozen=True)
class Upload:
    """The files of a folder that are uploaded, with their sizes in bytes."""

    folder: Path
    sizes: dict[Path, int]  # by path relative to the folder

    def check_size(self, limit: int = DASHBOARD_CLIENT_MAX_SIZE) -> None:
        """Check that the cluster accepts the upload.

        Raises:
            UploadError: it is too large; the message names the largest files and folders.
        """
        total = sum(self.sizes.values())  # Ray does not compress
        if total < limit:
            return
        folders: dict[Path, int] = {}
        for path, size in self.sizes.items():
            for parent in path.parents[:-1]:
                folders[parent] = folders.get(parent, 0) + size
        named = _largest(self.sizes, "") + _largest(folders, "/")
        raise UploadError(
            f"{self.folder}: {_megabytes(total)} would be uploaded, and Ray accepts {_megabytes(limit)}. The largest "
            f"files and folders:{''.join(named)}\nName what the job does not need in {self.folder / '.rayignore'}, "
            "which is written as a .gitignore; put data on storage that the cluster mounts, or in a bucket"
        )

    def check_contains(self, file: Path) -> Path:
        """Return the path of a file relative to the folder.

        Raises:
            ConfigError: it is not uploaded.
        """
        relative = Path(os.path.normpath(file.expanduser().absolute()))
        if relative.is_relative_to(self.folder):
            relative = relative.relative_to(self.folder)
        if relative not in self.sizes:
            raise ConfigError(
                f"{file}: is not in the upload of {self.folder}: move it there, to a place that neither .gitignore nor "
                ".rayignore excludes"
            )
        return relative


def find_upload(folder: Path) -> Upload:
    """Find the files that Ray uploads of a working directory."""
    folder = folder.absolute()
    sizes: dict[Path, int] = {}

    def add(path: Path) -> None:
        if path.is_file():
            sizes[path.relative_to(folder)] = path.stat().st_size

    excluded = _get_excludes(folder, get_runtime_env_default_excludes())
    _dir_travel(folder, [excluded], add, include_gitignore=True)
    return Upload(folder, sizes)


def _largest(sizes: dict[Path, int], end: str) -> list[str]:
    ordered = sorted(sizes.items(), key=lambda pair: -pair[1])[:NUM_NAMED]
    return [f"\n  {_megabytes(size):>10}  {path}{end}" for path, size in ordered]


def _megabytes(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
