"""Follow jobs of a cluster that is made up: it does not start them, or does not answer."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from ray.dashboard.modules.job.pydantic_models import JobType
from ray.job_submission import JobDetails, JobStatus

from raydetr.submission import follow
from raydetr.submission.cluster import ClusterError, UnreachableError
from raydetr.submission.follow import LOST
from raydetr.submission.jobs import to_table


def details(status: JobStatus, **values: Any) -> JobDetails:
    start = 1_700_000_000_000
    return JobDetails(
        type=JobType.SUBMISSION, submission_id="run-1", status=status, entrypoint="raydetr train --or-resume",
        start_time=start, end_time=start + 61_000,
        metadata={"raydetr.run": "run", "raydetr.source": "checkout"}, **values,
    )  # fmt: skip


class MadeCluster:
    """Answers with one status, or error, after the other; each connection to the log sends all of its texts so far."""

    address = "http://made"

    def __init__(self, answers: list[JobDetails | ClusterError], texts: list[list[str]]) -> None:
        self._answers, self._texts = answers, texts
        self.client = self

    def job(self, name: str) -> JobDetails:
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        if isinstance(answer, ClusterError):
            raise answer
        return answer

    def resources(self) -> str:
        return "the cluster has 0 CPUs"

    async def tail_job_logs(self, name: str) -> AsyncIterator[str]:
        texts = self._texts.pop(0) if len(self._texts) > 1 else self._texts[0]
        for text in texts:
            yield text
        if not texts:
            raise RuntimeError("WebSocket connection closed unexpectedly with close code 1006")


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("POLL", 0.01), ("PENDING", 0.05), ("WAITING", 0.05), ("RECONNECT", 0.3)):
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
    assert "submit its command again: a run with a --name goes on" in " ".join(
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
