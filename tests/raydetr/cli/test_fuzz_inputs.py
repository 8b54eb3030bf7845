"""Faulty configuration files, search spaces, checkpoints and images: each is accepted, or refused in one sentence."""

from __future__ import annotations

import json
import re
import shutil
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from command_line import CommandLine
from detrs import zoo
from raydetr import recipes
from raydetr.config import ConfigError, flatten, override, to_dict, to_yaml
from raydetr.inference.predict import predict
from raydetr.shards.manifest import make_label_map
from raydetr.training import init_weights
from raydetr.training.checkpoint import CheckpointError, load_for_inference
from raydetr.tune.space import read_space
from small_checkpoint import CATEGORIES, write_checkpoint

# The first cases run always, the others with the slow tests
CASES = [range(30), pytest.param(range(30, 200), marks=pytest.mark.slow)]
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


@pytest.mark.parametrize("cases", CASES, ids=len)
def test_configuration_files(raydetr: CommandLine, tmp_path: Path, cases: range) -> None:
    original = to_yaml(recipes.quickstart()).encode()
    seen = Counter[str]()
    for number in cases:
        (tmp_path / "c.yaml").write_bytes(spoil(original, np.random.default_rng(number)))
        result = raydetr("config", "--config", tmp_path / "c.yaml")
        assert result.code == 0 or str(tmp_path / "c.yaml") in result.err, (number, result.err)
        seen["accepted" if result.code == 0 else "refused"] += 1
    assert seen["accepted"] >= 1
    assert seen["refused"] > len(cases) / 4


@pytest.mark.parametrize("cases", CASES, ids=len)
def test_overrides(raydetr: CommandLine, cases: range) -> None:
    """Of every setting of a recipe, and of settings that do not exist."""
    values = flatten(to_dict(recipes.quickstart()))
    paths = [
        *values,
        "optim",
        "data.remote.options",
        "model.num_quries",
        "",
        ".",
        "a..b",
    ]
    words = [
        *TOKENS,
        "1e-4",
        "x",
        "{a: .nan}",
        "[1, .inf]",
        "=",
        "",
        "!!binary x",
        "\ud800",
        "cosine",
        "s3://a/b",
    ]
    seen = Counter[str]()
    for number in cases:
        rng = np.random.default_rng(number)
        path, word = paths[rng.integers(len(paths))], words[rng.integers(len(words))]
        if number % 8 == 1 and values.get(path) is not None:  # its own value, which is valid
            word = json.dumps(values[path])
        argument = str(spoil(f"{path}={word}".encode(errors="replace"), rng), errors="replace")
        result = raydetr("config", "quickstart", f"{path}={word}" if number % 2 else argument)
        assert result.code == 0 or result.err.startswith(("error: ", "Usage: ")), (
            number,
            path,
            word,
            result.err,
        )
        assert len(result.err) < 12_000, (number, path, word)
        seen["accepted" if result.code == 0 else "refused"] += 1
    assert seen["accepted"] >= 3
    assert seen["refused"] > len(cases) / 4


@pytest.mark.parametrize("cases", CASES, ids=len)
def test_checkpoints_to_start_from(tmp_path: Path, cases: range) -> None:
    write_checkpoint(tmp_path / "healthy")
    here = make_label_map(CATEGORIES, "contiguous")
    config = override(
        recipes.quickstart(), {"model.num_classes": 3, "init.checkpoint": str(tmp_path / "checkpoint")}
    )
    detector = zoo.build(config.model).detector
    seen = Counter[str]()
    for number in cases:
        rng = np.random.default_rng(number)
        folder = tmp_path / "checkpoint"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "healthy", folder)
        chosen = folder / ("state.pt" if number % 3 == 0 else "meta.json")
        if number > 0:  # the first is healthy
            chosen.write_bytes(spoil(chosen.read_bytes(), rng))
        if number % 6 == 0:  # as if it had been written like this
            meta = json.loads((folder / "meta.json").read_text())
            content = chosen.read_bytes()
            meta |= {"state_bytes": len(content), "state_crc32": zlib.crc32(content)}
            (folder / "meta.json").write_text(json.dumps(meta))

        def use() -> None:
            init_weights.summarize(config, here)
            init_weights.load(detector, config, here)

        seen[count(use, ValueError)] += 1
    assert seen["accepted"] >= 1
    assert seen["refused"] > len(cases) / 4


ODD_STATES = {
    "list": [], "text": "x", "empty": {}, "no weights": {"model": None, "ema": None},
    "number": {"model": 3, "ema": None},
    "keys": {"model": {3: torch.zeros(2)}, "ema": None}, "values": {"model": {"a": 3}, "ema": None},
    "complex": {"model": {"a": torch.zeros(2, dtype=torch.complex64)}, "ema": None},
    "no device": {"model": {"a": torch.zeros(2, device="meta")}, "ema": None},
    "ema": {"model": {}, "ema": 3}, "object": {"model": Path("x"), "ema": None},
}  # fmt: skip


@pytest.mark.parametrize("kind", ODD_STATES)
def test_states_that_hold_something_else(kind: str, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint")
    torch.save(ODD_STATES[kind], folder / "state.pt")
    content = (folder / "state.pt").read_bytes()
    meta = json.loads((folder / "meta.json").read_text())
    meta |= {"state_bytes": len(content), "state_crc32": zlib.crc32(content)}
    (folder / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(CheckpointError, match=rf"^{folder}"):
        load_for_inference(folder)


def test_search_spaces(tmp_path: Path) -> None:
    seen, cases = Counter[str](), range(100)  # which take 2 s
    for number in cases:
        (tmp_path / "s.yaml").write_bytes(spoil(SPACE.encode(), np.random.default_rng(number)))
        seen[count(lambda: read_space(tmp_path / "s.yaml", recipes.quickstart()), ConfigError)] += 1
    assert seen["accepted"] >= 1
    assert seen["refused"] > len(cases) / 4


@pytest.mark.timeout(600)
@pytest.mark.parametrize("cases", CASES, ids=len)
def test_checkpoints_and_images(tmp_path: Path, cases: range) -> None:
    write_checkpoint(tmp_path / "healthy")
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.jpg")
    seen = Counter[str]()
    for number in cases:
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
    assert seen["refused"] > len(cases) / 4
