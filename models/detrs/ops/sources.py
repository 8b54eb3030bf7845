"""Identify the sources of the native library, for csrc/build.py, which has no torch, and for `native`."""

from __future__ import annotations

import hashlib
from pathlib import Path

SUFFIX = ".sources"  # of the file beside a library that holds the digest of its sources
COMPILED = (".cpp", ".cu", ".h", ".cuh")  # what else is in csrc/, such as .DS_Store, is not in a library


def digest_sources(folder: Path) -> str:
    """Return a digest of the paths and contents of the sources and headers in csrc/."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix in COMPILED:
            digest.update(f"{path.relative_to(folder).as_posix()}\n".encode())
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()
