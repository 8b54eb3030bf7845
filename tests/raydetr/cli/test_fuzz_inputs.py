"""Faulty configuration files, search spaces, checkpoints and images: each is accepted, or refused in one sentence."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from command_line import CommandLine
from raydetr import recipes
from raydetr.config import ConfigError, to_yaml
from raydetr.inference.predict import predict
from raydetr.tune.space import read_space
from small_checkpoint import write_checkpoint

NUM_CASES = 150  # of each kind
TOKENS = [
    "NaN", ".inf", "1e999", "-1", "0", "0.5", "true", "null", '"x"', "[]", "{}", "[[[[", "&a [*a]",
    "!!python/object:os.system", "9" * 20, "9" * 400, "9" * 5000, "\x07", "\u2028", "'", "[" * 5000,
    "2026-01-01", "0x1F", "~", "<<: {a: 1}",
]  # fmt: skip
SPACE = """\
optim.lr: {loguniform: [1.0e-4, 1.0e-2]}
model.num_queries: {randint: [10, 50]}
optim.schedule: {choice: [step, cosine]}
"""


def spoil(content: bytes, rng: np.random.Generator) -> bytes:
    """Replace a word, repeat a line, or corrupt bytes."""
    start = int(rng.integers(max(len(content), 1)))
    match rng.integers(5):
        case 0:
            return content[:start]
        case 1:
            return content[:start] + rng.bytes(8) + content[start:]
        case 2:
            lines = content.splitlines(keepends=True)
            at = int(rng.integers(len(lines)))
            return b"".join([*lines[:at], lines[at], *lines[at:]])
        case _:
            places = list(re.finditer(rb"[\w.+-]+", content))
            place = places[rng.integers(len(places))]
            token = TOKENS[rng.integers(len(TOKENS))].encode()
            return content[: place.start()] + token + content[place.end() :]


def count(use: Callable[[], object], errors: type[Exception] | tuple[type[Exception], ...]) -> str:
    """Return whether the input is accepted; nothing but `errors`, raised by this project, may end it."""
    try:
        use()
    except errors as error:
        message = str(error)
    else:
        return "accepted"
    assert not re.search("0x[0-9a-f]{9}", message)  # an address differs from run to run
    return "refused"


@pytest.fixture
def raydetr(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    return CommandLine(monkeypatch, capsys)


def test_configuration_files(raydetr: CommandLine, tmp_path: Path) -> None:
    original = to_yaml(recipes.quickstart()).encode()
    seen = Counter[str]()
    for number in range(NUM_CASES):
        (tmp_path / "c.yaml").write_bytes(spoil(original, np.random.default_rng(number)))
        result = raydetr("config", "--config", tmp_path / "c.yaml")
        assert result.code == 0 or str(tmp_path / "c.yaml") in result.err, (number, result.err)
        seen["accepted" if result.code == 0 else "refused"] += 1
    assert seen["accepted"] >= 1
    assert seen["refused"] > NUM_CASES / 4


def test_search_spaces(tmp_path: Path) -> None:
    seen = Counter[str]()
    for number in range(NUM_CASES):
        (tmp_path / "s.yaml").write_bytes(spoil(SPACE.encode(), np.random.default_rng(number)))
        seen[count(lambda: read_space(tmp_path / "s.yaml", recipes.quickstart()), ConfigError)] += 1
    assert seen["accepted"] >= 1
    assert seen["refused"] > NUM_CASES / 4


def test_checkpoints_and_images(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "healthy")
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.jpg")
    seen = Counter[str]()
    for number in range(NUM_CASES):
        rng = np.random.default_rng(number)
        folder = tmp_path / "checkpoint"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "healthy", folder)
        shutil.copy(tmp_path / "a.jpg", tmp_path / "b.jpg")
        files = [folder / "meta.json"] * 3 + [folder / "state.pt", tmp_path / "b.jpg"]
        chosen = files[rng.integers(len(files))]
        chosen.write_bytes(spoil(chosen.read_bytes(), rng))
        shutil.rmtree(tmp_path / "out", ignore_errors=True)

        def use(folder: Path = folder) -> None:
            images = [tmp_path / "a.jpg", tmp_path / "b.jpg"]
            predicted = predict(folder, images, tmp_path / "out", device="cpu")
            assert all(str(tmp_path / "b.jpg") in line for line in predicted.failed)

        seen[count(use, ValueError)] += 1
    assert seen["accepted"] >= 1
    assert seen["refused"] > NUM_CASES / 4
