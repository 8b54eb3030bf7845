"""Fetch byte ranges over HTTP: retry with exponential backoff, and resume where a broken response ended.

Every wait is bounded: a connection must be established within `connect_timeout`. A server that then sends nothing for
`read_timeout`, or fewer than `MIN_BYTES_PER_SECOND` over that time, is disconnected and asked again for the rest.
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

MIN_BYTES_PER_SECOND = 16 * 1024
READ_SIZE = 256 * 1024  # bytes
PROGRESS_BYTES = 64 * 1024  # received bytes that reset the count of failed attempts
FIRST_BACKOFF = 0.2  # seconds, doubled after each failed attempt
MAX_BACKOFF = 20.0  # seconds
RETRIED_STATUSES = (408, 425, 429, 500, 502, 503, 504)
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
    """Bytes could not be fetched; the message names the file, the range and the attempts."""

    status = 0  # HTTP status, if the server rejected the request


class _RetryableError(Exception):
    """A failed attempt that may be repeated."""

    def __init__(self, what: str, pause: float = 0.0) -> None:
        super().__init__(what)
        self.pause = pause  # seconds that the server asks to wait


class Transfers:
    """Fetches byte ranges, from any thread of the process that created it."""

    def __init__(self, config: RemoteConfig) -> None:
        self._config = config
        self._pool = urllib3.PoolManager(num_pools=8, maxsize=config.max_requests)
        self._proxies = {
            scheme: urllib3.ProxyManager(url, maxsize=config.max_requests)
            for scheme, url in urllib.request.getproxies().items()
            if scheme in ("http", "https")
        }
        self._random = random.Random()  # for jitter: affects timing only
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
        """Pass the bytes from `start` to `stop` (None: the end) to `accept`, in order, each exactly once.

        Args:
            name: name of the file, for messages.
            address: called before every attempt, because signed URLs expire.
            start: offset of the first byte.
            stop: offset after the last byte.
            size: expected size of the complete file in bytes; None skips the check.
            accept: called with consecutive parts of the range.

        Raises:
            RemoteError: the server rejects the request, has another file, or failed in all attempts.
        """
        received, since_progress, failures, began = 0, 0, 0, time.monotonic()
        span = f"bytes {start}-{'' if stop is None else stop - 1}"
        while True:
            failure: _RetryableError | None = None
            try:
                for chunk in self._chunks(name, address(), start, start + received, stop, size):
                    accept(chunk)
                    received += len(chunk)
                    since_progress += len(chunk)
                if stop is None or start + received == stop:
                    return
                failure = _RetryableError(f"the body ended at byte {start + received}")
            except _RetryableError as error:
                failure = error
            if since_progress >= PROGRESS_BYTES:
                failures = since_progress = 0
            failures += 1
            if failures >= self._config.attempts or self.closed.is_set():
                raise RemoteError(
                    f"{name}: {span} could not be read: {failures} attempts in "
                    f"{time.monotonic() - began:.1f} s, the last one: {failure}. Check the server and the "
                    "network; data.remote.attempts, connect_timeout and read_timeout limit the attempts"
                )
            if failures == 2:
                log.warning("%s: %s: trying again (%s)", name, span, failure)
            self.closed.wait(max(failure.pause, self._pause(failures)))

    def _pause(self, failures: int) -> float:
        longest = min(MAX_BACKOFF, FIRST_BACKOFF * 2.0 ** (failures - 1))
        return longest * self._random.uniform(0.5, 1.0)

    def _chunks(
        self, name: str, address: Address, first: int, at: int, stop: int | None, size: int | None
    ) -> Iterator[bytes]:
        """Make one attempt at the bytes from `at` on, of a range that begins at `first`."""
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
                response.drain_conn()  # lets the pool reuse the connection
        except (HTTPError, OSError) as error:
            if isinstance(error, RemoteError):
                raise
            if _is_certificate(error):
                raise RemoteError(f"{name}: the server's certificate is not trusted ({error})") from None
            raise _RetryableError(_describe(error, config)) from None
        finally:
            if response is not None:
                response.close()  # a connection with unread bytes cannot be reused

    def _pool_for(self, url: str) -> urllib3.PoolManager:
        """Return the pool of the proxy that HTTP_PROXY, HTTPS_PROXY and NO_PROXY select, or the direct one."""
        parts = urlsplit(url)
        proxy = self._proxies.get(parts.scheme)
        return self._pool if proxy is None or urllib.request.proxy_bypass(parts.netloc) else proxy

    def _body(self, response: Any, skipped: int, wanted: int | None) -> Iterator[bytes]:
        window, window_bytes, num_bytes = time.monotonic(), 0, 0
        while wanted is None or num_bytes < wanted + skipped:
            chunk = response.read1(READ_SIZE)
            if not chunk:
                return
            # Drop the `skipped` bytes before the range (a response of the complete file) and those after its end.
            before, num_bytes = num_bytes, num_bytes + len(chunk)
            stop = len(chunk) if wanted is None else len(chunk) - max(0, num_bytes - wanted - skipped)
            kept = chunk[max(0, skipped - before) : stop]
            if kept:
                yield kept
            window_bytes += len(chunk)
            seconds = time.monotonic() - window
            if seconds >= self._config.read_timeout:
                if window_bytes < seconds * MIN_BYTES_PER_SECOND:
                    raise _RetryableError(f"only {window_bytes} bytes in {seconds:.1f} s")
                window, window_bytes = time.monotonic(), 0


def _check_response(name: str, response: Any, first: int, at: int, stop: int | None, size: int | None) -> int:
    """Check status and headers; return the number of bytes to skip at the start of the body."""
    status = response.status
    if status in RETRIED_STATUSES:
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
        rejection = RemoteError(f"{name}: HTTP {status}: {remedy} {_excerpt(response)}".rstrip())
        rejection.status = status
        raise rejection
    encoding = response.headers.get("Content-Encoding", "identity")
    if encoding not in ("identity", ""):
        raise RemoteError(f"{name}: is sent with Content-Encoding {encoding}: store it as it is")
    if status == 200:
        return _check_complete(name, response, first, at, stop, size)
    sent = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", response.headers.get("Content-Range", "").strip())
    if sent is None or int(sent[1]) != at or (stop is not None and int(sent[2]) >= stop):
        raise _RetryableError(f"it sent {response.headers.get('Content-Range')!r} instead of bytes {at}-")
    if size is not None and sent[3] not in ("*", str(size)):
        raise _other_size(name, int(sent[3]), size)
    return 0


def _check_complete(name: str, response: Any, first: int, at: int, stop: int | None, size: int | None) -> int:
    """Accept the complete file from a server without range support, if the range starts at byte 0; return `at`."""
    length = response.headers.get("Content-Length")
    if size is not None and length is not None and int(length) != size:
        raise _other_size(name, int(length), size)
    if first > 0 or (stop is not None and stop != size):
        raise RemoteError(
            f"{name}: the server answers a request for a byte range with the complete file (HTTP 200): "
            "shards need a server that supports Range requests, as nginx, Apache and all object stores do"
        )
    return at


def _other_size(name: str, found: int, size: int) -> RemoteError:
    return RemoteError(
        f"{name}: has {found} bytes instead of {size}: copy it again, or write the shards again"
    )


def _excerpt(response: Any) -> str:
    """Return the start of an error response as one line."""
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
    # NewConnectionError is a subclass of ConnectTimeoutError, so it must be tested first.
    if isinstance(error, urllib3.exceptions.NewConnectionError):
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
        isinstance(argument, ssl.SSLCertVerificationError) for argument in reason.args
    )
