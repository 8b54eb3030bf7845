"""Read and write files at a URL of S3, Google, Azure or a web server, through obstore.

obstore performs one request; repeating it is up to `Retry`, which sees each failure at once and continues a broken
response at the byte where it ended.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import obstore
from obstore.exceptions import AlreadyExistsError
from obstore.store import HTTPStore, ObjectStore, from_url

from raydetr.locations import check_location, scheme_of
from raydetr.store.remote_config import RemoteConfig
from raydetr.store.retry import RemoteError, Retry

HTTP_HEADERS = "RAYDETR_HTTP_HEADERS"  # environment variable: {"Authorization": "Bearer ..."}
PROGRESS_BYTES = 64 * 1024  # received bytes after which the time for retries starts anew

# Options with an effect. Credentials are excluded because settings are logged.
KNOWN_OPTIONS = {
    "s3": ("endpoint", "region", "request_payer", "skip_signature", "virtual_hosted_style_request"),
    "gs": ("application_credentials", "base_url", "service_account", "skip_signature"),
    "az": ("account_name", "endpoint", "skip_signature", "use_emulator"),
    "http": ("headers",),
    "https": ("headers",),
}

T = TypeVar("T")

_used_by = 0  # pid of the process that used obstore; inherited by a fork, which cannot use it


class ForkError(RuntimeError):
    """A store was used before a fork, and again after it: the threads of obstore do not exist there."""


def uses_stores() -> bool:
    """Return True if this process has used a store, so that it must not fork a process that does."""
    return _used_by == os.getpid()


@dataclass(frozen=True)
class FileInfo:
    """Size of a file in bytes, a version that changes with its content ("" where the server names none), and when it
    was written, in seconds since 1970 (0 where the server does not say).
    """

    size: int
    version: str
    modified: float


class Store:
    """A folder at a URL. May be used by several threads, and pickled, but not used after a fork.

    Args:
        location: the URL.
        config: timeouts, retries, and options of obstore.
        files_change: files may be replaced between two calls; otherwise that is an error.

    Raises:
        ValueError: the URL is of an unknown kind, or an option is unknown or has no effect, or is a credential.
    """

    def __init__(self, location: str, config: RemoteConfig, *, files_change: bool = False) -> None:
        self.location, self.config, self._files_change = location, config, files_change
        self._scheme = scheme_of(check_location(location))
        if self._scheme not in KNOWN_OPTIONS:
            raise ValueError(
                f"{location}: is not a URL of {', '.join(f'{each}://' for each in KNOWN_OPTIONS)}"
            )
        _check_options(self._scheme, config.options)
        self._retry = Retry(config.retry_seconds, None if files_change else "data.remote.retry_seconds")
        self._versions: dict[str, str] = {}  # of the files that were read

    def __reduce__(self) -> Any:
        return partial(Store, files_change=self._files_change), (self.location, self.config)

    def name(self, file: str) -> str:
        """Return the location of a file, for messages."""
        return f"{self.location}/{file}".rstrip("/")

    def read(self, file: str, start: int = 0, stop: int | None = None, size: int | None = None) -> bytes:
        """Read a file, or its bytes from `start` to `stop`.

        Args:
            file: path of the file in this folder.
            start: offset of the first byte.
            stop: offset after the last byte; None: the end.
            size: expected size of the complete file in bytes; None skips the check.

        Raises:
            FileNotFoundError: there is no such file.
            RemoteError: it cannot be read, has another size, or has changed since this process first read from it.
        """
        content, end = bytearray(), stop
        if self._files_change:
            self._versions.pop(file, None)

        def attempt() -> bytes:
            nonlocal end
            at = start + len(content)
            if end is not None and at >= end:
                return bytes(content)
            bytes_range: Any = {"offset": at} if end is None else (at, end)
            result = obstore.get(self._store, file, options={"range": bytes_range} if at or end else {})
            self._check(file, result.meta, size)
            encoding = result.attributes.get("Content-Encoding", "identity")
            if encoding != "identity":
                raise RemoteError(f"{self.name(file)}: has Content-Encoding {encoding}: store it as it is")
            end = result.range[1]
            for part in result.stream(min_chunk_size=1):  # what arrived before a break is kept
                content.extend(part)
            return bytes(content)

        return self._call(file, attempt, lambda: len(content) // PROGRESS_BYTES)

    def info(self, file: str) -> FileInfo:
        """Return what is known of a file that is not empty, by reading a byte: web servers may refuse HEAD.

        Raises:
            FileNotFoundError, RemoteError: as `read`.
        """

        def attempt() -> FileInfo:
            meta = obstore.get(self._store, file, options={"range": (0, 1)}).meta
            return FileInfo(meta["size"], _version(meta), meta["last_modified"].timestamp())

        return self._call(file, attempt)

    def sizes(self) -> dict[str, int] | None:
        """Return names and sizes of the files directly in this folder by one listing; None: a web server has none.

        Raises:
            RemoteError: the folder cannot be listed.
        """
        if self._scheme in ("http", "https"):
            return None
        try:
            found = self._call("", lambda: obstore.list_with_delimiter(self._store))
        except FileNotFoundError as error:
            raise RemoteError(str(error)) from None
        return {meta["path"]: meta["size"] for meta in found["objects"]}

    def list(self, folder: str) -> dict[str, int]:
        """Return the paths, relative to a folder in this one, of all files below it, and their sizes.

        Raises:
            RemoteError: the folder cannot be listed; a web server has no listing.
        """
        if self._scheme in ("http", "https"):
            raise RemoteError(f"{self.name(folder)}: a web server does not list its files")
        folder = "" if folder == "." else folder

        def attempt() -> dict[str, int]:
            found = obstore.list(self._store, folder or None).collect()
            return {meta["path"].removeprefix(f"{folder}/"): meta["size"] for meta in found}

        return self._call(folder, attempt)

    def names(self, folder: str) -> tuple[str, ...]:
        """Return the names of the files and folders directly in a folder, by one listing without what is below them.

        Raises:
            RemoteError: as `list`.
        """
        if self._scheme in ("http", "https"):
            raise RemoteError(f"{self.name(folder)}: a web server does not list its files")
        folder = "" if folder == "." else folder
        found = self._call(folder, lambda: obstore.list_with_delimiter(self._store, folder or None))
        paths = [*found["common_prefixes"], *(meta["path"] for meta in found["objects"])]
        return tuple(sorted(path.rstrip("/").rpartition("/")[2] for path in paths))

    def write(self, file: str, content: bytes | memoryview) -> None:
        """Write a file, or replace it; readers see all of it or nothing."""
        self._call(file, lambda: obstore.put(self._store, file, content))
        self._versions.pop(file, None)

    def create(self, file: str, content: bytes) -> None:
        """Write a file that does not exist; of several processes, one succeeds if each writes another content.

        Raises:
            FileExistsError: there is one.
        """
        attempts = 0

        def attempt() -> None:
            nonlocal attempts
            attempts += 1
            try:
                obstore.put(self._store, file, content, mode="create")
            except AlreadyExistsError:
                # The answer to an earlier attempt may have been lost
                if attempts == 1 or bytes(obstore.get(self._store, file).bytes()) != content:
                    raise FileExistsError(f"{self.name(file)} exists") from None

        self._call(file, attempt)

    def delete(self, file: str) -> None:
        """Delete a file, if it is there."""
        with suppress(FileNotFoundError):
            self._call(file, lambda: obstore.delete(self._store, file))

    def _call(self, file: str, attempt: Callable[[], T], progress: Callable[[], int] = lambda: 0) -> T:
        global _used_by
        if _used_by not in (0, os.getpid()):
            raise ForkError(
                f"{self.name(file)}: this process was forked from one that had read from a store, and would hang: "
                "start processes by `forkserver` or `spawn` (multiprocessing.set_start_method)"
            )
        _used_by = os.getpid()
        try:
            return self._retry.call(self.name(file), attempt, progress)
        except FileNotFoundError:
            raise FileNotFoundError(f"there is no {self.name(file)}") from None

    def _check(self, file: str, meta: Mapping[str, Any], size: int | None) -> None:
        if size is not None and meta["size"] != size:
            raise RemoteError(
                f"{self.name(file)}: has {meta['size']} bytes instead of {size}: copy it again, or write the shards "
                "again"
            )
        version = _version(meta)
        if self._versions.setdefault(file, version) != version:
            raise RemoteError(
                f"{self.name(file)}: was replaced while it was in use (version {version} instead of "
                f"{self._versions[file]}): start again, and copy new shards to a new folder"
            )

    @cached_property
    def _store(self) -> ObjectStore:
        config = self.config
        options: Any = config.options
        client: Any = {
            "allow_http": True,
            "connect_timeout": timedelta(seconds=config.connect_timeout),
            "read_timeout": timedelta(seconds=config.read_timeout),
            "timeout": timedelta(seconds=4 * config.read_timeout),  # ends responses that trickle
        }
        common: Any = {"client_options": client, "retry_config": {"max_retries": 0}}
        if self._scheme in ("http", "https"):
            headers = {**options.get("headers", {}), **json.loads(os.environ.get(HTTP_HEADERS, "{}"))}
            client["default_headers"] = headers
            return HTTPStore.from_url(self.location, **common)
        if self._scheme == "s3" and not options.get("skip_signature"):
            common["credential_provider"] = _aws_profile(self.location)
        # Not for http: it takes some hosts for those of a cloud
        return from_url(self.location, config=options, **common)


def _version(meta: Mapping[str, Any]) -> str:
    modified = int(meta["last_modified"].timestamp())  # 0 where the server does not say
    return str(meta["e_tag"] or modified or "")


def _aws_profile(location: str) -> Any:
    """Return boto3's credentials where the environment names no key: obstore does not read ~/.aws."""
    files = [os.environ.get("AWS_SHARED_CREDENTIALS_FILE"), os.environ.get("AWS_CONFIG_FILE")]
    paths = [
        Path(file).expanduser() for file in (*filter(None, files), "~/.aws/credentials", "~/.aws/config")
    ]
    if "AWS_ACCESS_KEY_ID" in os.environ or not any(path.is_file() for path in paths):
        return None
    try:
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ImportError as error:
        raise ValueError(
            f"{location}: profiles in ~/.aws need the package boto3 ({error}): pip install boto3, or set "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        ) from None
    try:
        return Boto3CredentialProvider()
    except ValueError:  # the profile has no credentials: those of the instance, perhaps
        return None


def _check_options(scheme: str, options: Mapping[str, Any]) -> None:
    for name in options:
        if name not in KNOWN_OPTIONS[scheme]:
            raise ValueError(
                f"data.remote.options.{name} has no effect on {scheme}:// locations: known are "
                f"{', '.join(KNOWN_OPTIONS[scheme])}; credentials come from the environment (docs/data/remote.md)"
            )
    headers = options.get("headers", {})
    if not isinstance(headers, Mapping) or not all(isinstance(value, str) for value in headers.values()):
        raise ValueError(f"data.remote.options.headers: {headers!r} is not a mapping of names to strings")
    if any(name.lower() in ("authorization", "cookie", "proxy-authorization") for name in headers):
        raise ValueError(
            "data.remote.options.headers: credentials do not belong in settings, which are logged: "
            f"give them in the environment variable {HTTP_HEADERS} (docs/data/remote.md)"
        )
