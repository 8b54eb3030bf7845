"""Search on a real cluster: four trials on two CPUs, two at a time, about a minute on an idle machine."""

from __future__ import annotations

import json
import re
import shlex
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from drawn_shards import write_drawn_shards
from ray_head import RayHead, ray_head
from ray_nodes import ray_nodes
from raydetr.cli.arguments import read_config
from raydetr.config import from_yaml, override
from raydetr.runs import run
from raydetr.runs.schedule import read_schedule, train_schedule
from raydetr.runs.state import list_runs, state_of
from raydetr.tracking.events import read_events
from raydetr.tracking.upload_state import read_run_id
from raydetr.training.checkpoint import read_meta

pytestmark = pytest.mark.xdist_group("ray_head")

ROOT = Path(__file__).parents[3]
# The third trial fails: its loss overflows in the first steps, and no step may be skipped
SPACE = """
optim.lr: {choice: [4.0e-3, 1.0e-9, 1.0e+30]}
optim.weight_decay: {choice: [0.0, 1.0e-4]}
"""
# What is drawn with this seed. The fourth trial starts when one of the first two has ended: ASHA then stops it,
# because the good trial has a higher AP.
SEED = 107
DRAWN = [4e-3, 1e-9, 1e30, 1e-9]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_drawn_shards(folder, 64, 16)
    return folder


def search(
    head: RayHead, shards: Path, space: Path, *arguments: str, num_workers: int = 1, max_failures: int = 0
) -> subprocess.Popen[str]:
    """Start the job; its runs are stored in the folder of the space."""
    return tune(
        head,
        *("quickstart", "--space", str(space), *arguments),
        *(f"data.train={shards / 'train'}", f"data.val={shards / 'val'}", "data.synthetic=null"),
        *(f"cluster.num_workers={num_workers}", f"cluster.max_failures={max_failures}"),
        "evaluation.every_epochs=1",
        *("optim.max_skipped_steps=0", "evaluation.report=false", "tracking.register_model=false"),
        *(f"seed={SEED}", f"cluster.address={head.address}", f"storage.path={space.parent}"),
    )


def tune(head: RayHead, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "jobs/tune_detector.py", *arguments],
        cwd=ROOT,
        env=head.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_line(job: subprocess.Popen[str], pattern: str) -> None:
    """Read what the job prints until a line has the pattern."""
    assert job.stderr is not None
    seen = []
    for line in job.stderr:
        seen.append(line)
        if re.search(pattern, line):
            return
    raise AssertionError("".join(seen))


def check_nothing_is_left(head: RayHead) -> None:
    """Check that no actor, placement group or process of a search is left on the cluster."""
    actors = [actor["class_name"] for actor in head.living("actors")]
    assert [name for name in actors if name != "_AutoscalingCoordinatorActor"] == []
    assert head.living("placement_groups") == []
    assert drivers_and_workers(head) == []


def read_trials(folder: Path) -> dict[int, dict[str, Any]]:
    return {trial["number"]: trial for trial in json.loads((folder / "trials.json").read_text())}


def query(database: Path, sql: str, *values: str) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(database)) as connection:
        return connection.execute(sql, values).fetchall()


def drivers_and_workers(head: RayHead) -> list[str]:
    """The names of all Ray processes except the services of the cluster, and workers that it keeps for later."""
    services = ("AutoscalingCoordinator", "DashboardAgent", "RuntimeEnvAgent", "ray::IDLE")
    names = [process.name() for process in head.processes()]
    return [name for name in names if name.startswith("ray::") and not any(each in name for each in services)]


