"""A checkpoint folder of a small untrained model."""

from __future__ import annotations

import dataclasses
import json
import zlib
from pathlib import Path

import torch

from detrs import zoo
from detrs.zoo import ModelConfig
from raydetr.config import to_dict
from raydetr.recipes import quickstart

CATEGORIES = [{"id": 3, "name": "disc"}, {"id": 7, "name": "ring"}, {"id": 9, "name": "square"}]


def write_checkpoint(folder: Path, label_map: str = "contiguous", model: ModelConfig | None = None) -> Path:
    """Write a checkpoint of a small untrained model; default: that of the quickstart."""
    config = quickstart()
    config = config if model is None else config.model_copy(update={"model": model})
    num_classes = 3 if label_map == "contiguous" else 10
    model = dataclasses.replace(config.model, num_classes=num_classes)
    data = config.data.model_copy(update={"label_map": label_map})
    config = config.model_copy(update={"model": model, "data": data})
    torch.manual_seed(0)
    weights = zoo.build(model).detector.state_dict()
    folder.mkdir()
    torch.save({"model": weights, "ema": None}, folder / "state.pt")
    content = (folder / "state.pt").read_bytes()
    meta = {
        "config": to_dict(config),
        "categories": CATEGORIES,
        "fingerprint": "f",
        "epoch": 1,
        "position": 16,
        "state_bytes": len(content),
        "state_crc32": zlib.crc32(content),
        "format": 2,
    }
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder
