"""The command line, called in this process as a person calls it."""

from __future__ import annotations

import sys

import pytest

from raydetr.cli import main as cli


class SearchResult:
    """What a command printed, and its exit code."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, " ".join(err.split())


class CommandLine:
    """Runs `raydetr BEGINNING ARGUMENTS`."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *beginning: str
    ) -> None:
        self._monkeypatch, self._capsys, self._beginning = monkeypatch, capsys, beginning

    def __call__(self, *arguments: object) -> SearchResult:
        self._monkeypatch.setattr(sys, "argv", ["raydetr", *self._beginning, *map(str, arguments)])
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        printed = self._capsys.readouterr()
        return SearchResult(code, printed.out, printed.err)
