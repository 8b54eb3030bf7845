"""Byte ranges over HTTP: retried with growing pauses, and gone on with where a broken one ended.

Nothing waits without end: a connection has `connect_timeout` to be made; then a server that sends nothing for
`read_timeout`, or less than `SLOWEST` in that time, is left, and asked again for what is missing.
"""

from __future__ import annotations

import logging
import random
import re
import ssl
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import urllib3
from urllib3.exceptions import HTTPError, SSLError

from raydetr.config import RemoteConfig
from raydetr.store.origins import Address

log = logging.getLogger(__name__)

SLOWEST = 16 * 1024  # bytes a second
CHUNK = 256 * 1024  # bytes
PROGRESS = 64 * 1024  # bytes after which an attempt counts as a first one again
FIRST_PAUSE = 0.2  # seconds, doubled from attempt to attempt
LONGEST_PAUSE = 20.0  # seconds
RETRIED_STATUS = (408, 425, 429, 500, 502, 503, 504)
REDIRECTS = urllib3.Retry(
    total=5,
    connect=0,
    read=0,
    status=0,
    other=0,
    redirect=5,
    raise_on_redirect=False,
    respect_retry_after_header=False,
)


class RemoteError(OSError):
    """Bytes that could not be fetched; the message names the file, the range and what was tried."""

    status = 0  # of HTTP, where the server refused


class _RetryableError(Exception):
    """Worth another attempt."""

    def __init__(self, what: str, pause: float = 0.0) -> None:
        super().__init__(what)
        self.pause = pause  # seconds that the server asks for


class Transfers:
    """Fetches ranges, from any thread of the process that made it."""

    def __init__(self, config: RemoteConfig) -> None:
        self._config = config
        self._pool = urllib3.PoolManager(num_pools=8, maxsize=config.max_requests)
        self._proxies = {
            scheme: urllib3.ProxyManager(url, maxsize=config.max_requests)
            for scheme, url in urllib.request.getproxies().items()
            if scheme in ("http", "https")
        }
        self._random = random.Random()  # jitter decides nothing but when
        self.closed = threading.Event()

    def fetch(
        self,
        name: str,
        address: Callable[[], Address],
        start: int,
        stop: int | None,
        size: int | None,
        accept: Callable[[bytes], None],
    ) -> None:
        """Hand the bytes from `start` to `stop` (None: the end) to `accept`, in order, each once.

        Args:
            name: of the file, for messages.
            address: asked before every attempt.
            start: first byte.
            stop: after the last byte.
            size: that the whole file must have; None: any.
            accept: gets chunks.

        Raises:
            RemoteError: the server refuses, has another file, or failed in all attempts.
        """
        received, since_progress, failures, began = 0, 0, 0, time.monotonic()
        span = f"bytes {start}-{'' if stop is None else stop - 1}"
        while True:
            fault: _RetryableError | None = None
            try:
                for chunk in self._chunks(name, address(), start, start + received, stop, size):
                    accept(chunk)
                    received += len(chunk)
                    since_progress += len(chunk)
                if stop is None or start + received == stop:
                    return
                fault = _RetryableError(f"the body ended at byte {start + received}")
            except _RetryableError as error:
                fault = error
            if since_progress >= PROGRESS:
                failures = since_progress = 0
            failures += 1
            if failures >= self._config.attempts or self.closed.is_set():
                raise RemoteError(
                    f"{name}: {span} could not be read: {failures} attempts in "
                    f"{time.monotonic() - began:.1f} s, the last one: {fault}. Look after the server and the "
                    "network; data.remote.attempts, connect_timeout and read_timeout say how long to try"
                )
            if failures == 2:
                log.warning("%s: %s: trying again (%s)", name, span, fault)
            self.closed.wait(max(fault.pause, self._pause(failures)))

    def _pause(self, failures: int) -> float:
        longest = min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** (failures - 1))
        return longest * self._random.uniform(0.5, 1.0)

    def _chunks(
        self, name: str, address: Address, first: int, at: int, stop: int | None, size: int | None
    ) -> Iterator[bytes]:
        """One attempt at the bytes from `at` on, of a range that begins at `first`."""
        config = self._config
        headers = {**address.headers, "Accept-Encoding": "identity"}
        if at > 0 or stop is not None:
            headers["Range"] = f"bytes={at}-{'' if stop is None else stop - 1}"
        timeout = urllib3.Timeout(connect=config.connect_timeout, read=config.read_timeout)
        response = None
        try:
            response = self._pool_for(address.url).request(
                "GET", address.url, headers=headers, timeout=timeout, retries=REDIRECTS, preload_content=False,
                redirect=True,
            )  # fmt: skip
            skipped = _check_response(name, response, first, at, stop, size)
            yield from self._body(response, skipped, None if stop is None else stop - at)
            if response.length_remaining == 0:
                response.drain_conn()  # the connection can be used again
        except (HTTPError, OSError) as error:
            if isinstance(error, RemoteError):
                raise
            if _is_certificate(error):
                raise RemoteError(f"{name}: the server's certificate is not trusted ({error})") from None
            raise _RetryableError(_describe(error, config)) from None
        finally:
            if response is not None:
                response.close()  # what is not read to its end cannot be used again

    def _pool_for(self, url: str) -> urllib3.PoolManager:
        """Through the proxy that HTTP_PROXY, HTTPS_PROXY and NO_PROXY name."""
        parts = urlsplit(url)
        proxy = self._proxies.get(parts.scheme)
        return self._pool if proxy is None or urllib.request.proxy_bypass(parts.netloc) else proxy

    def _body(self, response: Any, skipped: int, wanted: int | None) -> Iterator[bytes]:
        window, window_bytes, num_bytes = time.monotonic(), 0, 0
        while wanted is None or num_bytes < wanted + skipped:
            chunk = response.read1(CHUNK)
            if not chunk:
                return
            before, num_bytes = num_bytes, num_bytes + len(chunk)
            stop = len(chunk) if wanted is None else len(chunk) - max(0, num_bytes - wanted - skipped)
            kept = chunk[max(0, skipped - before) : stop]
            if kept:
                yield kept
            window_bytes += len(chunk)
            seconds = time.monotonic() - window
            if seconds >= self._config.read_timeout:
                if window_bytes < seconds * SLOWEST:
                    raise _RetryableError(f"only {window_bytes} bytes in {seconds:.1f} s")
                window, window_bytes = time.monotonic(), 0


