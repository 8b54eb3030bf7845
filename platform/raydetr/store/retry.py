"""Repeat failed requests until a server answers or the time for it is used up."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable
from typing import TypeVar

from obstore.exceptions import BaseError

from raydetr.console import print_status

FIRST_PAUSE, MAX_PAUSE = 0.2, 30.0  # seconds; the pause doubles after each failed attempt
QUIET_SECONDS = 3.0  # outages that are shorter are not reported
REPORT_SECONDS = 10.0  # between two reports of an outage by one process
RETRIED_STATUSES = (408, 425, 429, 500, 502, 503, 504)
REMEDIES = {
    401: "give credentials in the environment (docs/data/remote.md)",
    403: "these credentials, or none, do not allow it (docs/data/remote.md)",
    404: "it is not there; check bucket and path",
    416: "it ends before these bytes: it is not the file of this manifest; copy it again",
}
NO_CREDENTIALS = f"{REMEDIES[401]}, or read public files with data.remote.options.skip_signature=true"
NO_RANGES = "shards need a server that supports Range requests, as nginx, Apache and all object stores do"

T = TypeVar("T")


class RemoteError(OSError):
    """A file on a server could not be read or written; the message names file, cause and remedy."""


class Retry:
    """Makes attempts for at most `seconds` without progress. For all threads of a process.

    Args:
        seconds: the length of an outage.
        setting: its name, for messages; None: it is not a setting.
    """

    def __init__(self, seconds: float, setting: str | None) -> None:
        self._seconds = seconds
        self._hint = "" if setting is None else f"; {setting} is how long a run waits"
        self._random = random.Random()  # jitter affects only the timing
        self._has_answered, self._next_report = False, 0.0

    def call(self, name: str, attempt: Callable[[], T], progress: Callable[[], int] = lambda: 0) -> T:
        """Return the result of the first attempt that succeeds.

        Args:
            name: location of the file, for messages.
            attempt: makes one attempt.
            progress: returns a number that grows when an attempt achieved something: the time starts anew.

        Raises:
            FileNotFoundError, FileExistsError: what the server says about the file.
            RemoteError: the request is refused, or the time is used up.
        """
        began, failures, reached = time.monotonic(), 0, progress()
        while True:
            try:
                result = attempt()
            except BaseError as error:
                cause, remedy = explain(error, self._has_answered)
            else:
                self._has_answered = True
                return result
            if remedy:
                raise RemoteError(f"{name}: {cause}: {remedy}")
            if progress() > reached:
                began, failures, reached = time.monotonic(), 0, progress()
            failures += 1
            waited = time.monotonic() - began
            left = self._seconds - waited
            if left <= 0 and failures > 1:
                raise RemoteError(
                    f"{name}: no answer for {waited:.0f} s, in {failures} attempts ({cause}): check the server "
                    f"and the network{self._hint}"
                )
            longest = min(MAX_PAUSE, FIRST_PAUSE * 2.0 ** min(failures - 1, 10))
            pause = min(max(left, FIRST_PAUSE), longest * self._random.uniform(0.5, 1.0))
            self._report(name, cause, waited, pause, left)
            time.sleep(pause)

    def _report(self, name: str, cause: str, waited: float, pause: float, left: float) -> None:
        now = time.monotonic()
        if waited >= QUIET_SECONDS and now >= self._next_report:
            self._next_report = now + REPORT_SECONDS
            print_status(
                f"{name}: no answer for {waited:.0f} s ({cause}): next attempt in {pause:.0f} s, "
                f"giving up in {left:.0f} s"
            )


def explain(error: BaseError, has_answered: bool) -> tuple[str, str]:
    """Describe an error of obstore, which has one class for most of them and writes the cause into the message.

    Args:
        error: of an attempt.
        has_answered: the server has answered this process before, so there are credentials.

    Returns:
        the cause, and the remedy; with a remedy, further attempts would fail, too.
    """
    text, _, details = str(error).partition("\n\nDebug source:")
    text = re.sub(r"\?\S+", "", text)  # a query may hold a signature
    if not has_answered and re.search(r"http://(169\.254|metadata\.)|token request", text):
        return "there are no credentials", NO_CREDENTIALS
    if status := re.search(r"status code: (\d+) ?([\w ]*):? *(.*)", text, re.DOTALL):
        number, reason = int(status[1]), " ".join(filter(None, (status[2].strip(), _excerpt(status[3]))))
        remedy = "" if number in RETRIED_STATUSES else REMEDIES.get(number, "it is not possible there")
        return f"HTTP {number} {reason}".strip(), remedy
    if "InvalidCertificate" in details:
        return "the server's certificate is not trusted", "SSL_CERT_FILE may name others"
    if "Range request not supported" in text:
        return "the server answers a request for a byte range with the complete file", NO_RANGES
    if "HttpError" not in details:
        return " ".join(text.split())[:300], "check data.remote.options and the location"
    if "TimedOut" in details or "kind: Timeout" in details:
        return "no bytes in time", ""
    messages = re.findall(r'(?:message|error): "?([^"\n]+)"?,\n', details)  # the innermost one comes last
    return (messages[-1] if messages else " ".join(text.split())[:200]), ""


def _excerpt(body: str) -> str:
    """Return the start of the body of an error response, as one line."""
    found = re.search(r"<Code>(.*?)</Code>(?:.*?<Message>(.*?)</Message>)?", body, re.DOTALL)
    text = " ".join(filter(None, found.groups())) if found else re.sub(r"<[^>]*>", " ", body)
    return " ".join(text.split())[:200]
