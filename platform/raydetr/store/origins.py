"""Resolve the files of a remote folder to HTTP requests: fsspec's backends supply URLs and credentials.

`transfer.py` fetches the bytes of all of them. The backends can fetch too, but they discard what they received when a
connection breaks, and each has its own timeouts and retries.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from raydetr.config.paths import scheme_of

SIGNATURE_SECONDS = 3600  # validity of a signed URL
SIGNATURE_REFRESH_SECONDS = 300  # temporary credentials may expire before the signature does

# Options with an effect. Credentials are excluded because settings are logged.
KNOWN_OPTIONS = {
    "s3": ("anon", "client_kwargs", "config_kwargs", "endpoint_url", "profile", "requester_pays", "use_ssl"),
    "gs": ("endpoint_url", "project", "token"),
    "http": ("headers",),
    "https": ("headers",),
}
GS_TOKENS = ("anon", "browser", "cache", "cloud", "google_default")
_PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "http": "aiohttp", "https": "aiohttp"}


@dataclass(frozen=True)
class Address:
    """URL and headers of a request for a file."""

    url: str
    headers: Mapping[str, str] = field(default_factory=dict)


class Origin:
    """A remote folder. Every process creates its own file system, because fsspec's do not survive a fork.

    Raises:
        ValueError: an option is unknown or has no effect, or the backend's package is not installed.
    """

    def __init__(self, location: str, options: Mapping[str, Any]) -> None:
        self.location, self.options = location, dict(options)
        self._scheme = scheme_of(location) or ""
        _check_options(self._scheme, self.options)
        self._pid = 0
        self._file_system: Any = None
        self._signed: dict[str, tuple[float, Address]] = {}
        self.connect()

    def __reduce__(self) -> tuple[type[Origin], tuple[str, dict[str, Any]]]:
        return Origin, (self.location, self.options)

    def name(self, file: str) -> str:
        """Return the location of a file, for messages."""
        return f"{self.location}/{file}"

    def address(self, file: str) -> Address:
        """Return the current address of a file; a signature in it expires."""
        self.connect()
        now = time.monotonic()
        signed = self._signed.get(file)
        if signed is None or now - signed[0] > SIGNATURE_REFRESH_SECONDS:
            signed = self._signed[file] = (now, self._make_address(file))
        return signed[1]

    def connect(self) -> None:
        """Create the backend's file system, once in each process."""
        if self._pid != os.getpid():
            self._file_system, self._signed, self._pid = self._open(), {}, os.getpid()
            if self._scheme == "s3":
                self._make_address("manifest.json")  # s3fs creates its client for the first signature

    def _make_address(self, file: str) -> Address:
        if self._scheme in ("http", "https"):
            return Address(f"{self.location}/{quote(file)}", self._http_headers())
        path = f"{self.location}/{file}"
        if self._scheme == "s3":
            payer = {"RequestPayer": "requester"} if self.options.get("requester_pays") else {}
            return Address(self._file_system.sign(path, expiration=SIGNATURE_SECONDS, **payer))
        headers: dict[str, str] = {}
        self._file_system.credentials.apply(headers)
        return Address(self._file_system.url(path), headers)

    def _http_headers(self) -> dict[str, str]:
        """Merge the headers of the options with those of FSSPEC_HTTP and FSSPEC_HTTPS in the environment."""
        configured = self._file_system.client_kwargs
        headers = {**configured.get("headers", {}), **self.options.get("headers", {})}
        if "auth" in configured:
            headers["Authorization"] = configured["auth"].encode()
        return headers

    def _open(self) -> Any:
        import fsspec  # type: ignore[import-untyped]

        options = dict(self.options)
        if self._scheme in ("http", "https"):
            options.pop("headers", None)
        if self._scheme == "s3" and not options.get("anon"):
            # Without this, buckets of us-east-1 get signatures of version 2, which new buckets reject.
            options["config_kwargs"] = {"signature_version": "s3v4", **options.get("config_kwargs", {})}
        try:
            return fsspec.filesystem(self._scheme, skip_instance_cache=True, **options)
        except ImportError as error:
            package = _PACKAGES[self._scheme]
            raise ValueError(
                f"{self.location}: {self._scheme}:// needs the package {package} ({error}): pip install {package}"
            ) from None


def _check_options(scheme: str, options: Mapping[str, Any]) -> None:
    known = KNOWN_OPTIONS[scheme]
    for name, value in options.items():
        if name not in known and not (scheme == "s3" and name in ("key", "secret", "token")):
            raise ValueError(
                f"data.remote.options.{name} has no effect on {scheme}:// locations: known are {', '.join(known)}"
            )
        if name not in known or (name == "token" and not _is_harmless(value)):
            raise ValueError(
                f"data.remote.options.{name}: credentials do not belong in settings, which are logged: "
                "give them in the environment (docs/data/remote.md)"
            )
    headers = options.get("headers", {})
    if not isinstance(headers, Mapping) or not all(isinstance(value, str) for value in headers.values()):
        raise ValueError(f"data.remote.options.headers: {headers!r} is not a mapping of names to strings")
    if any(name.lower() in ("authorization", "cookie", "proxy-authorization") for name in headers):
        raise ValueError(
            "data.remote.options.headers: credentials do not belong in settings, which are logged: "
            "give them in the environment variable FSSPEC_HTTP or FSSPEC_HTTPS (docs/data/remote.md)"
        )


def _is_harmless(token: Any) -> bool:
    """Return True for a method of finding credentials or the path of a file that holds them."""
    return isinstance(token, str) and (token in GS_TOKENS or token.endswith(".json"))