@pytest.mark.timeout(900)  # a minute; much longer on a busy machine
def test_a_search_stops_bad_trials_reports_failed_ones_and_leaks_nothing(
    shards: Path, tmp_path: Path
) -> None:
    space = tmp_path / "space.yaml"
    space.write_text(SPACE)
    with ray_head(num_cpus=2) as head:
        job = search(head, shards, space, "--trials", "4", "--concurrent", "5", "optim.epochs=2")
        output, errors = job.communicate()
        assert job.returncode == 0, errors
        check_nothing_is_left(head)
    assert head.processes() == []

    (folder,) = tmp_path.glob("tune-quickstart-*")
    trials = read_trials(folder)
    drawn = [trials[number]["overrides"]["optim.lr"] for number in (1, 2, 3, 4)]
    assert drawn == DRAWN
    assert trials[1]["status"] == "finished"
    assert trials[2]["status"] in ("finished", "stopped by ASHA")  # depends on which of two was faster
    assert trials[3]["status"] == "failed"
    assert "not finite" in trials[3]["cause"]
    assert (trials[4]["status"], trials[4]["epoch"]) == ("stopped by ASHA", 1)
    assert "2 trials fit on the cluster at once, not 5" in errors
    assert re.search(r"trial 1  epoch 2/2  AP 0\.\d{3}  AP50 0\.\d{3}  optim.lr=0.004", errors)

    text = (folder / "trials.txt").read_text().strip()
    assert output.rstrip().endswith(text)  # Ray prints lines before it
    table = text.splitlines()
    assert table[0].split() == ["trial", "AP", "AP50", "epochs", "status", "optim.lr", "optim.weight_decay"]
    assert table[1].startswith(f"1      {trials[1]['AP']:.3f}")
    assert any(line.startswith("trial 3 failed: ") for line in table)
    states = {state.name: (state.kind, state.state) for state in list_runs(folder)}
    expected = {"finished": "finished", "stopped by ASHA": "stopped", "failed": "failed"}
    assert states == {trial["name"]: ("trial", expected[trial["status"]]) for trial in trials.values()}
    assert (state_of(folder).kind, state_of(folder).state) == ("search", "finished")
    check_best_command(table[-1], folder)
    best = from_yaml(folder / "best.yaml")
    assert (best.optim.lr, best.optim.weight_decay) == (trials[1]["overrides"]["optim.lr"], 0.0)
    for name in ("curves.png", "parallel.png"):
        with Image.open(folder / name) as picture:
            assert picture.size[0] > 300
    # By default, the checkpoints of trials that were stopped early are removed; their record stays
    assert list((folder / f"{folder.name}-001").glob("checkpoints/*/state.pt"))
    assert not list((folder / f"{folder.name}-004").glob("checkpoints/*"))
    assert not (folder / "tune").exists()  # Ray Tune's own files
    check_mlflow(tmp_path / "mlflow.db", folder, trials)


def check_best_command(line: str, folder: Path) -> None:
    """Check that the command has the configuration of the best trial."""
    words = shlex.split(line.removeprefix("best"))
    assert words[:3] == ["raydetr", "train", "quickstart"]
    pasted = read_config(words[2:], None)
    trained = from_yaml(folder / f"{folder.name}-001" / "config.yaml")
    assert pasted.optim == trained.optim
    model = replace(pasted.model, num_classes=4)  # that of the data
    assert (model, pasted.data, pasted.seed) == (trained.model, trained.data, trained.seed)


