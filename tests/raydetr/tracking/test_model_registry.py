"""The best checkpoint of a run is a model in MLflow's registry, which runs where nothing else of the project is."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from PIL import Image

from raydetr.config import RunConfig, override
from raydetr.inference.predict import detect
from raydetr.runs import run
from raydetr.tracking.upload_state import STATE
from raydetr.tracking.uploader import Uploader
from raydetr.training.checkpoint import find, load_for_inference

# The second one is of a class of its own, when it is imported
pytestmark = pytest.mark.filterwarnings(
    "ignore:The ``noload``:DeprecationWarning", "ignore:.*Any type hint is inferred:UserWarning"
)

CALL = """
import json, sys
import mlflow, pandas
mlflow.set_tracking_uri(sys.argv[1])
mlflow.set_registry_uri(sys.argv[1])
model = mlflow.pyfunc.load_model("models:/quickstart/1")
image = open(sys.argv[2], "rb").read()
found = model.predict(pandas.DataFrame({"image": [image, image]}), params={"score_threshold": 0.02})
import raydetr
print(json.dumps([raydetr.__file__, found.to_dict("records")]))
"""


def test_the_best_checkpoint_is_called_in_a_clean_process(tiny_run: RunConfig, tmp_path: Path) -> None:
    config = override(tiny_run, {"tracking.upload": True, "tracking.register_model": True, "optim.epochs": 2})
    result = run.start(config, local=True)
    assert result.pending_upload is None
    image = tmp_path / "image.png"
    Image.effect_noise((80, 64), 90).convert("RGB").save(image)
    (tmp_path / "empty").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", CALL, result.tracking_uri, str(image)],
        capture_output=True, text=True, timeout=300, check=True, cwd=tmp_path / "empty",
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path / "empty")},
    )  # fmt: skip
    file, (first, second) = json.loads(done.stdout.splitlines()[-1])
    assert "mlflow-artifacts" in file  # its own code, not that of this checkout
    assert first == second
    best = load_for_inference(find(result.folder))
    expected = detect(best, Image.open(io.BytesIO(image.read_bytes())).convert("RGB"), 0, torch.device("cpu"))
    expected = sorted((each for each in expected if each["score"] >= 0.02), key=lambda each: -each["score"])
    assert first["scores"] == pytest.approx([each["score"] for each in expected], rel=1e-5)
    assert np.allclose(first["boxes"], [each["bbox"] for each in expected], atol=1e-3)
    assert len(first["names"]) == len(expected) > 0

    client = MlflowClient(result.tracking_uri)
    (version,) = client.search_model_versions("name = 'quickstart'")
    assert version.run_id == result.mlflow_run_id
    (result.folder / STATE).unlink()
    Uploader(result.folder).sync()
    assert len(client.search_model_versions("name = 'quickstart'")) == 1
    tracked = client.get_run(result.mlflow_run_id)
    assert tracked.info.status == "FINISHED"
