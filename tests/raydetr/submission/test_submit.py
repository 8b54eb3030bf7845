"""What is sent to a cluster, by one that only keeps it."""

from __future__ import annotations

import json
import shlex
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from ray.dashboard.modules.job.pydantic_models import JobType
from ray.job_submission import JobDetails, JobStatus

from command_line import CommandLine
from raydetr import recipes
from raydetr.config import ConfigError, to_yaml
from raydetr.environment import GIT_VARIABLE
from raydetr.submission import cluster, jobs


class KeptCluster:
    """Keeps what is submitted, with the files of the working directory."""

    address = "http://kept"

    def __init__(self, status: JobStatus = JobStatus.FAILED) -> None:
        self.client = self
        self.sent: list[dict[str, Any]] = []
        self.files: list[dict[str, str]] = []
        self.status = status

    def submit_job(self, **arguments: Any) -> None:
        folder = arguments["runtime_env"].get("working_dir")
        files = sorted(Path(folder).rglob("*.yaml")) if folder else []
        self.files.append({file.name: file.read_text() for file in files})
        self.sent.append(arguments)

    def jobs(self) -> list[JobDetails]:
        return [
            JobDetails(
                type=JobType.SUBMISSION, status=self.status, submission_id=sent["submission_id"],
                entrypoint=sent["entrypoint"], metadata=sent["metadata"], runtime_env=sent["runtime_env"],
            )
            for sent in self.sent
        ]  # fmt: skip

    def job(self, name: str) -> JobDetails:
        return next(job for job in self.jobs() if job.submission_id == name)

    errors = cluster.Cluster.errors


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> KeptCluster:
    made = KeptCluster()
    monkeypatch.setattr(cluster, "Cluster", lambda address: made)
    return made


@pytest.fixture
def submit(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    return CommandLine(monkeypatch, capsys, "submit")


def test_a_search_is_submitted_with_its_files(
    kept: KeptCluster, submit: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    space = "optim.lr: {uniform: [0.001, 0.01]}\n"
    Path("my space.yaml").write_text(space)
    Path("run.yaml").write_text(to_yaml(recipes.quickstart()))
    options = ("--space", "my space.yaml", "--trials", 3, "--concurrent", 2, "--config", "run.yaml")
    done = submit("tune", "seed=3", *options, "--name", "try", "--detach")
    assert done.code == 0, done.err
    (sent,) = kept.sent
    assert shlex.split(sent["entrypoint"]) == [
        *("raydetr", "tune", "seed=3", "--trials", "3", "--concurrent", "2"),
        *("--name", "try", "--or-resume", "--space", "space.yaml", "--config", "config.yaml"),
    ]
    assert kept.files == [{"space.yaml": space, "config.yaml": to_yaml(recipes.quickstart())}]
    assert sent["submission_id"] == "try"
    assert not Path(sent["runtime_env"]["working_dir"]).exists()  # a copy, which was removed
    assert jobs.resume(kept, "try", tmp_path) == "try-2"  # type: ignore[arg-type]
    assert kept.sent[1]["entrypoint"] == sent["entrypoint"]
    assert kept.files[1] == kept.files[0]


def test_a_checkout_is_uploaded_and_its_files_are_named_as_they_are(
    kept: KeptCluster, submit: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("jobs/train_detector.py", "settings/run.yaml"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(to_yaml(recipes.quickstart()))
    config = tmp_path / "settings/run.yaml"
    for _ in range(3):
        assert submit("train", "--config", config, "--name", "a-run", "--detach").code == 0
    entrypoint = "python jobs/train_detector.py --name a-run --or-resume --config settings/run.yaml"
    assert {sent["entrypoint"] for sent in kept.sent} == {entrypoint}
    assert [sent["submission_id"] for sent in kept.sent] == ["a-run", "a-run-2", "a-run-3"]
    assert {sent["runtime_env"]["working_dir"] for sent in kept.sent} == {str(tmp_path)}
    assert kept.sent[0]["runtime_env"]["env_vars"] == {"RAY_JOB_STOP_WAIT_TIME_S": "120"}
    assert kept.sent[0]["metadata"]["raydetr.run"] == "a-run"
    # Again, from the checkout only
    assert jobs.resume(kept, "a-run-2", tmp_path) == "a-run-4"  # type: ignore[arg-type]
    assert kept.sent[-1]["entrypoint"] == entrypoint
    with pytest.raises(ConfigError, match="was submitted from a checkout"):
        jobs.resume(kept, "a-run", tmp_path / "jobs")  # type: ignore[arg-type]
    kept.status = JobStatus.PENDING
    refused = submit("train", "--config", config, "--name", "a-run", "--detach")
    assert refused.code == 1
    assert "a-run: the job a-run is pending with this run" in refused.err
    assert submit("train", "--config", config, "--name", "b-run", "--detach").code == 0


def test_a_checkout_is_uploaded_without_git_but_with_its_commit(
    kept: KeptCluster, submit: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=someone", "-c", "user.email=someone@example.org"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    monkeypatch.chdir(tmp_path)
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs/train_detector.py").touch()
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    submit("train", "quickstart", "--name", "a-run", "--detach")
    (tmp_path / "jobs/train_detector.py").write_text("changed")
    jobs.resume(kept, "a-run", tmp_path)  # type: ignore[arg-type]
    revision = git("rev-parse", "HEAD")
    sent = [json.loads(each["runtime_env"]["env_vars"][GIT_VARIABLE]) for each in kept.sent]
    assert sent == [{"revision": revision, "dirty": False}, {"revision": revision, "dirty": True}]


def test_a_run_without_files_uploads_nothing_and_has_a_name_of_its_own(
    kept: KeptCluster, submit: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = submit("train", "quickstart", "optim.lr=1e-3", "--detach")
    assert done.code == 0
    (sent,) = kept.sent
    words = shlex.split(sent["entrypoint"])
    assert words[:4] == ["raydetr", "train", "quickstart", "optim.lr=1e-3"]
    assert words[4:] == ["--name", sent["submission_id"], "--or-resume"]
    assert sent["submission_id"].startswith(f"quickstart-{time.strftime('%Y', time.gmtime())}")
    assert "working_dir" not in sent["runtime_env"]
    assert f"raydetr jobs logs {sent['submission_id']} --address http://kept" in done.err
    assert jobs.resume(kept, sent["submission_id"], tmp_path).endswith("-2")  # type: ignore[arg-type]
