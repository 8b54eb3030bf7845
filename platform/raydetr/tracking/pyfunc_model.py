"""Serve a checkpoint as MLflow's pyfunc model: image files in, boxes out. MLflow runs this file to load the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas  # type: ignore[import-untyped]
import torch
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel, PythonModelContext

from raydetr.inference.predict import detect
from raydetr.shards.images import decode_image
from raydetr.training.checkpoint import load_for_inference, read_description


class DetectorModel(PythonModel):
    """Detects objects. The artifact `checkpoint` is the folder of a checkpoint."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load the checkpoint, onto the GPU if there is one."""
        folder = Path(context.artifacts["checkpoint"])
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._detector = load_for_inference(folder, self._device)
        self._names = {category["id"]: category["name"] for category in read_description(folder).categories}

    def predict(
        self, context: PythonModelContext, model_input: pandas.DataFrame, params: dict[str, Any] | None = None
    ) -> pandas.DataFrame:
        """Return the detections of each image, one row per image, the best ones first.

        Args:
            context: not used.
            model_input: column `image` with the content of image files.
            params: `score_threshold`; detections with a lower score are left out.

        Returns:
            Columns `boxes` (x, y, width, height in pixels), `scores`, `category_ids`, `names`; a list in each cell.
        """
        threshold = (params or {}).get("score_threshold", 0.0)
        rows = []
        for content in model_input["image"]:
            found = detect(self._detector, decode_image(content), 0, self._device)
            kept = [
                each for each in found if each["score"] >= threshold and each["category_id"] in self._names
            ]
            kept.sort(key=lambda each: -each["score"])
            rows.append(
                {
                    "boxes": [each["bbox"] for each in kept],
                    "scores": [each["score"] for each in kept],
                    "category_ids": [each["category_id"] for each in kept],
                    "names": [self._names[each["category_id"]] for each in kept],
                }
            )
        return pandas.DataFrame(rows)


set_model(DetectorModel())
