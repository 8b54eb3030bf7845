"""`make bench-step`: a row that fails costs no other, and it needs little more than torch."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import detrs
from detrs.attention import DeformableAttention

ROOT = Path(__file__).parents[2]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.chdir(tmp_path)
    for name in ("bench_step", "step_cuda", "step_models"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import bench_step

    return bench_step


@pytest.fixture
def models(bench: ModuleType) -> ModuleType:
    return sys.modules["step_models"]


def small(config: Any) -> Any:
    """The same kind of model in a small size."""
    sizes = {
        "hidden_dim": 32,
        "num_encoder_layers": 1,
        "num_decoder_layers": 2,
        "ffn_dim": 32,
        "num_queries": 10,
    }
    return replace(config, backbone=detrs.BackboneConfig(name="small"), **sizes)


def test_a_row_that_fails_and_one_that_is_late_cost_no_other(bench: ModuleType) -> None:
    report = bench.Report("this machine", time.monotonic() + 60, Path("build/bench/step.json"))

    def fail() -> dict[str, Any]:
        raise torch.OutOfMemoryError("no memory\nfor this")

    case = {"case": "detr", "size": 320, "threads": 1}
    report.add(case, fail)
    report.add(case, lambda: bench.summarize([[0.5, 0.25, 0.5], [1.0, 0.75, 2.0]], 1))
    report.add({"case": "compiled"}, fail, needs=120)
    report.deadline = time.monotonic() - 1
    report.add({"case": "dino"}, fail)
    written = json.loads((Path("build/bench/step.json")).read_text())
    failed, measured = written["rows"]
    assert failed == {**case, "error": "OutOfMemoryError: no memory\nfor this"}
    assert measured == {
        **case, "ours_ms": 500.0, "images_per_second": 2.0, "baseline_ms": 1000.0, "ratio": 3.0
    }  # fmt: skip
    long, late = written["left_out"]
    assert re.fullmatch(r"compiled: it may need 120 s, and --minutes leaves \d\d s", long)
    assert late == "dino: the time of --minutes is up"
    assert "no memory" in bench.line(failed)


@pytest.mark.parametrize(
    "name", ["detr", "conditional_detr", "dab_detr", "deformable_detr_two_stage", "dino"]
)
def test_a_step_trains_what_the_papers_train(models: ModuleType, name: str) -> None:
    step = models.our_step(small(models.MODELS[name]), models.make_batch(64, 96, num_images=2))
    before = {key: value.clone() for key, value in step.network.state_dict().items()}
    loss = step()
    assert loss.total.isfinite()
    assert loss.num_queries == 10
    assert {"loss_ce", "loss_bbox_0", "loss_giou"} <= loss.terms
    changed = {key for key, value in step.network.state_dict().items() if not torch.equal(value, before[key])}
    frozen = {"backbone.conv1.weight", "backbone.layer1.0.conv1.weight"}
    trained = {
        "backbone.layer2.0.conv1.weight",
        "backbone.layer4.0.conv1.weight",
        "encoder.layers.0.norm1.weight",
    }
    assert changed & (frozen | trained) == trained
    assert any(key.startswith("decoder.layers.1.") for key in changed)


def test_the_plain_operator_computes_the_same_loss(models: ModuleType) -> None:
    config = replace(small(models.MODELS["deformable_detr"]), dropout=0.0)
    batch = models.make_batch(64, 96, num_images=1)
    steps = [models.our_step(config, batch, fused=fused) for fused in (True, False)]
    chosen = [
        {module.fused for module in step.network.modules() if isinstance(module, DeformableAttention)}
        for step in steps
    ]
    assert chosen == [{True}, {False}]
    torch.testing.assert_close(steps[0]().total, steps[1]().total)


def test_other_work_than_the_anchor_is_an_error(models: ModuleType) -> None:
    def side(parameters: int, queries: int, *terms: str) -> tuple[Any, Any]:
        loss = models.Loss(torch.zeros(()), queries, frozenset(terms))
        return SimpleNamespace(num_parameters=parameters), loss

    ours = side(100, 10, "loss_ce", "loss_ce_0")
    models.check_same_work("detr", ours, side(100, 10, "loss_ce", "loss_ce_0"))
    with_proposals = side(100, 10, "loss_ce", "loss_ce_enc", "loss_bbox_enc", "loss_giou_enc")
    models.check_same_work("deformable_detr_two_stage", with_proposals, side(100, 10, "loss_ce"))
    with pytest.raises(ValueError, match="loss_ce_enc"):
        models.check_same_work("deformable_detr", with_proposals, side(-116_835, 10, "loss_ce"))
    for anchor, message in (
        (side(90, 10, "loss_ce", "loss_ce_0"), "trains 10 parameters more"),
        (side(100, 20, "loss_ce", "loss_ce_0"), "10 queries, transformers 20"),
        (side(100, 10, "loss_ce"), r"other losses .*\['loss_ce_0'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            models.check_same_work("detr", ours, anchor)


def test_rows_of_a_gpu(
    bench: ModuleType, models: ModuleType, stand_in_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small models on the CPU; transformers' is played by ours, and what is compiled is not."""
    cuda = sys.modules["step_cuda"]
    for name, config in bench.MODELS.items():
        monkeypatch.setitem(bench.MODELS, name, small(config))
    for module in (bench, cuda):
        monkeypatch.setattr(module, "find_transformers", lambda: SimpleNamespace(__version__="5"))
    monkeypatch.setattr(cuda, "has_anchor", lambda config: config.architecture == "detr")
    monkeypatch.setattr(
        cuda, "anchor_step", lambda config, batch, autocast: models.our_step(config, batch, autocast=autocast)
    )
    monkeypatch.setattr(torch, "compile", lambda detector: detector)
    monkeypatch.setattr(bench, "COMPILED", ("detr",))
    monkeypatch.setattr(bench, "SIZES", {320: (32, 64)})
    monkeypatch.setattr(cuda, "SIDE", 64)
    monkeypatch.setattr(cuda, "WARM_UP", 1)
    options = ["--models", "detr", "deformable_detr", "--precisions", "bf16", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", ["bench_step", "--device", "cuda", *options])
    bench.main()
    assert [path.name for path in Path("build/bench").iterdir()] == ["step_gpu.json"]
    written = json.loads(Path("build/bench/step_gpu.json").read_text())
    assert written["left_out"] == []
    assert not [row for row in written["rows"] if "error" in row]
    assert [(row["case"], row.get("baseline")) for row in written["rows"]] == [
        ("detr", "transformers"),
        ("deformable_detr", None),
        ("deformable_detr, fused operator", "plain operator"),
        ("detr, compiled", "eager"),
    ]
    for row in written["rows"]:
        assert (row["size"], row["precision"], row["batch"]) == (320, "bf16", 2)
        assert row["images_per_second"] == pytest.approx(2 / (row["ours_ms"] / 1e3))
        assert ("ratio" in row) == ("baseline" in row)
        assert (row["kernels"], row["host_syncs"]) == (2, 1)  # the stand-in's
    assert all(row["peak_share"] > 0 for row in written["rows"][:2])
    assert written["rows"][3]["compile_s"] > 0


def test_the_loader_does_not_feed_a_gpu(
    bench: ModuleType,
    stand_in_gpu: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_step", "--device", "cuda", "--only", "loader"])
    with pytest.raises(SystemExit):
        bench.main()
    assert "--only loader: not on a GPU, where there are models, variants" in capsys.readouterr().err


def test_it_starts_where_only_torch_and_what_the_models_need_is_installed(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'platform'}{os.pathsep}{ROOT / 'models'}"}
    absent = (
        "ray",
        "mlflow",
        "pydantic",
        "webdataset",
        "hotcoco",
        "obstore",
        "rich",
        "typer",
        "transformers",
        "yaml",
    )
    code = (
        f"import sys, runpy; sys.modules.update(dict.fromkeys({absent!r})); "
        "sys.argv = ['bench_step', '--models', 'detr', '--sizes', '320', '--only', 'loader']; "
        f"sys.path.insert(0, {str(ROOT / 'benchmarks')!r}); "
        f"runpy.run_path({str(ROOT / 'benchmarks/bench_step.py')!r}, run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "left out: transformers is not installed" in done.stdout
    assert "left out: the loader: " in done.stdout
    assert json.loads((tmp_path / "build/bench/step.json").read_text())["rows"] == []
