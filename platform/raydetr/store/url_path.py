"""Name a file or folder at a URL, with those methods of `pathlib.Path` that runs and checkpoints use."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import PurePosixPath
from urllib.parse import urlsplit

from raydetr.locations import check_location
from raydetr.store.remote_config import RemoteConfig
from raydetr.store.store import Store

MIN_TIMEOUT = 5.0  # seconds without an answer, which a busy server may need


class UrlPath:
    """A file or folder on S3, Google's or Azure's storage, or a web server. Immutable; not for use after a fork.

    Endpoint, region and credentials come from the environment (docs/data/remote.md). Writing replaces a file at once:
    readers see all of it or nothing. Folders exist as long as they have files; a web server does not list them. Errors
    of the server are those of `Store`: FileNotFoundError and RemoteError, which are OSErrors.
    """

    def __init__(self, store: Store, key: str) -> None:
        self.store, self._key = store, PurePosixPath(key)

    @classmethod
    def parse(cls, url: str) -> UrlPath:
        """Return the path of a URL such as s3://bucket/folder.

        Raises:
            ValueError: the URL is of an unknown kind, or has a query.
        """
        check_location(url)
        parts = urlsplit(url)
        store = Store(f"{parts.scheme}://{parts.netloc}", RemoteConfig(), files_change=True)
        return cls(store, parts.path.strip("/"))

    def with_retry_seconds(self, seconds: float) -> UrlPath:
        """Return the same path, whose calls raise after an outage of this length, also if a server does not answer."""
        default = RemoteConfig()
        config = RemoteConfig(
            retry_seconds=seconds,
            connect_timeout=min(seconds, default.connect_timeout),
            read_timeout=min(max(seconds, MIN_TIMEOUT), default.read_timeout),
        )
        return UrlPath(Store(self.store.location, config, files_change=True), self.key)

    @property
    def key(self) -> str:
        """Path of the file or folder in `store`."""
        return str(self._key)

    @property
    def name(self) -> str:
        """The last part."""
        return self._key.name

    @property
    def stem(self) -> str:
        """The last part without its suffix."""
        return self._key.stem

    @property
    def parent(self) -> UrlPath:
        """The folder that this file or folder is in."""
        return UrlPath(self.store, str(self._key.parent))

    def __truediv__(self, name: str) -> UrlPath:
        return UrlPath(self.store, str(self._key / name))

    def exists(self) -> bool:
        """Return whether there is a file that is not empty, or a folder with files."""
        try:
            self.store.info(self.key)
        except FileNotFoundError:
            return not self.store.location.startswith("http") and bool(self.store.list(self.key))
        return True

    def read_bytes(self) -> bytes:
        """Read a file."""
        return self.store.read(self.key)

    def read_text(self) -> str:
        """Read a file of UTF-8 text."""
        return self.read_bytes().decode()

    def write_bytes(self, content: bytes | memoryview) -> None:
        """Write a file, or replace it."""
        self.store.write(self.key, content)

    def unlink(self, *, missing_ok: bool = False) -> None:
        """Delete a file.

        Raises:
            FileNotFoundError: there is none, without `missing_ok`.
        """
        if not missing_ok:
            self.store.info(self.key)
        self.store.delete(self.key)

    def mkdir(self, *, parents: bool = False, exist_ok: bool = False) -> None:
        """Do nothing: a folder is there with its first file."""

    def iterdir(self) -> Iterator[UrlPath]:
        """Yield the files and folders in this folder."""
        return (self / name for name in self.store.names(self.key))

    def glob(self, pattern: str) -> Iterator[UrlPath]:
        """Yield the files below this folder whose relative paths match; `*` stands for a part of one name."""
        wanted = pattern.split("/")
        for key in self.store.list(self.key):
            names = key.split("/")
            if len(names) == len(wanted) and all(map(fnmatch, names, wanted)):
                yield self / key

    def __str__(self) -> str:
        return self.store.name(self.key if self._key.parts else "")

    def __repr__(self) -> str:
        return f"UrlPath({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, UrlPath) and str(self) == str(other)

    def __lt__(self, other: UrlPath) -> bool:
        return str(self) < str(other)

    def __hash__(self) -> int:
        return hash(str(self))
