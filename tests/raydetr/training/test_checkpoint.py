"""Checkpoints that this program must not, or cannot, read."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from raydetr.training import checkpoint
from raydetr.training.checkpoint import CheckpointError
from small_checkpoint import write_checkpoint


def describe(folder: Path, **changed: object) -> None:
    """Change the description of a checkpoint, which has the size and the checksum of its state."""
    content = (folder / "state.pt").read_bytes()
    meta = json.loads((folder / "meta.json").read_text())
    meta |= {"state_bytes": len(content), "state_crc32": zlib.crc32(content), **changed}
    (folder / "meta.json").write_text(json.dumps(meta))


class Attack:
    """Runs code when it is unpickled."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.reduced = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.reduced


def test_code_in_a_state_is_not_run(tmp_path: Path) -> None:
    """Size and checksum are no protection: who can change the state can change its description."""
    folder = write_checkpoint(tmp_path / "checkpoint")
    assert checkpoint.load_for_inference(folder)
    state = torch.load(folder / "state.pt", weights_only=True)
    torch.save({**state, "skipped_steps": Attack(os.mkdir, str(tmp_path / "made"))}, folder / "state.pt")
    describe(folder)
    checkpoint.read_meta(folder)  # complete, and as it was written
    with pytest.raises(CheckpointError, match=r"checkpoint/state\.pt: not the state of a checkpoint \("):
        checkpoint.load_for_inference(folder)
    assert not (tmp_path / "made").exists()


def test_a_checkpoint_of_another_format_is_refused(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    older, newer = (write_checkpoint(checkpoint.folder_of(run, position)) for position in (16, 24))
    describe(newer, format=99)
    message = f"{newer}: checkpoint format 99; this version reads format {checkpoint.FORMAT}"
    for read in (checkpoint.read_description, checkpoint.read_meta, checkpoint.load_for_inference):
        with pytest.raises(CheckpointError) as caught:
            read(newer)
        assert str(caught.value) == message
    skipped: list[str] = []
    assert checkpoint.newest_valid(run, skipped.append) == older
    assert skipped == [message]
