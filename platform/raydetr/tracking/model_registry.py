"""Register the best checkpoint of a run as a model in MLflow's registry."""

from __future__ import annotations

import dataclasses
import tempfile
from importlib import metadata
from pathlib import Path

import mlflow
from mlflow import MlflowClient
from mlflow.entities import LoggedModelStatus
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
from mlflow.types.schema import Array

import detrs
import raydetr
from raydetr.store.folders import Folder
from raydetr.training import checkpoint

REGISTERED_TAG = "raydetr.registered"  # of a run, a logged model and a version: checksum of the checkpoint
# Libraries that the logged code imports; MLflow adds itself
REQUIREMENTS = (
    "torch", "numpy", "scipy", "pillow", "simplejpeg", "pydantic", "pydantic_core", "obstore", "pyyaml", "jaxtyping",
    "rich", "matplotlib", "pandas",
)  # fmt: skip
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
    tracked = client.get_run(run_id)
    if tracked.data.tags.get(REGISTERED_TAG) == crc:
        return
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    # A process that was killed, or a lost answer, may have left the model, or also its version, without the run's tag
    logged = client.search_logged_models([tracked.info.experiment_id], f"source_run_id = '{run_id}'")
    ready = [
        model.model_id
        for model in logged
        if model.tags.get(REGISTERED_TAG) == crc and model.status == LoggedModelStatus.READY
    ]
    model_id = ready[0] if ready else _log_model(best, run_id, crc)
    versions = client.search_model_versions(f"run_id = '{run_id}'")
    if not any(version.name == name and version.tags.get(REGISTERED_TAG) == crc for version in versions):
        mlflow.register_model(f"models:/{model_id}", name, tags={REGISTERED_TAG: crc})
    client.set_tag(run_id, REGISTERED_TAG, crc)


def _log_model(best: Folder, run_id: str, crc: str) -> str:
    """Log a checkpoint as a model of a run; return the id of the model."""
    with tempfile.TemporaryDirectory(prefix="raydetr-") as temporary:
        folder = Path(temporary) / "checkpoint"
        _write_weights(best, folder)
        # It sets the status of the run, which the caller of `register_best` sets afterwards
        with mlflow.start_run(run_id=run_id):
            info = mlflow.pyfunc.log_model(
                name="detector",
                python_model=str(Path(__file__).with_name("pyfunc_model.py")),
                artifacts={"checkpoint": str(folder)},
                code_paths=[str(Path(folder)) for module in (detrs, raydetr) for folder in module.__path__],
                signature=SIGNATURE,
                pip_requirements=[f"{package}=={_public_version(package)}" for package in REQUIREMENTS],
                tags={REGISTERED_TAG: crc},
            )
    return str(info.model_id)


def _public_version(package: str) -> str:
    """Return the version of a package in this environment, without its local part: PyPI has no torch 2.11.0+cpu."""
    return metadata.version(package).partition("+")[0]


def _write_weights(best: Folder, folder: Path) -> None:
    """Write a checkpoint that has the weights alone, those of the EMA if there is one."""
    weights = checkpoint.load_for_inference(best).model.detector.state_dict()
    meta = dataclasses.asdict(checkpoint.read_description(best))
    for name in ("state_bytes", "state_crc32", "format"):
        del meta[name]
    checkpoint.write(folder, {"model": weights, "ema": None}, meta)
