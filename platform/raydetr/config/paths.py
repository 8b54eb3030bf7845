"""Where shards lie: a folder, or a URL of one. A location stays text, because a path would make s3:/a of s3://a."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

REMOTE = ("s3", "gs", "http", "https")


def check_location(location: str) -> str:
    """The location without a slash at its end.

    Raises:
        ValueError: it is empty, of an unknown scheme, or a URL that cannot name a folder.
    """
    if not location.strip():
        raise ValueError("the location is empty: give a folder, or a URL such as s3://bucket/shards/train")
    scheme = scheme_of(location)
    if scheme is None:
        slip = re.match(r"(file|s3|gs|https?):/*", location, re.IGNORECASE)
        if slip:
            raise ValueError(f"{location}: is no URL: write {slip[1].lower()}://{location[slip.end() :]}")
        return location
    if scheme not in (*REMOTE, "file"):
        known = ", ".join(f"{name}://" for name in (*REMOTE, "file"))
        raise ValueError(f"{location}: shards are not read from {scheme}://; known are folders and {known}")
    _check_url(location, scheme)
    return location.rstrip("/") if scheme != "file" else location


def is_remote(location: str) -> bool:
    """Whether it is not of this machine's file systems."""
    return scheme_of(location) in REMOTE


def local_folder(location: str | Path) -> Path:
    """The folder that a local location names."""
    location = str(location)
    assert not is_remote(location), location
    return Path(unquote(urlsplit(location).path)) if scheme_of(location) == "file" else Path(location)


def absolute(location: str, base: Path) -> str:
    """The same location from any working directory: a folder is taken from `base`, a URL stays."""
    return location if is_remote(location) else str(base / local_folder(location).expanduser())


def scheme_of(location: str) -> str | None:
    """The part before `://`, or None of a path."""
    found = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", location)
    return found[1].lower() if found else None


def _check_url(location: str, scheme: str) -> None:
    parts = urlsplit(location)
    if scheme == "file":
        if parts.netloc not in ("", "localhost") or not parts.path:
            raise ValueError(f"{location}: a file URL has three slashes: file:///folder")
        return
    if not parts.netloc:
        raise ValueError(f"{location}: names no bucket or server: write {scheme}://NAME/FOLDER")
    if parts.username is not None or parts.query or parts.fragment:
        # settings are logged, and names of shards are appended
        raise ValueError(f"{scheme}://{parts.hostname}{parts.path}: a URL without user, '?' and '#' is needed: "
                         "credentials come from the environment (docs/data.md, Remote data)")  # fmt: skip
