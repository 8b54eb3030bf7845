"""Follow jobs of a cluster that is made up: it does not start them, or does not answer."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from typing import Any

import pytest
from ray.dashboard.modules.job.pydantic_models import JobType
from ray.job_submission import JobDetails, JobStatus
from ray.util.state.exception import RayStateApiException

from raydetr.submission import follow
from raydetr.submission.cluster import Cluster, ClusterError, UnreachableError
from raydetr.submission.follow import LOST
from raydetr.submission.jobs import to_table


def details(status: JobStatus, **values: Any) -> JobDetails:
    start = 1_700_000_000_000
    return JobDetails(
        type=JobType.SUBMISSION, submission_id="run-1", status=status, entrypoint="raydetr train --or-resume",
        start_time=start, end_time=start + 61_000,
        metadata={"raydetr.run": "run", "raydetr.source": "checkout"}, **values,
    )  # fmt: skip


SILENT = "(silent)"


class MadeCluster:
    """Answers with one status, or error, after the other; each connection to the log sends all of its texts so far.

    The last answer comes after the last connection. A connection without texts breaks, after `seconds`; one that is
    `SILENT` sends nothing more and does not end.
    """

    address = "http://made"

    def __init__(
        self, answers: list[JobDetails | ClusterError], texts: list[list[str]], seconds: float = 0
    ) -> None:
        self._answers, self._texts, self._seconds = answers, texts, seconds
        self._connections_left = len(texts)
        self.client = self

    def job(self, name: str) -> JobDetails:
        num_kept = 1 if self._connections_left <= 0 else 2
        answer = self._answers.pop(0) if len(self._answers) > num_kept else self._answers[0]
        if isinstance(answer, ClusterError):
            raise answer
        return answer

    def resources(self) -> str:
        return "the cluster has 0 CPUs"

    async def tail_job_logs(self, name: str) -> AsyncIterator[str]:
        texts = self._texts.pop(0) if len(self._texts) > 1 else self._texts[0]
        self._connections_left -= 1
        for text in texts:
            if text == SILENT:
                await asyncio.Event().wait()
            yield text
        await asyncio.sleep(self._seconds)
        if not texts:
            raise RuntimeError("WebSocket connection closed unexpectedly with close code 1006")


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (
        ("POLL", 0.01),
        ("PENDING", 0.05),
        ("WAITING", 0.05),
        ("RECONNECT", 0.3),
        ("SILENT", 2.0),
    ):
        monkeypatch.setattr(follow, f"{name}_SECONDS", seconds)


def test_a_broken_connection_is_made_again_and_no_line_is_printed_twice(
    capsys: pytest.CaptureFixture[str],
) -> None:
    running, ended = details(JobStatus.RUNNING), details(JobStatus.SUCCEEDED, driver_exit_code=0)
    answers: list[JobDetails | ClusterError] = [running, running, UnreachableError("away"), running, ended]
    logs = [["one\n"], [], ["one\n", "two\nthr"], ["one\ntwo\n", "three\n", "four\n"]]
    assert follow.follow(MadeCluster(answers, logs), "run-1") == 0  # type: ignore[arg-type]
    printed = capsys.readouterr()
    assert printed.out == "one\ntwo\nthree\nfour\n"
    assert "run-1 succeeded after 1:01" in printed.err


def test_the_first_break_after_long_is_no_reason_to_give_up(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    running, ended = details(JobStatus.RUNNING), details(JobStatus.SUCCEEDED, driver_exit_code=0)
    monkeypatch.setattr(follow, "RECONNECT_SECONDS", 0.1)
    cluster = MadeCluster([running, running, ended], [[], ["one\n"]], seconds=0.3)
    assert follow.follow(cluster, "run-1") == 0  # type: ignore[arg-type]
    assert capsys.readouterr().out == "one\n"


@pytest.mark.timeout(20)
def test_a_connection_that_stays_silent_is_made_again(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = details(JobStatus.SUCCEEDED, driver_exit_code=0)
    monkeypatch.setattr(follow, "SILENT_SECONDS", 0.1)
    cluster = MadeCluster([details(JobStatus.RUNNING), ended, ended], [["one\n", SILENT], ["one\ntwo\n"]])
    assert follow.follow(cluster, "run-1") == 0  # type: ignore[arg-type]
    assert capsys.readouterr().out == "one\ntwo\n", "the end of the log is missing"


@pytest.mark.timeout(20)
def test_it_ends_when_nobody_reads_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w", buffering=1) as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        with pytest.raises(BrokenPipeError):
            follow.follow(MadeCluster([details(JobStatus.RUNNING)], [["one\n"]]), "run-1")  # type: ignore[arg-type]
        os.dup2(os.open(os.devnull, os.O_WRONLY), writer)


def test_an_error_of_the_list_of_nodes_is_one_of_the_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**arguments: object) -> None:
        raise RayStateApiException("Failed to retrieve all nodes")

    monkeypatch.setattr("raydetr.submission.cluster.list_nodes", refuse)
    cluster = Cluster.__new__(Cluster)
    cluster.address = "http://made"
    with pytest.raises(ClusterError, match="http://made: Failed to retrieve all nodes"):
        cluster.resources()


def test_a_job_that_does_not_start_says_what_it_waits_for(capsys: pytest.CaptureFixture[str]) -> None:
    pending = details(JobStatus.PENDING, message="It may be waiting for resources.")
    stopped = details(JobStatus.STOPPED)
    cluster = MadeCluster([*[pending] * 40, stopped], [["x"]])
    assert follow.follow(cluster, "run-1") == 3  # type: ignore[arg-type]
    err = " ".join(capsys.readouterr().err.split())
    assert "run-1 is pending: It may be waiting for resources. (the cluster has 0 CPUs)" in err
    assert "was stopped after 1:01; go on with: raydetr jobs resume run-1 --address http://made" in err


def test_a_cluster_that_is_gone_is_given_up(capsys: pytest.CaptureFixture[str]) -> None:
    running = details(JobStatus.RUNNING)
    cluster = MadeCluster([running, UnreachableError("away")], [["one\n"], []])
    assert follow.follow(cluster, "run-1") == LOST  # type: ignore[arg-type]
    printed = capsys.readouterr()
    assert printed.out == "one\n"
    assert "has not answered" in printed.err
    assert "raydetr jobs logs run-1 --address http://made" in " ".join(printed.err.split())


def test_a_new_head_that_does_not_know_the_job_is_an_error() -> None:
    cluster = MadeCluster([details(JobStatus.RUNNING), ClusterError("has no job run-1")], [["one\n"]])
    with pytest.raises(ClusterError, match="has no job run-1"):
        follow.follow(cluster, "run-1")  # type: ignore[arg-type]


def test_a_job_of_ray_job_submit_is_submitted_again(capsys: pytest.CaptureFixture[str]) -> None:
    stopped = details(JobStatus.STOPPED)
    stopped.metadata = None
    assert follow.follow(MadeCluster([stopped], [["x"]]), "run-1") == 3  # type: ignore[arg-type]
    assert "submit its command again: a run or a search with a --name goes on" in " ".join(
        capsys.readouterr().err.split()
    )


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"driver_exit_code": 7, "message": "log"}, "run-1 failed after 1:01, exit code 7"),
        ({"message": "No available node"}, "No available node"),
        (
            {"driver_exit_code": 127, "message": "/bin/sh: 1: raydetr: not found"},
            "not installed on the cluster",
        ),
        (
            {"driver_exit_code": 1, "message": "ModuleNotFoundError: No module named 'raydetr'"},
            "not installed on the cluster",
        ),
    ],
)
def test_a_failure_says_why(
    values: dict[str, Any], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster = MadeCluster([details(JobStatus.FAILED, **values)], [["log\n"]])
    assert follow.follow(cluster, "run-1") == 1  # type: ignore[arg-type]
    assert expected in " ".join(capsys.readouterr().err.split())


def test_the_table_of_jobs() -> None:
    running = details(JobStatus.RUNNING)
    running.end_time = None
    lines = to_table([running, details(JobStatus.FAILED)], now=1_700_000_000 + 3661).splitlines()
    assert lines[0].split() == ["job", "run", "status", "since", "duration", "command"]
    assert lines[1].split()[:3] == ["run-1", "run", "running"]
    assert "1:01:01" in lines[1]
    assert "  1:01  " in lines[2]