def check_mlflow(database: Path, folder: Path, trials: dict[int, dict[str, Any]]) -> None:
    """Check that a finished parent has one child run per trial, with its metrics and its status."""
    parent, status = query(database, "select run_uuid, status from runs where name = ?", folder.name)[0]
    assert status == "FINISHED"
    children = dict(
        query(
            database,
            "select name, status from runs join tags using (run_uuid) "
            "where tags.key = 'mlflow.parentRunId' and tags.value = ?",
            parent,
        )
    )
    expected = {"finished": "FINISHED", "stopped by ASHA": "KILLED", "failed": "FAILED"}
    assert children == {trial["name"]: expected[trial["status"]] for trial in trials.values()}
    for trial in trials.values():
        run_id = read_run_id(folder / trial["name"])
        assert run_id is not None
        values = query(
            database,
            "select value from metrics where run_uuid = ? and key = 'AP/AP' order by step desc",
            run_id,
        )
        assert values[:1] == ([] if trial["AP"] is None else [(trial["AP"],)])
        (ended,) = query(
            database,
            "select value from tags where run_uuid = ? and key = 'raydetr.ended'",
            run_id,
        )
        assert ended[0].startswith(trial["status"])
    best = max(trial["AP"] for trial in trials.values() if trial["status"] == "finished")
    assert query(database, "select value from metrics where run_uuid = ? and key = 'AP/AP'", parent) == [
        (best,)
    ]
    params = dict(query(database, "select key, value from params where run_uuid = ?", parent))
    tags = dict(query(database, "select key, value from tags where run_uuid = ?", parent))
    assert (tags["best.optim.lr"], params["search.optim.lr"]) == ("0.004", "choice [0.004, 1e-09, 1e+30]")
    artifacts = {path.name for path in (database.parent / "mlflow-artifacts" / parent).rglob("*")}
    assert {"space.yaml", "config.yaml", "trials.txt", "trials.json", "best.yaml", "curves.png"} <= artifacts


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_search_that_a_signal_stops_reports_its_results_and_goes_on(
    shards: Path, tmp_path: Path, number: signal.Signals
) -> None:
    space = tmp_path / "space.yaml"
    space.write_text(SPACE)
    with ray_head(num_cpus=2) as head:
        # An epoch takes tenths of a second: enough of them for the signal to come before the end
        job = search(
            head, shards, space, "--algorithm", "random", "--trials", "2", "--concurrent", "2", "--name", "s",
            "optim.epochs=40",
        )  # fmt: skip
        wait_for_line(job, "epoch 1/")
        job.send_signal(number)
        _, errors = job.communicate()
        assert job.returncode == 128 + number, errors
        assert f"s was stopped by {number.name}: continue with `raydetr tune --resume {tmp_path}/s`" in errors
        check_nothing_is_left(head)
        rows = query(tmp_path / "mlflow.db", "select status from runs")
        assert rows == [("KILLED",)] * 3
        stopped = read_trials(tmp_path / "s")
        assert {trial["status"] for trial in stopped.values()} == {"interrupted"}
        job = tune(head, "--resume", str(tmp_path / "s"), f"cluster.address={head.address}")
        _, errors = job.communicate()
        assert job.returncode == 0, errors
    trials = read_trials(tmp_path / "s")
    assert trials[1]["status"] == "finished"
    before, after = (each[1]["evaluations"][0] for each in (stopped, trials))
    assert after | {"time": 0} == before | {"time": 0}
    assert trials[1]["evaluations"][-1]["epoch"] == 40


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_search_whose_driver_and_head_die_repeats_no_finished_trial_and_ends_with_the_same_result(
    shards: Path, tmp_path: Path
) -> None:
    """One trial at a time, so that an undisturbed search does the same in the same order."""
    arguments = ("--trials", "3", "--algorithm", "random", "--name", "s", "optim.epochs=3")
    folders = {}
    for name in ("undisturbed", "killed"):
        folders[name] = tmp_path / name
        folders[name].mkdir()
        (folders[name] / "space.yaml").write_text("optim.lr: {loguniform: [1.0e-3, 1.0e-2]}\n")
    with ray_head(num_cpus=1) as head:
        job = search(head, shards, folders["undisturbed"] / "space.yaml", *arguments)
        _, errors = job.communicate()
        assert job.returncode == 0, errors
    with ray_head(num_cpus=1) as head:
        job = search(head, shards, folders["killed"] / "space.yaml", *arguments)
        wait_for_line(job, "trial 2  epoch 1/3")
        job.kill()
        job.communicate()
    log = folders["killed"] / "s/s-001/events"
    before = {path.name: path.read_bytes() for path in log.iterdir()}
    with ray_head(num_cpus=1) as head:
        address = f"cluster.address={head.address}"
        job = tune(head, "--resume", str(folders["killed"] / "s"), "--concurrent", "1", address)
        _, errors = job.communicate()
        assert job.returncode == 0, errors
        check_nothing_is_left(head)
    assert "trial 1  starts" not in errors
    assert "trial 2  goes on" in errors
    expected, found = (read_trials(folder / "s") for folder in folders.values())
    for number in (1, 2, 3):
        assert found[number]["overrides"] == expected[number]["overrides"]
        assert [each["AP"] for each in found[number]["evaluations"]] == [
            each["AP"] for each in expected[number]["evaluations"]
        ]
    after = {path.name: path.read_bytes() for path in log.iterdir()}
    assert {name: after[name] for name in before} == before
    events = read_events(folders["killed"] / "s/s-002")
    resumed = [event for event in events if event["kind"] == "resumed"]
    assert [event["position"] for event in resumed] == [64]  # not from the beginning


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_population_copies_its_leader_and_its_schedule_gives_the_same_weights(
    shards: Path, tmp_path: Path
) -> None:
    """Jaderberg et al. 2017: a lagging trial continues the leader's weights with a changed learning rate."""
    space = tmp_path / "space.yaml"
    space.write_text("optim.lr: {loguniform: [1.0e-6, 1.0e-2]}\n")
    with ray_head(num_cpus=2) as head:
        job = search(head, shards, space, "--algorithm", "pbt", "--trials", "3", "--interval", "2", "--concurrent", "2",
                     "--name", "s", "optim.epochs=4", "storage.keep_checkpoints=9")  # fmt: skip
        _, errors = job.communicate()
        assert job.returncode == 0, errors
        check_nothing_is_left(head)
    proposals = [event for event in read_events(tmp_path / "s") if event["kind"] == "trial"]
    (taken,) = [event for event in proposals if event["takes_over"] is not None]
    number, leader = taken["number"], taken["takes_over"]
    first = {
        event["number"]: event["overrides"]["optim.lr"] for event in proposals if event["until_epoch"] == 2
    }
    assert taken["overrides"]["optim.lr"] not in (first[number], first[leader])
    own, others = (tmp_path / f"s/s-{each:03d}/checkpoints/000000000128" for each in (number, leader))
    assert (own / "state.pt").read_bytes() == (others / "state.pt").read_bytes()
    rates = {
        position: read_meta(tmp_path / f"s/s-{number:03d}/checkpoints/{position:012d}").config["optim"]["lr"]
        for position in (128, 256)
    }
    assert rates == {128: first[leader], 256: taken["overrides"]["optim.lr"]}
    check_replay(shards, tmp_path, read_trials(tmp_path / "s")[number], leader, first, taken)


