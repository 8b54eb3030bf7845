"""Faulty and odd checkpoint files: each is imported, or refused in one sentence that names it. No code in it is run."""

from __future__ import annotations

import argparse
import functools
import io
import json
import pickle
import re
import shutil
import tarfile
import warnings
import zipfile
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import goldens
from command_line import CommandLine
from raydetr.training import import_checkpoint
from raydetr.training.checkpoint import load_for_inference

NUM_DAMAGED = 50  # of each of three kinds
MAX_MESSAGE = 1500  # characters
HEAD = "class_embed.weight"
# Words of a pickle: a number that begins a size, opcodes, names of code
WORDS = [
    b"\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f", b"J\xff\xff\xff\x7f", b"K\x00", b"R", b"b", b"s", b".", b"N",
    b"Q", b"\x95", b"(", b"]", b"}", b"\x85", b"X\xff\xff\xff\x7f", b"U\x10", b"cposix\nsystem\n",
    b"cbuiltins\neval\n", b"ctorch\nload\n", b"ctorch\nQInt8Storage\n",
]  # fmt: skip


class Custom:
    """A class of a training script."""


class Attack:
    """Runs code when it is unpickled."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.reduced = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.reduced


def official() -> dict[Any, Any]:
    """Return DETR's official state dict without its memory: every tensor is one expanded number."""
    shapes = goldens.read("full_detr").manifest["state_dict"]
    return {name: torch.zeros(()).expand(shape) for name, (shape, _) in shapes.items()}


def few() -> dict[Any, Any]:
    """Return a few of them, by which it is still recognized: what is read, and not what is missing, matters."""
    weights = official()
    names = [HEAD, "transformer.decoder.layers.0.multihead_attn.in_proj_weight", *list(weights)[:4]]
    return {name: weights[name] for name in names}


