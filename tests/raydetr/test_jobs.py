"""Submit the jobs as users do: to a head node, from a checkout or an installed wheel."""

from __future__ import annotations

import json
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from bare_environment import bare_environment, build_wheel, can_import
from drawn_shards import write_drawn_shards
from ray_head import RayHead, ray_head
from raydetr.config import RunConfig, to_yaml
from raydetr.submission.cluster import VARIABLES, Cluster
from raydetr.tracking.events import read_events
from raydetr.training import checkpoint
from raydetr.training.checkpoint import read_meta, read_metrics

pytestmark = pytest.mark.xdist_group("ray_head")

ROOT = Path(__file__).parents[2]
RAYDETR = str(Path(sys.executable).parent / "raydetr")


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment without `raydetr`, not even for a program that starts in the checkout."""
    python = bare_environment(tmp_path_factory.mktemp("bare") / "environment")
    assert can_import(python, "ray", ROOT)
    assert can_import(python, "torch", ROOT)
    assert not can_import(python, "raydetr", ROOT)
    assert not can_import(python, "detrs", ROOT)
    return python


@pytest.fixture(scope="module")
def bare_head(bare_python: Path) -> Iterator[RayHead]:
    with ray_head(num_cpus=2, python=bare_python) as head:
        yield head


def ray_submit(head: RayHead, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Call `ray job submit` from the checkout."""
    return subprocess.run(
        [
            *(str(head.python), "-m", "ray.scripts.scripts", "job", "submit", "--address", head.dashboard),
            *("--working-dir", ".", *arguments),
        ],
        cwd=ROOT,
        env=head.environment(),
        capture_output=True,
        text=True,
        check=False,
    )


