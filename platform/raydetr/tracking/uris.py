"""Find the tracking URI of a run; store it without its password, and relative to the run."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from raydetr.locations import is_remote, local_folder, sqlite_file, sqlite_uri
from raydetr.store.folders import Folder

if TYPE_CHECKING:
    from raydetr.config import RunConfig  # imports torch, which the process that uploads does not need

HIDDEN = "***"
# By whether the URI is that of a server: in the URI of a database, a password may contain slashes
_USER_AND_PASSWORD = {True: r"(://[^/@:]*:)([^/@]*)(@)", False: r"(://[^/@:]*:)([^@]*)(@)"}
# As in ?user=me&password=...; drivers of databases also have sslpassword, passwd and pwd
_IN_QUERY = r"(?i)([?&]\w*(?:password|passwd|pwd)=)([^&#]+)()"


class TrackingError(RuntimeError):
    """MLflow could not be reached, or refused a request; the message names the URI."""


def default_uri(storage_path: str | Path) -> str:
    """Return the URI of the SQLite database in the folder of the runs, or in `runs` if they are at a URL."""
    folder = Path("runs") if is_remote(str(storage_path)) else local_folder(storage_path)
    return sqlite_uri(folder.absolute() / "mlflow.db")


def tracking_uri(config: RunConfig) -> str:
    """Return the tracking URI of a run with this (resolved) configuration."""
    return config.tracking.uri or default_uri(config.storage.path)


def mask_password(uri: str) -> str:
    """Return the URI with *** in place of its password."""
    for pattern in _patterns(uri):
        uri = re.sub(pattern, rf"\1{HIDDEN}\3", uri)
    return uri


def hide_password(text: str, uri: str) -> str:
    """Return a message, such as the error of a library, with *** in place of the passwords of a URI that is in it."""
    for pattern in _patterns(uri):
        for before, password, after in re.findall(pattern, uri):
            text = text.replace(f"{before[-1]}{password}{after}", f"{before[-1]}{HIDDEN}{after}")
    return text


def _patterns(uri: str) -> tuple[str, str]:
    """Return the patterns of passwords in a URI: what is before, the password, and what is after it."""
    return _USER_AND_PASSWORD[uri.startswith(("http://", "https://"))], _IN_QUERY


def storable_uri(uri: str, run: Folder) -> str:
    """Return the URI as it is stored in the folder of a run: without a password; the path of a SQLite database that
    is near the run is relative to the run, so that both can be moved together.
    """
    file = sqlite_file(uri)
    if file is not None and isinstance(run, Path):
        for above in (run, run.parent, run.parent.parent):
            if file.is_relative_to(above):
                return sqlite_uri(Path(os.path.relpath(file, run)))
    return mask_password(uri)


def absolute_uri(stored: str, run: Folder) -> str:
    """Return the URI that was stored in the folder of a run, with the absolute path of a database."""
    file = sqlite_file(stored)
    if file is not None and not file.is_absolute() and isinstance(run, Path):
        return sqlite_uri(Path(os.path.normpath(run / file)))
    return stored


def restore_uri(stored: str, run: Folder) -> str:
    """Return the URI that was stored in the folder of a run.

    A password is taken from `MLFLOW_TRACKING_URI`, if that is the same URI, or left to MLflow, which has its own
    variables for those of servers.

    Raises:
        TrackingError: the password of a database is not known.
    """
    if f":{HIDDEN}@" not in stored and f"={HIDDEN}" not in stored:
        return absolute_uri(stored, run)
    given = os.environ.get("MLFLOW_TRACKING_URI", "")
    if mask_password(given) == stored:
        return given
    without_user = re.sub(r"://[^/@]*@", "://", stored)
    if stored.startswith(("http://", "https://")) and HIDDEN not in without_user:
        return without_user  # MLflow reads MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD
    raise TrackingError(
        f"the password of {stored} is not stored: set MLFLOW_TRACKING_URI to the complete URI"
    )
