"""Define the types of settings that name files, and make such settings absolute.

`Path` is a file or folder of this machine. `Location` is a folder of shards or its URL; it stays text, because a Path
would turn s3://a into s3:/a. `TrackingUri` is MLflow's. detrs has `PathOrUrl` for weights.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeAlias, get_args, get_origin
from urllib.parse import unquote, urlsplit

from pydantic import AfterValidator

from detrs.backbone import PathOrUrl

REMOTE = ("s3", "gs", "http", "https")
SQLITE = "sqlite:///"

MakeAbsolute: TypeAlias = Callable[
    [str, Path], str
]  # (value, base folder) -> the same from any working directory


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


def sqlite_file(uri: str) -> Path | None:
    """Return the database file of a `sqlite:///` URI; None for other URIs."""
    return Path(uri.removeprefix(SQLITE)) if uri.startswith(SQLITE) else None


def absolute_tracking_uri(uri: str, base: Path) -> str:
    """Resolve the file of a `sqlite:///` URI against `base`; other URIs stay."""
    file = sqlite_file(uri)
    return f"{SQLITE}{base / file.expanduser()}" if file else uri


Location = Annotated[str, AfterValidator(check_location), absolute]  # a folder, or a URL of one
TrackingUri = Annotated[str, absolute_tracking_uri]

_PATH_OR_URL, _URI = get_args(PathOrUrl)[1], absolute_tracking_uri


def path_rule(annotation: Any) -> MakeAbsolute | None:
    """Return how a setting with this type is made absolute; None if it does not name a file.

    The marks are the metadata of `Annotated` types; a union such as `Path | None` has the rule of its part.
    """
    marks = [annotation] if annotation is Path else list(getattr(annotation, "__metadata__", ()))
    for mark, rule in ((Path, absolute), (absolute, absolute), (_PATH_OR_URL, absolute), (_URI, _URI)):
        if mark in marks:
            return rule
    if get_origin(annotation) is Annotated:
        return None
    rules = [path_rule(part) for part in get_args(annotation)]
    return next((rule for rule in rules if rule is not None), None)


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
