"""Name a data set on disk: its validated records, and where the encoded images lie."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from raydetr.shards.coco import CocoDataset, load_coco
from raydetr.user_files import open_file


@dataclass(frozen=True)
class ImageFile:
    """Where an encoded image lies: in a file of its own, or in a tar."""

    path: Path
    offset: int = 0  # bytes
    size: int = -1  # bytes; -1: up to the end of the file
    key: str = ""  # of the sample in the tar

    def __str__(self) -> str:
        return f"{self.path}: sample {self.key}" if self.key else str(self.path)

    def read(self) -> bytes:
        """Read the image.

        Raises:
            OSError: it cannot be read, or is no regular file.
        """
        with open_file(self.path) as file:
            file.seek(self.offset)
            return file.read(self.size)

    def state(self) -> str:
        """Return a text that changes with the file's size and modification time."""
        try:
            found = self.path.stat()
        except (OSError, ValueError):
            return "missing"  # reported when it is read
        return f"{found.st_size} {found.st_mtime_ns} {self.offset} {self.size}"


@dataclass(frozen=True)
class Source:
    """A validated data set on disk."""

    dataset: CocoDataset
    files: list[ImageFile]  # of `dataset.images`
    name: str  # name of the annotation source, for the manifest


def coco_source(images: Path, annotations: Path) -> Source:
    """Read a COCO data set from the folder of its images and an instances JSON, in whose order the images are.

    Raises:
        ValueError: the folder is missing, or the annotations are invalid.
    """
    if not images.is_dir():
        raise ValueError(f"{images}: there is no such folder of images")
    dataset = load_coco(annotations)
    files = [ImageFile(images / image["file_name"]) for image in dataset.images]
    return Source(dataset, files, annotations.name)
