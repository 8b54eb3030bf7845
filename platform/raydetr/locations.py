"""Define the types of settings that name files, and make their values absolute.

`Path` is a file or folder of this machine. `Location` is a folder of shards or its URL; it stays text, because a Path
would turn s3://a into s3:/a. `TrackingUri` is MLflow's. detrs has `PathOrUrl` for weights.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeAlias
from urllib.parse import unquote, urlsplit

from pydantic import AfterValidator

REMOTE = ("s3", "gs", "az", "http", "https")
SQLITE = "sqlite:///"

# Function of (value, base folder) that returns the absolute value
MakeAbsolute: TypeAlias = Callable[[str, Path], str]


def check_location(location: str) -> str:
    """Return the location without a slash at its end.

    Raises:
        ValueError: it is empty, has an unknown scheme, or is a URL that cannot be one of a folder.
    """
    if not location.strip():
        raise ValueError("the location is empty: give a folder, or a URL such as s3://bucket/shards/train")
    scheme = scheme_of(location)
    if scheme is None:
        malformed = re.match(r"(file|s3|gs|az|https?):/*", location, re.IGNORECASE)
        if malformed:
            raise ValueError(
                f"{location}: is not a URL: write {malformed[1].lower()}://{location[malformed.end() :]}"
            )
        return location
    if scheme not in (*REMOTE, "file"):
        known = ", ".join(f"{name}://" for name in (*REMOTE, "file"))
        raise ValueError(f"{location}: {scheme}:// is not supported; known are folders and {known}")
    _check_url(location, scheme)
    return location.rstrip("/") if scheme != "file" else location


def is_remote(location: str) -> bool:
    """Return True for a URL that is not a file of this machine."""
    return scheme_of(location) in REMOTE


def local_folder(location: str | Path) -> Path:
    """Return the folder of a local location."""
    location = str(location)
    assert not is_remote(location), location
    return Path(unquote(urlsplit(location).path)) if scheme_of(location) == "file" else Path(location)


def absolute(location: str, base: Path) -> str:
    """Resolve a folder against `base`; keep a URL."""
    return location if is_remote(location) else str(base / local_folder(location).expanduser())


def base_folder() -> Path:
    """Return the folder at which relative paths start: in a Ray job not the working directory, which is a copy that
    is deleted afterwards.
    """
    return Path.home() / "raydetr" if in_ray_job() else Path.cwd()


def in_ray_job() -> bool:
    """Return whether this process is the driver of a submitted Ray job."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def sqlite_file(uri: str) -> Path | None:
    """Return the database file of a `sqlite:///` URI; None for other URIs."""
    return Path(unquote(uri.removeprefix(SQLITE).partition("?")[0])) if uri.startswith(SQLITE) else None


def sqlite_uri(file: Path) -> str:
    """Return the URI of a database file. MLflow's libraries decode %, and take ? for the beginning of options."""
    return SQLITE + str(file).replace("%", "%25").replace("?", "%3F")


def absolute_file(path: str, base: Path) -> str:
    """Resolve a file or folder of this machine against `base`.

    Raises:
        ValueError: it is a URL.
    """
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", path):  # a Path has only one of the slashes
        raise ValueError(f"{path}: is a URL; this must be a file or folder on storage that all nodes mount")
    return str(base / Path(path).expanduser())


def check_tracking_uri(uri: str) -> str:
    """Return the URI.

    Raises:
        ValueError: it is one of a database without the name of its file, or of a server without its name.
    """
    if uri.startswith("sqlite:") and (
        not uri.startswith(SQLITE) or sqlite_file(uri) in (Path(), Path(":memory:"))
    ):
        raise ValueError(
            f"{uri}: write sqlite:///FILE, with three slashes for a relative path and four for an absolute one"
        )
    if uri.startswith(("http:", "https:")):
        parts = urlsplit(uri)
        try:
            is_valid = bool(parts.hostname) and (parts.port is None or parts.port > 0)
        except ValueError:  # of the port
            is_valid = False
        if not is_valid:
            shown = re.sub("://.*@", "://", uri)  # without a password
            raise ValueError(f"{shown}: write http://HOST:PORT")
    return uri


def absolute_tracking_uri(uri: str, base: Path) -> str:
    """Resolve a `sqlite:///` URI or the path of a folder against `base`; keep other URIs."""
    file = sqlite_file(uri)
    if file:
        _, mark, options = uri.partition("?")
        return sqlite_uri(base / file.expanduser()) + mark + options
    is_folder = scheme_of(uri) is None and not uri.startswith("databricks")
    return str(base / Path(uri.removeprefix("file:")).expanduser()) if is_folder else uri


Location = Annotated[str, AfterValidator(check_location), absolute]  # a folder, or a URL of one
TrackingUri = Annotated[str, AfterValidator(check_tracking_uri), absolute_tracking_uri]


def scheme_of(location: str) -> str | None:
    """Return the part before `://` in lower case; None for a path."""
    found = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", location)
    return found[1].lower() if found else None


def _check_url(location: str, scheme: str) -> None:
    parts = urlsplit(location)
    if scheme == "file":
        if parts.netloc not in ("", "localhost") or not parts.path:
            raise ValueError(f"{location}: a file URL has three slashes: file:///folder")
        return
    if not parts.netloc:
        raise ValueError(f"{location}: has no bucket or server: write {scheme}://NAME/FOLDER")
    if parts.username is not None or parts.query or parts.fragment:
        # Settings are logged, so no credentials; names of shards are appended, so no query
        raise ValueError(f"{scheme}://{parts.hostname}{parts.path}: a URL without user, '?' and '#' is needed: "
                         "credentials come from the environment (docs/data/remote.md)")  # fmt: skip
