"""The command `raydetr cluster check`."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster_files import AWS, KUBERAY
from command_line import CommandLine

FITS = (
    *("cluster.num_workers=4", "storage.path=/mnt/raydetr/runs", "tracking.uri=http://10.0.0.1:5000"),
    *("data.train=s3://a/b", "data.val=s3://a/c"),
)
RECIPE = ("--recipe", "dino_r50_4scale_12ep")


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    return CommandLine(monkeypatch, capsys, "cluster", "check")


def test_a_file_without_problems(check: CommandLine) -> None:
    result = check(AWS)
    assert (result.code, result.err) == (0, "")
    *notices, summary = result.out.splitlines()
    assert len(notices) == 3
    assert all(line.startswith("notice: ") and line.endswith(" is to be filled in") for line in notices)
    assert summary == f"{AWS}: no problem; gpu_worker: up to 4, 8 CPUs and 1 GPU each"


def test_problems_come_first_one_line_each_and_the_code_is_1(check: CommandLine, tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(AWS.read_text().replace("InstanceType:", "InstanceTyp:").replace('"GPU": 1', '"GPU": -1'))
    result = check(file)
    assert result.code == 1
    assert result.err == ""
    problems = [line for line in result.out.splitlines() if not line.startswith("notice: ")]
    assert problems[-1].startswith(f"{file}: {len(problems) - 1} problems; ")
    assert sum("did you mean InstanceType?" in line for line in problems) == 2


def test_a_run_that_fits(check: CommandLine) -> None:
    result = check(AWS, *RECIPE, *FITS)
    assert result.code == 0
    assert "no problem" in result.out


def test_a_run_that_does_not_fit(check: CommandLine) -> None:
    result = check(AWS, *RECIPE)
    assert result.code == 1
    paths = [line.partition(":")[0] for line in result.out.splitlines()]
    assert paths[:3] == ["cluster.num_workers", "storage.path", "tracking.uri"]


def test_a_configuration_file(check: CommandLine, tmp_path: Path) -> None:
    from raydetr import recipes
    from raydetr.config import to_yaml

    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(recipes.find(RECIPE[1])))
    assert check(AWS, "--config", file, *FITS).code == 0
    assert check(AWS, "--config", file).code == 1


def test_the_entrypoint_of_a_rayjob_is_checked_without_an_option(check: CommandLine, tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    for text, changed, expected in (
        ("num_workers=4", "num_workers=5", "cluster.num_workers: 5 workers with"),
        ("cpus_per_worker=6", "cpus_per_worker=8", "the nodes hold 0"),
        ("num_workers=4", "num_wokers=4", "spec.entrypoint: cluster.num_wokers"),
        ("dino_r50_4scale_12ep", "dino", "spec.entrypoint: "),
        ("=/mnt/raydetr/runs", "=runs", "storage.path: runs is on no folder that all nodes mount"),
        ("tracking.uri=http://raydetr-mlflow:5000", "", "tracking.uri: unset"),
    ):
        assert text in KUBERAY.read_text()
        file.write_text(KUBERAY.read_text().replace(text, changed))
        result = check(file)
        assert result.code == 1
        assert result.out.startswith(expected) or expected in result.out
        assert "1 problem; " in result.out
    # What is given replaces it
    assert check(KUBERAY, *RECIPE).code == 1


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "cannot be read: No such file or directory"),
        (b"a: [1", "is not YAML that is unambiguous: "),
        (b"a: !!python/object:os.system {}", "is not YAML that is unambiguous: "),
        (b"\xff\xfe\xfa", "it is not UTF-8"),
        (b"provider: {type: aws, type: gcp}", "the key 'type' occurs twice"),
        (b"provider: {type: aws}\n---\nprovider: {type: aws, a: 1, a: 2}", "the key 'a' occurs twice"),
        (b"", "is no cluster file"),
        (b"- 1", "is no cluster file"),
        (b"text", "is no cluster file"),
        (b"recipe: quickstart", "is no cluster file: one for `ray up` has a `provider`"),
        (b"provider: {type: aws}\n---\nprovider: {type: aws}", "is no cluster file"),
        (b"apiVersion: v1\nkind: Pod", "is no cluster file"),
        (b"apiVersion: ray.io/v1alpha1\nkind: RayJob", "apiVersion: ray.io/v1alpha1 is not ray.io/v1"),
        (
            b"apiVersion: ray.io/v1\nkind: RayJobs",
            "kind: RayJobs is neither RayJob nor RayCluster; did you mean",
        ),
        (b"apiVersion: ray.io/v1\nkind: RayService", "kind: RayService is neither RayJob nor RayCluster"),
        (b"provider: {type: aws}\na: &a\n  b: *a", "an alias (*) is inside of what it stands for"),
    ],
)
def test_a_file_that_is_no_cluster_file(
    check: CommandLine, tmp_path: Path, content: bytes | None, expected: str
) -> None:
    file = tmp_path / "cluster.yaml"
    if content is not None:
        file.write_bytes(content)
    result = check(file)
    assert result.code == 1
    assert result.err.startswith("error: ")
    assert expected in result.err
    assert "Traceback" not in result.err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--recipe", "a", "--config", "b"], "--recipe a and --config b are given: keep one"),
        (["optim.lr=1"], "optim.lr=1 has no effect without --recipe RECIPE or --config FILE"),
        (["--recipe", "quickstrat"], "quickstart"),
        ([*RECIPE, "optim.rl=1"], "optim.lr"),
    ],
)
def test_options_that_are_wrong(check: CommandLine, arguments: list[str], expected: str) -> None:
    result = check(AWS, *arguments)
    assert result.code == 1
    assert expected in result.err
