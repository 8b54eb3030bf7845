"""Addresses at which no cluster answers, or one that wants a token: one sentence each."""

from __future__ import annotations

import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import requests
from ray.job_submission import JobSubmissionClient

from command_line import CommandLine
from ray_head import RayHead, free_ports, ray_head
from raydetr.submission import cluster


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    for name in cluster.VARIABLES:
        monkeypatch.setenv(name, "")
    return CommandLine(monkeypatch, capsys, "jobs")


def test_nobody_listens(jobs: CommandLine) -> None:
    (port,) = free_ports(1)
    done = jobs("list", "--address", f"127.0.0.1:{port}")
    assert done.code == 1
    assert done.err.startswith(f"error: no Ray dashboard answers at http://127.0.0.1:{port} (")
    assert "Connection refused" in done.err
    assert "Traceback" not in done.err


def test_a_server_that_does_not_answer_is_given_up(
    jobs: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "CONNECT_SECONDS", 0.5)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        began = time.monotonic()
        done = jobs("logs", "run", "--address", f"http://127.0.0.1:{silent.getsockname()[1]}/")
    assert done.code == 1
    assert "no Ray dashboard answers" in done.err
    assert "timed out" in done.err
    assert time.monotonic() - began < 30


@contextmanager
def server(status: int, text: str) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *arguments: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()


@pytest.mark.parametrize(("status", "text"), [(200, "<html>"), (404, "nothing here"), (500, "oh")])
def test_another_server(jobs: CommandLine, status: int, text: str) -> None:
    with server(status, text) as url:
        done = jobs("list", "--address", url)
    assert done.code == 1
    assert done.err.startswith(f"error: {url}")
    assert "Traceback" not in done.err


@pytest.mark.parametrize("address", ["ray://127.0.0.1:10001", "http://", "ftp://a"])
def test_an_address_of_another_kind(jobs: CommandLine, address: str) -> None:
    done = jobs("list", "--address", address)
    assert done.code == 1
    assert "is not the URL of a Ray dashboard, such as http://127.0.0.1:8265" in done.err


def test_the_address_is_that_of_the_option_then_that_of_the_environment(
    jobs: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, variable, other = (f"http://127.0.0.1:{port}" for port in free_ports(3))
    monkeypatch.setenv("RAY_ADDRESS", other)
    assert other in jobs("list").err
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", variable)
    assert variable in jobs("list").err
    assert given in jobs("list", "--address", given).err


@pytest.mark.xdist_group("ray_head")
@pytest.mark.timeout(300)
def test_a_cluster_that_wants_a_token() -> None:
    token = "a" * 64
    with ray_head(1, variables={"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}) as head:
        assert _list(head).returncode == 0
        without = _list(head, RAY_AUTH_MODE="disabled", RAY_AUTH_TOKEN="")
        wrong = _list(head, RAY_AUTH_TOKEN="b" * 64)
        none = _list(head, RAY_AUTH_TOKEN="", HOME="/nonexistent")
    for done in (without, wrong, none):
        assert done.returncode == 1
        assert done.stderr.startswith(f"error: {head.dashboard} requires a token ("), done.stderr
        assert "RAY_AUTH_MODE=token" in done.stderr
        assert len(done.stderr.splitlines()) == 1
        assert len(done.stderr) < 400


def _list(head: RayHead, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [head.python.parent / "raydetr", "jobs", "list", "--address", head.dashboard],
        env={name: value for name, value in (head.environment() | variables).items() if value},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.timeout(20)
def test_a_cluster_that_stops_answering_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "CONNECT_SECONDS", 0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        stopped = cluster.Cluster.__new__(cluster.Cluster)
        stopped.address = address
        stopped.client = JobSubmissionClient.__new__(JobSubmissionClient)
        monkeypatch.setattr(stopped.client, "list_jobs", lambda: requests.get(f"{address}/api/jobs/"))
        with pytest.raises(cluster.UnreachableError, match="timed out"):
            stopped.job("run")