def check_replay(
    shards: Path,
    folder: Path,
    trial: dict[str, Any],
    leader: int,
    first: dict[int, float],
    taken: dict[str, Any],
) -> None:
    """Train one run with the schedule of the trial that took over; it ends in the same state, to the last bit."""
    schedule = folder / "schedule.yaml"
    schedule.write_text(yaml.safe_dump({0: {"optim.lr": first[leader]}, 2: taken["overrides"]}))
    config = override(
        from_yaml(folder / "s/config.yaml"), {"cluster.address": None, "storage.path": str(folder / "again")}
    )
    steps = read_schedule(schedule, config)
    result = train_schedule(config, steps, local=True, name="replayed")
    assert result.metrics["AP"] == trial["AP"]
    # The schedule of the best trial, as the search has written it
    best = train_schedule(config, read_schedule(folder / "s/schedule.yaml", config), local=True, name="best")
    assert best.metrics["AP"] == max(each["AP"] for each in read_trials(folder / "s").values())
    last = folder / f"s/{trial['name']}/checkpoints/000000000256"
    assert read_meta(result.checkpoint).state_crc32 == read_meta(last).state_crc32  # weights, moments and EMA


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("num_workers", [1, 2])
def test_two_searches_on_one_cluster_take_turns(shards: Path, tmp_path: Path, num_workers: int) -> None:
    """Also if the trials of the second need both CPUs at once, and those of the first one each."""
    folders = {name: tmp_path / name for name in ("first", "second")}
    arguments = (
        "--algorithm",
        "random",
        "--trials",
        "4",
        "--concurrent",
        "2",
        "--name",
        "s",
        "optim.epochs=2",
    )
    with ray_head(num_cpus=2) as head:
        jobs = []
        for folder in folders.values():
            folder.mkdir()
            (folder / "space.yaml").write_text("optim.lr: {loguniform: [1.0e-3, 1.0e-2]}\n")
            workers = num_workers if jobs else 1
            jobs.append(search(head, shards, folder / "space.yaml", *arguments, num_workers=workers))
            if len(jobs) == 1:
                wait_for_line(jobs[0], "trial 1  epoch 1/")  # it has all CPUs
        outputs = [job.communicate() for job in jobs]
        assert [job.returncode for job in jobs] == [0, 0], outputs
        check_nothing_is_left(head)
    started = {
        name: [
            event["time"]
            for number in (1, 2, 3, 4)
            for event in read_events(folder / f"s/s-{number:03d}")
            if event["kind"] == "started"
        ]
        for name, folder in folders.items()
    }
    assert [len(times) for times in started.values()] == [4, 4]
    assert min(started["second"]) < max(started["first"])  # it did not wait until the first had ended
    assert f"waiting for workers: it needs {num_workers} x 1 CPUs, and there is room for " in outputs[1][1]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_trial_whose_process_is_killed_goes_on_from_its_checkpoint(shards: Path, tmp_path: Path) -> None:
    """Its workers end with it."""
    space = tmp_path / "space.yaml"
    space.write_text("optim.lr: {loguniform: [1.0e-3, 1.0e-2]}\n")
    arguments = ("--algorithm", "random", "--trials", "1", "--name", "s", "optim.epochs=80")
    with ray_head(num_cpus=1) as head:
        job = search(head, shards, space, *arguments, max_failures=3)
        wait_for_line(job, "trial 1  epoch 1/")
        killed = [process for process in head.processes() if process.name().startswith("ray::Implicit")]
        assert len(killed) == 1
        killed[0].kill()
        _, errors = job.communicate()
        assert job.returncode == 0, errors
        check_nothing_is_left(head)
    assert "trial 1  its process has died, and is started again" in errors
    resumed = [event["position"] for event in read_events(tmp_path / "s/s-001") if event["kind"] == "resumed"]
    assert len(resumed) == 1
    assert resumed[0] >= 64
    trial = read_trials(tmp_path / "s")[1]
    assert trial["status"] == "finished"
    assert [each["epoch"] for each in trial["evaluations"]] == list(range(1, 81))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_search_for_two_objectives_shows_its_pareto_front(shards: Path, tmp_path: Path) -> None:
    space = tmp_path / "space.yaml"
    space.write_text("optim.lr: {loguniform: [1.0e-4, 1.0e-2]}\nmodel.num_queries: {choice: [10, 300]}\n")
    arguments = ("--algorithm", "tpe", "--objective", "latency_ms", "--trials", "5", "--name", "s")
    with ray_head(num_cpus=2) as head:
        job = search(head, shards, space, *arguments, "optim.epochs=2")
        _, errors = job.communicate()
        assert job.returncode == 0, errors
        check_nothing_is_left(head)
    trials = read_trials(tmp_path / "s")
    assert {trial["status"] for trial in trials.values()} == {"finished"}
    rated = {
        number: (trial["AP"], trial["evaluations"][-1]["latency_ms"]) for number, trial in trials.items()
    }
    assert all(latency > 0 for _, latency in rated.values())
    expected = {
        number
        for number, (own, latency) in rated.items()
        if not any(
            (score > own and cost <= latency) or (score >= own and cost < latency)
            for score, cost in rated.values()
        )
    }
    rows = (tmp_path / "s/trials.txt").read_text().splitlines()[1:6]
    assert {int(row.split()[0]) for row in rows if " front " in row} == expected
    with Image.open(tmp_path / "s/front.png") as picture:
        assert picture.size[0] > 300


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_bohb_stops_trials_and_draws_by_what_they_have_shown(shards: Path, tmp_path: Path) -> None:
    space = tmp_path / "space.yaml"
    space.write_text("optim.lr: {loguniform: [1.0e-9, 1.0e-2]}\n")
    arguments = ("--algorithm", "bohb", "--trials", "6", "--name", "s", "--reduction-factor", "2")
    with ray_head(num_cpus=2) as head:
        job = search(head, shards, space, *arguments, "optim.epochs=4")
        _, errors = job.communicate()
        assert job.returncode == 0, errors
        check_nothing_is_left(head)
    trials = read_trials(tmp_path / "s")
    assert len(trials) == 6
    finished = [trial for trial in trials.values() if trial["status"] == "finished"]
    stopped = [trial for trial in trials.values() if trial["status"] == "stopped by ASHA"]
    assert finished
    assert stopped
    assert len(finished) + len(stopped) == 6
    assert {trial["epoch"] for trial in stopped} <= {1, 2}  # the rungs
    assert {trial["epoch"] for trial in finished} == {4}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning:ray")
