"""Call the command line in this process."""

from __future__ import annotations

import sys

import pytest

from raydetr.cli import main as cli


class CommandResult:
    """Exit code and output of a command; line breaks of standard error are replaced by spaces."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, " ".join(err.split())


class CommandLine:
    """Runs `raydetr PREFIX ARGUMENTS`."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *prefix: str
    ) -> None:
        self._monkeypatch, self._capsys, self._prefix = monkeypatch, capsys, prefix

    def __call__(self, *arguments: object) -> CommandResult:
        self._monkeypatch.setattr(sys, "argv", ["raydetr", *self._prefix, *map(str, arguments)])
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        printed = self._capsys.readouterr()
        return CommandResult(code, printed.out, printed.err)
