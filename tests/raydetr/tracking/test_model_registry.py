"""The best checkpoint of a run is a model in MLflow's registry, which runs where nothing else of the project is."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image

from raydetr.config import RunConfig, override
from raydetr.inference.predict import detect
from raydetr.runs import run
from raydetr.tracking.model_registry import REGISTERED_TAG, SIGNATURE
from raydetr.tracking.upload_state import STATE
from raydetr.tracking.uploader import Uploader
from raydetr.training.checkpoint import find, load_for_inference

# The second one is of a class of its own, when it is imported
pytestmark = pytest.mark.filterwarnings(
    "ignore:The ``noload``:DeprecationWarning", "ignore:.*Any type hint is inferred:UserWarning"
)

# It prints where the code came from, what that code imports, the signature, and the detections
CALL = """
import builtins, json, sys
import mlflow, pandas
imported, original = set(), builtins.__import__
def record(name, globals=None, locals=None, fromlist=(), level=0):
    if level == 0 and "mlflow-artifacts" in ((globals or {}).get("__file__") or ""):
        imported.add(name.split(".")[0])
    return original(name, globals, locals, fromlist, level)
builtins.__import__ = record
mlflow.set_tracking_uri(sys.argv[1])
mlflow.set_registry_uri(sys.argv[1])
model = mlflow.pyfunc.load_model("models:/quickstart/1")
image = open(sys.argv[2], "rb").read()
found = model.predict(pandas.DataFrame({"image": [image, image]}), params={"score_threshold": 0.02})
import raydetr
signature = model.metadata.signature.to_dict()
print(json.dumps([raydetr.__file__, sorted(imported), signature, found.to_dict("records")]))
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
    file, imported, signature, (first, second) = json.loads(done.stdout.splitlines()[-1])
    assert "mlflow-artifacts" in file  # its own code, not that of this checkout
    assert first == second
    best = load_for_inference(find(result.folder))
    expected = detect(best, Image.open(io.BytesIO(image.read_bytes())).convert("RGB"), 0, torch.device("cpu"))
    expected = sorted((each for each in expected if each["score"] >= 0.02), key=lambda each: -each["score"])
    assert first["scores"] == pytest.approx([each["score"] for each in expected], rel=1e-5)
    assert np.allclose(first["boxes"], [each["bbox"] for each in expected], atol=1e-3)
    assert len(first["names"]) == len(expected) > 0
    assert signature == SIGNATURE.to_dict()
    (column,) = json.loads(signature["inputs"])
    assert (column["name"], column["type"]) == ("image", "binary")
    (requirements,) = Path(config.storage.path).glob("mlflow-artifacts/**/requirements.txt")
    check_requirements(requirements.read_text().splitlines(), imported)

    client = MlflowClient(result.tracking_uri)
    (version,) = client.search_model_versions("name = 'quickstart'")
    assert version.run_id == result.mlflow_run_id
    tracked = client.get_run(result.mlflow_run_id)
    # A process that is killed has logged the model, and may have made the version, but has not set the tag
    for lacks_tag, lacks_version in ((False, False), (True, False), (True, True)):
        if lacks_tag:
            client.delete_tag(tracked.info.run_id, REGISTERED_TAG)
        if lacks_version:
            client.delete_model_version("quickstart", version.version)
        (result.folder / STATE).unlink()
        Uploader(result.folder).sync()
        (version,) = client.search_model_versions("name = 'quickstart'")
        assert version.run_id == result.mlflow_run_id
        assert len(client.search_logged_models([tracked.info.experiment_id])) == 1
        tracked = client.get_run(tracked.info.run_id)
        assert tracked.info.status == "FINISHED"
        assert tracked.data.tags[REGISTERED_TAG] == version.tags[REGISTERED_TAG]


def check_requirements(lines: list[str], imported: list[str]) -> None:
    """Check that an environment with only these requirements has all imported modules."""
    requirements = {canonicalize_name(Requirement(line).name) for line in lines}
    # PyPI has no versions with a local part, such as 2.11.0+cpu
    assert [line for line in lines if "+" in line] == []
    distributions = packages_distributions()
    others = set(imported) - sys.stdlib_module_names - {"raydetr", "detrs"}
    assert {"torch", "PIL", "simplejpeg", "rich"} <= others
    missing = [
        module
        for module in sorted(others)
        if not any(canonicalize_name(name) in requirements for name in distributions[module])
    ]
    assert missing == []