def saved(content: object, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def saved_before_torch_1_6(content: object) -> bytes:
    return saved(content, _use_new_zipfile_serialization=False)


def with_pickle(content: bytes, change: Callable[[bytes], bytes]) -> bytes:
    """Return a checkpoint whose pickle is changed, and whose checksums are valid."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as before, zipfile.ZipFile(buffer, "w") as after:
        for entry in before.infolist():
            data = before.read(entry)
            after.writestr(entry.filename, change(data) if entry.filename.endswith("data.pkl") else data)
    return buffer.getvalue()


def damage(content: bytes, rng: np.random.Generator) -> bytes:
    """Cut bytes off, insert, overwrite, or put a word of a pickle in place of others."""
    at = int(rng.integers(len(content)))
    size = int(rng.integers(1, 9))
    match rng.integers(5):
        case 0:
            return content[:at]
        case 1:
            return content[:at] + rng.bytes(size) + content[at:]
        case 2:
            return content[:at] + content[at + size :]
        case 3:
            return content[:at] + rng.bytes(size) + content[at + size :]
        case _:
            word = WORDS[rng.integers(len(WORDS))]
            return content[:at] + word + content[at + len(word) :]


def damaged_files(numbers: range) -> Iterator[tuple[str, bytes]]:
    """Yield damaged files of both formats, and files whose pickle alone is damaged."""
    content = {"model": few(), "args": argparse.Namespace(lr=1e-4, path=Path("x")), "epoch": np.int64(3)}
    new, old = saved(content), saved_before_torch_1_6(content)
    for number in numbers:
        rng = np.random.default_rng(number)
        yield f"zip {number}", damage(new, rng)
        yield f"old format {number}", damage(old, rng)
        yield f"pickle {number}", with_pickle(new, functools.partial(damage, rng=rng))


def values() -> dict[str, object]:
    """Return what a file can hold in place of the weight of the class head, [92, 256]."""
    zeros, shape = torch.zeros(92, 256), (92, 256)
    indices = torch.tensor([[0], [0]])
    with warnings.catch_warnings(action="ignore"):  # about types that are not finished
        nested = torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])
        sparse = torch.sparse_coo_tensor(indices, torch.ones(1), shape)
        compressed = zeros.to_sparse_csr()
        quantized = torch.quantize_per_tensor(zeros, 0.1, 0, torch.qint8)
    return {
        "nan": torch.full(shape, torch.nan),
        "infinity in bfloat16": torch.full(shape, -torch.inf, dtype=torch.bfloat16),
        "no dimension": torch.zeros(()),
        "no rows": torch.zeros(0, 256),
        "one row": torch.zeros(1, 256),
        "one dimension": torch.zeros(92),
        "many dimensions": torch.zeros([1] * 20),
        "transposed": torch.zeros(256, 92),
        "huge": torch.zeros(()).expand(2**40, 256),
        "large": torch.zeros(()).expand(2**25, 256),
        "complex": zeros.to(torch.complex64),
        "booleans": zeros.to(torch.bool),
        "integers": zeros.to(torch.int8),
        "float8": zeros.to(torch.float8_e4m3fn),
        "float16": zeros.half(),
        "float64": zeros.double(),
        "quantized": quantized,
        "sparse": sparse,
        "compressed": compressed,
        "on no device": torch.zeros(shape, device="meta"),
        "nested": nested,
        "parameter": torch.nn.Parameter(zeros),
        "view": torch.zeros(100, 300)[4:96, 20:276],
        "array": np.zeros(shape),
        "list": zeros.tolist()[:2],
        "text": "weights",
        "nothing": None,
        "storage": zeros.untyped_storage(),
        "dictionary": {"weight": zeros},
        "object": Custom(),
    }  # fmt: skip


def keys() -> list[object]:
    return [
        5,
        None,
        b"weight",
        ("a", "b"),
        "",
        "\n",
        "\x1b[31mred",
        "x" * 100_000,
        "\ud800",
        "module." + HEAD,
        1.5,
        True,
    ]


def contents(weights: dict[Any, Any]) -> Iterator[tuple[str, object]]:
    """Yield other checkpoints that are complete files."""
    for kind, value in values().items():
        yield f"value: {kind}", {"model": weights | {HEAD: value}}
        if kind in ("float8", "text"):
            yield f"averaged value: {kind}", {"model": weights, "ema_model": weights | {HEAD: value}}
    for key in keys():
        yield f"key: {key!r:.20}", {"model": weights | {key: torch.zeros(3)}}
    prefixed = {prefix: {prefix + name: value for name, value in weights.items()}
                for prefix in ("module.", "model.", "module.model.", "_orig_mod.", "detr.")}  # fmt: skip
    for prefix, state in prefixed.items():
        yield f"prefix {prefix}", {"model": state}
    yield "lightning", {"state_dict": prefixed["model."], "hyper_parameters": {"lr": 1e-4}}
    yield "ordered", {"model": OrderedDict(weights)}
    yield "state dict alone", weights
    yield "in a list", [weights]
    yield "in a list under model", {"model": [weights]}
    yield "items", {"model": list(weights.items())}
    yield "one level too deep", {"model": {"model": weights}}
    deep: list[Any] = []
    for _ in range(200):
        deep = [deep]
    yield "deep", {"model": weights, "args": deep}
    yield "empty state dict", {"model": {}}
    yield "no weights", {"epoch": 3}
    yield "optimizer alone", {"optimizer": {"state": {0: {"step": torch.zeros(())}}}}
    for kind, value in (("number", 3), ("text", "x"), ("nothing", None), ("tensor", torch.zeros(3))):
        yield f"{kind} alone", value
        yield f"{kind} under model", {"model": value}
        yield f"{kind} under ema_model", {"model": weights, "ema_model": value}
    recursive: dict[str, Any] = {"model": weights}
    recursive["self"] = recursive
    yield "contains itself", recursive
    for kind, other in (
        ("script", Custom()), ("paths", [Path("x"), Path("y")]), ("generator", np.random.default_rng(0)),
        ("array", np.zeros(3)), ("default", defaultdict(list, a=[1])), ("counter", Counter("abc")), ("slice", slice(3)),
        ("function", json.dumps), ("type", Custom), ("set", {1, 2}), ("frozen", frozenset({1})), ("bytes", b"a"),
        ("big", 2**100), ("complex", 1j), ("module", torch.nn.Linear(2, 2)), ("device", torch.device("cuda")),
    ):  # fmt: skip
        yield f"{kind} beside", {"model": weights, "args": other}
        yield f"{kind} in place", {"model": other}


def attacks(made: Path) -> Iterator[tuple[str, bytes]]:
    """Yield files that would make the folder `made` if their code was run."""
    weights = few()
    command = f"import os; os.mkdir({str(made)!r})"
    for function, *arguments in (
        (exec, command), (eval, f"__import__('os').mkdir({str(made)!r})"), (Path.mkdir, made),
        (shutil.copytree, "/etc", made), (getattr, made, "mkdir"), (torch.hub.load_state_dict_from_url, "http://127.0.0.1:9/x"),
    ):  # fmt: skip
        attack = Attack(function, *arguments)
        for kind, content in (("beside", {"model": weights, "args": attack}), ("in place", {"model": attack}),
                              ("as weight", {"model": weights | {HEAD: attack}}), ("alone", attack)):  # fmt: skip
            yield f"{function.__name__} {kind}", saved(content)
            yield f"{function.__name__} {kind}, old format", saved_before_torch_1_6(content)
        for protocol in range(6):
            yield f"{function.__name__}, pickle protocol {protocol}", pickle.dumps(attack, protocol)


def other_files(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Yield files that are no checkpoints."""
    yield "empty", b""
    yield "one byte", b"P"
    yield "zeros", bytes(5000)
    yield "text", b"<html>404: not found</html>"
    yield "pointer of git lfs", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 166618694\n"
    yield "json", json.dumps({"model": {"weight": [1.0]}}).encode()
    header = json.dumps({"weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    yield "safetensors", len(header).to_bytes(8, "little") + header + bytes(4)
    yield "safetensors with a huge header", (2**60).to_bytes(8, "little") + header
    for protocol in range(6):
        yield f"pickle, protocol {protocol}", pickle.dumps({"model": {"weight": np.zeros(3)}}, protocol)
        yield f"protocol {protocol}", saved({"model": few()}, pickle_protocol=protocol)
    for kind, names in (
        ("no pickle", ["archive/version"]),
        ("another pickle", ["data.pkl"]),
        ("nothing", []),
    ):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as file:
            for name in names:
                file.writestr(name, b"3")
        yield f"zip with {kind}", buffer.getvalue()
    buffer = io.BytesIO()
    np.savez(buffer, weight=np.zeros(3))
    yield "npz", buffer.getvalue()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            tar.addfile(tarfile.TarInfo(name))
    yield "tar", buffer.getvalue()
    with warnings.catch_warnings(action="ignore"):
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(folder / "script.pt"))
    yield "torchscript", (folder / "script.pt").read_bytes()


class Importer:
    """Imports a file with the command, and verifies how that ends."""

    def __init__(self, raydetr: CommandLine, folder: Path) -> None:
        self._raydetr, self._folder = raydetr, folder
        self.ends = Counter[str]()
        self.num_read = 0

    def __call__(self, name: str, content: bytes, *options: str, is_loaded: bool = False) -> None:
        file, out = self._folder / "official.pth", self._folder / "out"
        file.write_bytes(content)
        shutil.rmtree(out, ignore_errors=True)
        try:
            result = self._raydetr("import-checkpoint", file, "--model", "detr_r50", "--out", out, *options)
            if result.code == 0 and is_loaded:
                load_for_inference(out)
        except BaseException as error:
            error.add_note(name)
            raise
        self.ends["imported" if result.code == 0 else "refused"] += 1
        self.num_read += result.code == 0 or "a checkpoint of detr" in result.err
        if result.code == 0:
            return
        assert not out.exists(), name
        assert result.err.startswith(f"error: {file}: "), (name, result.err[:500])
        assert result.err.isprintable(), (name, result.err[:500])
        assert len(result.err) < MAX_MESSAGE, (name, len(result.err))
        # An address differs from run to run
        assert not re.search("0x[0-9a-f]{6}|Traceback", result.err), (name, result.err)


@pytest.fixture
def run_import(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Importer:
    # Building the model takes most of the time of an import
    monkeypatch.setattr(import_checkpoint, "_meta_state", functools.cache(import_checkpoint._meta_state))
    return Importer(CommandLine(monkeypatch, capsys), tmp_path)


def test_damaged_files(run_import: Importer) -> None:
    for name, content in damaged_files(range(NUM_DAMAGED)):
        run_import(name, content)
    assert run_import.ends == {"refused": 3 * NUM_DAMAGED}  # where it is read, tensors are missing
    assert run_import.num_read >= 5


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_more_damaged_files(run_import: Importer) -> None:
    for name, content in damaged_files(range(1000, 1500)):
        run_import(name, content)


def test_other_contents(run_import: Importer) -> None:
    for name, content in contents(few()):
        run_import(name, saved(content))
    assert run_import.num_read >= 30
    assert run_import.ends["refused"] >= 60


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_what_is_imported_is_loaded(run_import: Importer) -> None:
    for name, content in contents(official()):
        run_import(name, saved(content), is_loaded=True)
        run_import(f"{name}, old format", saved_before_torch_1_6(content), is_loaded=True)
        run_import(f"{name}, averaged", saved({"model": official(), "ema_model": content}), "--ema")
    assert run_import.ends["imported"] >= 40


def test_other_files(run_import: Importer, tmp_path: Path) -> None:
    for name, content in other_files(tmp_path):
        run_import(name, content)
    assert run_import.ends["refused"] >= 25


def test_no_code_is_run(run_import: Importer, tmp_path: Path) -> None:
    for name, content in attacks(tmp_path / "made"):
        run_import(name, content)
        assert not (tmp_path / "made").exists(), name
    assert run_import.ends["refused"] > 60


def test_the_format_before_torch_1_6_is_read(tmp_path: Path) -> None:
    """Official files of 2020 have it."""
    content = {"model": official(), "args": argparse.Namespace(path=Path("x")), "epoch": np.int64(3)}
    (tmp_path / "official.pth").write_bytes(saved_before_torch_1_6(content))
    found = import_checkpoint.import_checkpoint(tmp_path / "official.pth", "detr_r50", tmp_path / "out")
    assert found.num_classes == 91
    (note,) = found.notes
    assert "argparse.Namespace" in note
    assert "pathlib.PosixPath" in note
    assert "torch" not in note  # tensors are loaded


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("integers", r"integers in place of fractions: 1 \(class_embed.weight\)"),
        ("complex", "class_embed.weight is no plain tensor of numbers .*complex64"),
        ("huge", "values are more than any of these models has"),
        ("object", r"'class_embed.weight' is Custom$"),
        ("no dimension", r"other shape 1 \(class_embed.weight\)"),
    ],
)
def test_odd_weights_are_named(kind: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "official.pth").write_bytes(saved({"model": official() | {HEAD: values()[kind]}}))
    with pytest.raises(ValueError, match=message):
        import_checkpoint.import_checkpoint(tmp_path / "official.pth", "detr_r50", tmp_path / "out")