def raydetr(
    head: RayHead, *arguments: str, program: str = RAYDETR, cwd: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    """Call `raydetr` with the address of a head."""
    return subprocess.run(
        [program, *arguments, "--address", head.dashboard],
        cwd=cwd,
        env=head.environment(),
        capture_output=True,
        text=True,
        check=False,
    )


def job(head: RayHead, name: str) -> dict[str, Any]:
    with head.get(f"/api/jobs/{name}") as response:
        found: dict[str, Any] = json.load(response)
    return found


def wait_until(condition: Callable[[], object], seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def mlflow_runs(config: RunConfig) -> list[tuple[str, str]]:
    with closing(sqlite3.connect(Path(config.storage.path) / "mlflow.db")) as connection:
        return connection.execute("select name, status from runs order by name").fetchall()


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_events(folder) if event["kind"] == kind]


def quickstart(config: RunConfig, *overrides: str) -> list[str]:
    """The recipe on the data of a configuration, with one worker and 6 steps per epoch."""
    return [
        *(
            "quickstart",
            "data.synthetic=null",
            "cluster.num_workers=1",
            f"storage.path={config.storage.path}",
        ),
        *(f"data.train={config.data.train}", f"data.val={config.data.val}", "data.batch_size=8"),
        *("tracking.register_model=false", "evaluation.report=false", *overrides),
    ]


@pytest.mark.timeout(600)  # less than a minute; much longer on a busy machine
@pytest.mark.parametrize("installed", [pytest.param(True, marks=pytest.mark.slow), False])
def test_a_submitted_job_trains_evaluates_and_leaves_a_checkpoint_and_an_mlflow_run(
    installed: bool, bare_python: Path, tmp_path: Path
) -> None:
    write_drawn_shards(tmp_path, 32, 16)
    with ray_head(num_cpus=2, python=Path(sys.executable) if installed else bare_python) as head:
        done = ray_submit(
            head,
            *(
                "--",
                "python",
                "jobs/train_detector.py",
                "quickstart",
                "optim.epochs=1",
                "data.synthetic=null",
            ),
            *(f"data.train={tmp_path / 'train'}", f"data.val={tmp_path / 'val'}"),
            *("tracking.register_model=false", "evaluation.report=false"),  # they take seconds
            f"storage.path={tmp_path / 'runs'}",
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert head.living("placement_groups") == []
    (folder,) = (tmp_path / "runs").glob("quickstart-*")
    assert str(folder) in done.stdout
    (meta,) = folder.glob("*/*/meta.json")
    found = read_meta(meta.parent)
    assert (found.epoch, found.position) == (1, 32)
    with closing(sqlite3.connect(tmp_path / "runs" / "mlflow.db")) as connection:
        runs = connection.execute("select name, status from runs").fetchall()
        values = connection.execute("select value from metrics where key = 'AP/AP'").fetchall()
    assert runs == [(folder.name, "FINISHED")]
    assert values == [(read_metrics(meta.parent)["AP"],)]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ctrl_c_detaches_and_a_stopped_job_is_resumed_in_its_run(
    bare_head: RayHead, tiny_run: RunConfig
) -> None:
    folder = Path(tiny_run.storage.path) / "hit"
    arguments = quickstart(
        tiny_run, "optim.epochs=100", "evaluation.every_epochs=100", "storage.checkpoint_steps=2"
    )
    submitted = subprocess.Popen(
        [RAYDETR, "submit", "train", *arguments, "--name", "hit", "--address", bare_head.dashboard],
        cwd=ROOT,
        env=bare_head.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_until(lambda: submitted.poll() is not None or checkpoint.complete_checkpoints(folder))
    submitted.send_signal(signal.SIGINT)
    out, err = submitted.communicate(timeout=60)
    assert submitted.returncode == 130, out + err
    assert "Running entrypoint for job hit: python jobs/train_detector.py quickstart" in out
    assert "detached: hit goes on" in err
    for command in ("logs", "stop"):
        assert err.count(f"raydetr jobs {command} hit --address {bare_head.dashboard}") == 2
    assert "Traceback" not in out + err
    assert job(bare_head, "hit")["status"] == "RUNNING"
    assert job(bare_head, "hit")["metadata"]["raydetr.storage"] == str(tiny_run.storage.path)

    # The run has one job at a time
    for command in (["jobs", "resume", "hit"], ["submit", "train", *arguments, "--name", "hit"]):
        refused = raydetr(bare_head, *command)
        assert refused.returncode == 1
        assert "hit: the job hit is running with this run" in refused.stderr

    stopped = raydetr(bare_head, "jobs", "stop", "hit")
    assert stopped.returncode == 0, stopped.stderr
    last = checkpoint.newest_valid(folder, pytest.fail)
    assert last is not None
    position = checkpoint.position_of(last)
    assert f"its last checkpoint is at position {position}" in " ".join(stopped.stderr.split())
    assert f"raydetr jobs resume hit --address {bare_head.dashboard}" in stopped.stderr
    assert job(bare_head, "hit")["status"] == "STOPPED"
    assert mlflow_runs(tiny_run) == [("hit", "KILLED")]
    assert raydetr(bare_head, "jobs", "logs", "hit").returncode == 3

    resumed = raydetr(bare_head, "jobs", "resume", "hit")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert "hit-2 succeeded" in resumed.stderr
    assert re.search(r"^[a-z].*  epoch 100.00/100  step 600/600  ", resumed.stdout, re.MULTILINE)
    assert [event["position"] for event in events(folder, "resumed")] == [position]
    assert mlflow_runs(tiny_run) == [("hit", "FINISHED")]
    assert [path.parent.name for path in Path(tiny_run.storage.path).glob("*/config.yaml")] == ["hit"]
    # The commit of the checkout, without its .git
    command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    launches = events(folder, "launched")
    assert {launch["tags"]["mlflow.source.git.commit"] for launch in launches} == {commit}
    (described,) = events(folder, "environment")[-1]["json_files"].values()
    assert described["git"]["revision"] == commit

    listed = raydetr(bare_head, "jobs", "list").stdout.splitlines()
    rows = {line.split()[0]: line.split()[1:3] for line in listed[1:]}
    assert rows["hit"] == ["hit", "stopped"]
    assert rows["hit-2"] == ["hit", "succeeded"]
    again = raydetr(bare_head, "jobs", "stop", "hit")
    assert (again.returncode, again.stderr) == (1, "error: hit: has already ended (stopped)\n")


@pytest.mark.slow  # a minute
@pytest.mark.timeout(300)
def test_failures_are_told_in_a_sentence(
    bare_head: RayHead, tiny_run: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = raydetr(bare_head, "submit", "train", "quickstart", "data.train=/missing", "data.synthetic=null")
    assert wrong.returncode == 1
    assert "/missing" in wrong.stdout
    assert re.search(r"error: quickstart-\S+ failed after 0:\d\d, exit code 1", wrong.stderr)
    # From elsewhere, the cluster's own `raydetr` runs, and this one has none
    outside = raydetr(bare_head, "submit", "train", *quickstart(tiny_run), "--name", "outside", cwd=tmp_path)
    assert outside.returncode == 1
    assert "Running entrypoint for job outside: raydetr train quickstart" in outside.stdout
    assert "raydetr is not installed on the cluster" in " ".join(outside.stderr.split())
    # Before anything is sent
    for arguments, message in (
        (["quickstart", "optim.lrr=1"], "did you mean optim.lr?"),
        (["quickstart", "--name", "a/b"], "the name 'a/b' is not the name of a folder"),
        (["--config", str(_write(tmp_path / "run.yaml", to_yaml(tiny_run)))], "is not in the upload of"),
    ):
        refused = raydetr(bare_head, "submit", "train", *arguments)
        assert refused.returncode == 1
        assert message in " ".join(refused.stderr.split())
    large = tmp_path / "large"
    (large / "jobs").mkdir(parents=True)
    (large / "jobs/train_detector.py").touch()
    with (large / "weights.pth").open("wb") as file:
        file.truncate(101 * 2**20)
    too_large = raydetr(bare_head, "submit", "train", "quickstart", cwd=large)
    assert too_large.returncode == 1
    assert re.search(r"^ +101.0 MiB  weights.pth$", too_large.stderr, re.MULTILINE), too_large.stderr
    unknown = raydetr(bare_head, "jobs", "logs", "outsid")
    assert unknown.returncode == 1
    assert "has no job outsid; did you mean outside?" in unknown.stderr
    for done in (wrong, outside, refused, too_large, unknown):
        assert "Traceback" not in done.stderr
    for name in VARIABLES:  # which Cluster sets
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert Cluster(bare_head.dashboard).resources() == "the cluster has 2 CPUs and 0 GPUs on 1 node"


def _write(file: Path, text: str) -> Path:
    file.write_text(text)
    return file


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_stop_waits_for_a_last_checkpoint_that_takes_longer_than_rays_three_seconds(
    bare_head: RayHead, tiny_run: RunConfig
) -> None:
    # A step on 48 images of 640 pixels takes about 10 s on two cores
    arguments = quickstart(
        tiny_run, "data.batch_size=48", "data.micro_batch_size=8", "data.train_transform.short_sides=[640]",
        "optim.epochs=50", "evaluation.every_epochs=50", "storage.checkpoint_steps=1",
    )  # fmt: skip
    arguments = [argument for argument in arguments if argument != "data.batch_size=8"]
    outcomes = {}
    for name in ("ours", "rays"):
        if name == "ours":
            done = raydetr(bare_head, "submit", "train", *arguments, "--name", name, "--detach")
        else:
            done = ray_submit(
                bare_head,
                *("--no-wait", "--submission-id", name, "--", "python", "jobs/train_detector.py", *arguments),
                *("--name", name),
            )
        assert done.returncode == 0, done.stdout + done.stderr
        folder = Path(tiny_run.storage.path) / name
        wait_until(lambda folder=folder: checkpoint.complete_checkpoints(folder))  # a step has just begun
        before = checkpoint.position_of(checkpoint.complete_checkpoints(folder)[0])
        stopped = raydetr(bare_head, "jobs", "stop", name)
        assert stopped.returncode == 0, stopped.stderr
        outcomes[name] = " ".join(stopped.stderr.split())
        last = checkpoint.newest_valid(folder, pytest.fail)
        assert last is not None
        reached = checkpoint.position_of(last)
        if name == "ours":
            assert reached > before
            seconds = re.search(
                rf"after (\d+) s; its last checkpoint is at position {reached}", outcomes[name]
            )
            assert seconds is not None, outcomes
            assert int(seconds[1]) > 3
            assert events(folder, "stopped")
        else:
            assert reached == before
            assert "was killed after 3 s without a last checkpoint" in outcomes[name], outcomes
            assert "submit its command again: a run with a --name goes on" in outcomes[name]
            assert not events(folder, "stopped")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_job_that_is_submitted_again_after_the_head_died_goes_on(
    bare_python: Path, tiny_run: RunConfig
) -> None:
    arguments = quickstart(
        tiny_run, "optim.epochs=60", "evaluation.every_epochs=60", "storage.checkpoint_steps=2"
    )
    command = ["submit", "train", *arguments, "--name", "hit"]
    folder = Path(tiny_run.storage.path) / "hit"
    with ray_head(num_cpus=2, python=bare_python) as head:
        following = subprocess.Popen(
            [RAYDETR, *command, "--address", head.dashboard],
            cwd=ROOT,
            env=head.environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        wait_until(lambda: len(checkpoint.complete_checkpoints(folder)) >= 2)
    # All processes of the head were killed at once
    last = checkpoint.newest_valid(folder, lambda message: None)
    assert last is not None
    position = checkpoint.position_of(last)
    assert position < 60 * 48
    _, err = following.communicate(timeout=180)
    assert following.returncode == 4, err
    assert "submit again with the name of the run" in " ".join(err.split())
    with ray_head(num_cpus=2, python=bare_python) as head:
        done = raydetr(head, *command)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "hit succeeded" in done.stderr
        assert [event["position"] for event in events(folder, "resumed")] == [position]
        undisturbed = raydetr(head, "submit", "train", *arguments, "--name", "undisturbed")
        assert undisturbed.returncode == 0, undisturbed.stderr
        # Once more, with Ray's own command: nothing is left to do
        finished = ray_submit(head, "--", "python", "jobs/train_detector.py", *arguments, "--name=hit")
        assert finished.returncode == 0, finished.stdout
        assert f"{folder}: this run is finished" in finished.stdout
    assert mlflow_runs(tiny_run) == [("hit", "FINISHED"), ("undisturbed", "FINISHED")]
    checksums = {
        read_meta(max((Path(tiny_run.storage.path) / name / "checkpoints").iterdir())).state_crc32
        for name in ("hit", "undisturbed")
    }
    assert len(checksums) == 1


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_wheel_submits_to_a_cluster_that_has_it_installed(tiny_run: RunConfig, tmp_path: Path) -> None:
    python = bare_environment(tmp_path / "environment", build_wheel(ROOT, tmp_path / "wheels"))
    program = str(python.parent / "raydetr")
    work = tmp_path / "work"
    work.mkdir()
    place = [str(python), "-c", "import detrs, raydetr; print(raydetr.__file__, detrs.__file__)"]
    found = subprocess.run(place, cwd=work, capture_output=True, text=True, check=True).stdout.split()
    assert all(Path(file).is_relative_to(tmp_path / "environment") for file in found)
    config = work / "my run.yaml"
    config.write_text(to_yaml(override(tiny_run, {"tracking.upload": True})))
    with ray_head(num_cpus=2, python=python) as head:
        done = raydetr(
            head,
            *("submit", "train", "--config", "my run.yaml", "optim.epochs=1", "--name", "mine"),
            program=program,
            cwd=work,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert str(ROOT) not in job(head, "mine")["entrypoint"]
        assert "RuntimeWarning" not in done.stdout  # the wheel has the native operator
        config.unlink()
        again = raydetr(head, "jobs", "resume", "mine", program=program, cwd=tmp_path)
        assert again.returncode == 0, again.stdout + again.stderr
        assert "this run is finished" in again.stdout
    folder = Path(tiny_run.storage.path) / "mine"
    assert (folder / "last").exists() or checkpoint.newest_valid(folder, pytest.fail) is not None
    assert mlflow_runs(tiny_run) == [("mine", "FINISHED")]


@pytest.mark.timeout(600)
def test_the_upload_of_a_job_is_small() -> None:
    """Ray refuses working directories over 100 MiB; files in .gitignore are not uploaded."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    files = [ROOT / name for name in listed.stdout.split("\0") if name]
    assert files
    assert sum(file.stat().st_size for file in files if file.is_file()) < 50 * 2**20
