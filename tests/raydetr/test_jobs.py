"""Submit the jobs as users do: to a head node, from a copy of the repository."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from ray_head import RayHead, ray_head
from raydetr.shards.source import coco_source
from raydetr.shards.synthetic import write_synthetic_data
from raydetr.shards.writer import write_source
from raydetr.training.checkpoint import read_meta, read_metrics

pytestmark = pytest.mark.xdist_group("ray_head")

ROOT = Path(__file__).parents[2]


def submit(head: RayHead, *entrypoint: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            *(sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--address", head.dashboard),
            *("--working-dir", ".", "--", *entrypoint),
        ],
        cwd=ROOT,
        env=head.environment(),
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.timeout(600)  # less than a minute; much longer on a busy machine
def test_a_submitted_job_trains_evaluates_and_leaves_a_checkpoint_and_an_mlflow_run(tmp_path: Path) -> None:
    write_synthetic_data(tmp_path / "coco", num_train=32, num_val=16)
    for split in ("train", "val"):
        annotations = tmp_path / "coco" / "annotations" / f"instances_{split}.json"
        write_source(coco_source(tmp_path / "coco" / split, annotations), tmp_path / split)
    with ray_head(num_cpus=2) as head:
        done = submit(
            head,
            *("python", "jobs/train_detector.py", "quickstart", "optim.epochs=1", "data.synthetic=null"),
            *(f"data.train={tmp_path / 'train'}", f"data.val={tmp_path / 'val'}"),
            f"storage.path={tmp_path / 'runs'}",
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert head.living("placement_groups") == []
    (folder,) = (tmp_path / "runs").glob("quickstart-*")
    assert str(folder) in done.stdout
    (meta,) = folder.glob("*/*/meta.json")
    checkpoint = read_meta(meta.parent)
    assert (checkpoint.epoch, checkpoint.position) == (1, 32)
    with closing(sqlite3.connect(tmp_path / "runs" / "mlflow.db")) as connection:
        runs = connection.execute("select name, status from runs").fetchall()
        values = connection.execute("select value from metrics where key = 'AP'").fetchall()
    assert runs == [(folder.name, "FINISHED")]
    assert values == [(read_metrics(meta.parent)["AP"],)]


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