def test_a_node_lost_in_a_search_changes_no_result(shards: Path, tmp_path: Path) -> None:
    space = tmp_path / "space.yaml"
    space.write_text("optim.lr: {loguniform: [1.0e-3, 1.0e-2]}\n")
    with ray_nodes(2, cpus=1) as nodes:
        job = subprocess.Popen(
            [
                *(sys.executable, "jobs/tune_detector.py", "quickstart", "--space", str(space)),
                *("--algorithm", "random", "--trials", "2", "--concurrent", "2", "--name", "s"),
                *(f"data.train={shards / 'train'}", f"data.val={shards / 'val'}", "data.synthetic=null"),
                *("cluster.num_workers=1", f"cluster.address={nodes.address}", f"storage.path={tmp_path}"),
                *("optim.epochs=40", "evaluation.every_epochs=20", "evaluation.report=false"),
                *("storage.checkpoint_steps=8", "tracking.register_model=false", f"seed={SEED}"),
            ],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        wait_for_line(job, "trial 1  epoch 20/")
        nodes.remove_node(nodes.workers[-1], allow_graceful=False)
        nodes.add_node(num_cpus=1)
        _, errors = job.communicate()
        assert job.returncode == 0, errors
    trials = read_trials(tmp_path / "s")
    assert [trials[number]["status"] for number in (1, 2)] == ["finished", "finished"]
    events = [event for number in (1, 2) for event in read_events(tmp_path / f"s/s-{number:03d}")]
    assert [event["kind"] for event in events].count("restart") == 1
    for trial in trials.values():  # an undisturbed run of each configuration
        config = from_yaml(tmp_path / "s" / trial["name"] / "config.yaml")
        changes = {"cluster.address": None, "storage.path": str(tmp_path / "undisturbed")}
        result = run.start(override(config, changes), local=True, name=trial["name"])
        assert result.metrics["AP"] == trial["AP"]