def _check_response(name: str, response: Any, first: int, at: int, stop: int | None, size: int | None) -> int:
    """Number of bytes at the beginning of the body that are not wanted."""
    status = response.status
    if status in RETRIED_STATUS:
        raise _RetryableError(f"HTTP {status} {_excerpt(response)}".rstrip(), _retry_after(response))
    if status == 416:
        raise RemoteError(
            f"{name}: ends before byte {at}: it is not the file of this manifest; copy it again"
        )
    if status not in (200, 206):
        remedies = {
            401: "give credentials in the environment",
            403: "these credentials, or none, do not allow to read it",
            404: "it is not there",
        }
        remedy = remedies.get(status, "it cannot be read there")
        refusal = RemoteError(f"{name}: HTTP {status}: {remedy} {_excerpt(response)}".rstrip())
        refusal.status = status
        raise refusal
    encoding = response.headers.get("Content-Encoding", "identity")
    if encoding not in ("identity", ""):
        raise RemoteError(f"{name}: is sent with Content-Encoding {encoding}: store it as it is")
    if status == 200:
        return _check_whole(name, response, first, at, stop, size)
    sent = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", response.headers.get("Content-Range", "").strip())
    if sent is None or int(sent[1]) != at or (stop is not None and int(sent[2]) >= stop):
        raise _RetryableError(f"it sent {response.headers.get('Content-Range')!r} instead of bytes {at}-")
    if size is not None and sent[3] not in ("*", str(size)):
        raise _other_size(name, int(sent[3]), size)
    return 0


def _check_whole(name: str, response: Any, first: int, at: int, stop: int | None, size: int | None) -> int:
    """A server that does not know ranges sends everything: of use where the range begins with the file."""
    length = response.headers.get("Content-Length")
    if size is not None and length is not None and int(length) != size:
        raise _other_size(name, int(length), size)
    if first > 0 or (stop is not None and stop != size):
        raise RemoteError(
            f"{name}: the server answers a request for a byte range with the whole file (HTTP 200): "
            "shards need a server that knows Range requests, as nginx, Apache and all object stores do"
        )
    return at


def _other_size(name: str, found: int, size: int) -> RemoteError:
    return RemoteError(
        f"{name}: has {found} bytes instead of {size}: copy it again, or write the shards again"
    )


def _excerpt(response: Any) -> str:
    """What the server says about it, in one line."""
    try:
        text = response.read1(2048).decode("utf-8", "replace")
    except (HTTPError, OSError):
        return ""
    found = re.search(r"<Code>(.*?)</Code>(?:.*?<Message>(.*?)</Message>)?", text, re.DOTALL)
    words = " ".join(filter(None, found.groups())) if found else re.sub(r"<[^>]*>", " ", text)
    words = " ".join(words.split())[:200]
    return f"({words})" if words else ""


def _retry_after(response: Any) -> float:
    asked = response.headers.get("Retry-After", "")
    return min(float(asked), 60.0) if asked.isdigit() else 0.0


def _describe(error: Exception, config: RemoteConfig) -> str:
    if isinstance(error, urllib3.exceptions.NewConnectionError):  # which urllib3 has for a kind of timeout
        return f"no connection: {error}"
    if isinstance(error, urllib3.exceptions.ConnectTimeoutError):
        return f"no connection within {config.connect_timeout:g} s"
    if isinstance(error, (urllib3.exceptions.ReadTimeoutError, TimeoutError)):
        return f"the server sent nothing for {config.read_timeout:g} s"
    if isinstance(error, urllib3.exceptions.MaxRetryError) and error.reason is not None:
        return _describe(error.reason, config)
    return f"{type(error).__name__}: {error}"


def _is_certificate(error: Exception) -> bool:
    reason = getattr(error, "reason", None) or error
    return isinstance(reason, SSLError) and any(
        isinstance(a, ssl.SSLCertVerificationError) for a in reason.args
    )
