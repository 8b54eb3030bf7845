"""Register the best checkpoint of a run as a model in MLflow's registry."""

from __future__ import annotations

import dataclasses
import tempfile
from importlib import metadata
from pathlib import Path

import mlflow
from mlflow import MlflowClient
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
from mlflow.types.schema import Array

import detrs
import raydetr
from raydetr.store.folders import Folder
from raydetr.training import checkpoint

REGISTERED_TAG = "raydetr.registered"  # checksum of the checkpoint
# Libraries that the model imports, in the versions of this environment
REQUIREMENTS = ("torch", "numpy", "scipy", "pillow", "pydantic", "obstore", "pyyaml", "jaxtyping", "pandas")
SIGNATURE = ModelSignature(
    inputs=Schema([ColSpec(DataType.binary, "image")]),
    outputs=Schema(
        [
            ColSpec(Array(Array(DataType.double)), "boxes"),
            ColSpec(Array(DataType.double), "scores"),
            ColSpec(Array(DataType.long), "category_ids"),
            ColSpec(Array(DataType.string), "names"),
        ]
    ),
    params=ParamSchema([ParamSpec("score_threshold", DataType.double, 0.0)]),
)


def register_best(client: MlflowClient, uri: str, run: Folder, run_id: str, name: str) -> None:
    """Log the best checkpoint of a run as a model, and register it, unless that was done.

    Args:
        client: of the tracking URI.
        uri: the tracking URI, which is also that of the registry.
        run: folder of the run.
        run_id: of its MLflow run.
        name: of the registered model, of which this becomes a version.

    Raises:
        OSError, CheckpointError: the checkpoint cannot be read.
        MlflowException: MLflow cannot be reached, or refuses.
    """
    best = checkpoint.best(run)
    if best is None:
        return
    crc = str(checkpoint.read_description(best).state_crc32)
    if client.get_run(run_id).data.tags.get(REGISTERED_TAG) == crc:
        return
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    with tempfile.TemporaryDirectory(prefix="raydetr-") as temporary:
        folder = Path(temporary) / "checkpoint"
        _write_weights(best, folder)
        # It sets the status of the run, which the caller sets afterwards
        with mlflow.start_run(run_id=run_id):
            mlflow.pyfunc.log_model(
                name="detector",
                python_model=str(Path(__file__).with_name("pyfunc_model.py")),
                artifacts={"checkpoint": str(folder)},
                code_paths=[str(Path(folder)) for module in (detrs, raydetr) for folder in module.__path__],
                signature=SIGNATURE,
                pip_requirements=[f"{package}=={metadata.version(package)}" for package in REQUIREMENTS],
                registered_model_name=name,
            )
    client.set_tag(run_id, REGISTERED_TAG, crc)


def _write_weights(best: Folder, folder: Path) -> None:
    """Write a checkpoint that has the weights alone, those of the EMA if there is one."""
    weights = checkpoint.load_for_inference(best).model.detector.state_dict()
    meta = dataclasses.asdict(checkpoint.read_description(best))
    for name in ("state_bytes", "state_crc32", "format"):
        del meta[name]
    checkpoint.write(folder, {"model": weights, "ema": None}, meta)
