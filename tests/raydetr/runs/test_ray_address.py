"""An address where no cluster answers is one line, after a bounded time."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

import pytest

from ray_head import ray_head
from raydetr.config import ConfigError
from raydetr.doctor.machine import MAX_SOCKET_PATH, RAY_SOCKET, environment_report
from raydetr.runs.ray_address import check_address

pytestmark = pytest.mark.xdist_group("ray")


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("ray://head:10001", r"Ray Client.*raydetr submit train .* --address http://head:8265"),
        ("http://head:8265", r"dashboard.*raydetr submit train .* --address http://head:8265"),
        ("head", "is not HOST:PORT"),
        ("head:0", "is not HOST:PORT"),
        ("head:99999", "is not HOST:PORT"),
    ],
)
def test_addresses_with_which_ray_cannot_train(address: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_address(address)


@pytest.mark.parametrize("address", ["127.0.0.1:9", "no-such-host.invalid:6379"])
def test_nothing_listens(address: str) -> None:
    began = time.monotonic()
    with pytest.raises(ConnectionError, match=f"cluster.address={address}: no connection .*ray start --head"):
        check_address(address)
    assert time.monotonic() - began < 30


def test_something_else_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raydetr.runs.ray_address.ANSWER_SECONDS", 3.0)
    message = "does not answer as the head of a Ray cluster"
    with socket.create_server(("127.0.0.1", 0)) as server, pytest.raises(ConnectionError, match=message):
        check_address(f"127.0.0.1:{server.getsockname()[1]}")


def test_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    token = "a" * 32
    with ray_head(1, variables={"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}) as head:
        refused = "wants another token, or none was found: set RAY_AUTH_MODE=token"
        monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
        with pytest.raises(ConnectionError, match=refused):
            check_address(head.address)
        monkeypatch.setenv("RAY_AUTH_MODE", "token")
        monkeypatch.setenv("HOME", "/nonexistent")
        monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
        with pytest.raises(ConnectionError, match=refused):
            check_address(head.address)
        monkeypatch.setenv("RAY_AUTH_TOKEN", "b" * 32)
        with pytest.raises(ConnectionError, match=refused):
            check_address(head.address)
        monkeypatch.setenv("RAY_AUTH_TOKEN", token)
        check_address(head.address)


def test_a_temporary_folder_that_is_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    longest = "/tmp/" + "x" * (MAX_SOCKET_PATH - len(RAY_SOCKET) - len("/tmp/"))
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", longest)
    check_address("local")
    monkeypatch.setenv("TMPDIR", longest + "y")
    with pytest.raises(ConfigError, match=r"is 1 bytes too long .* set RAY_TMPDIR"):
        check_address("local")
    lines = {line.subject: line for line in environment_report().lines}
    assert lines["temporary folder"].state == "error"
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    check_address("local")
    # The assumption about Ray's paths: the longest folder holds a socket, a longer one does not
    path = os.fsencode(longest) + RAY_SOCKET
    with socket.socket(socket.AF_UNIX) as unix, pytest.raises(OSError, match="too long"):
        unix.bind(path + b"x")
