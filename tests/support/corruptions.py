"""Corrupt a folder of shards at random, as disks, networks, programs and people do.

Each function takes the folder (a copy) and a generator, and changes something in place. Those named
`wrongly_written_...` also adapt crc, index and manifest to the corruption, as a buggy writer would.
"""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from raydetr.shards.manifest import Samples, data_fingerprint
from raydetr.shards.validation import parse_manifest

Corruption = Callable[[Path, np.random.Generator], object]
JUNK: list[Any] = [
    None, True, -1, 0, 3, 2**31, 2**64, 10**30, 0.5, float("nan"), "", "x", "../index.npz", "shard-00001.tar",
    "\ud800", [], [[]], ["x"], {}, {"x": 1},
]  # fmt: skip


def files(folder: Path, pattern: str = "*") -> list[Path]:
    return sorted(folder.glob(pattern))


def pick(rng: np.random.Generator, choices: list[Any]) -> Any:
    return choices[rng.integers(len(choices))]


def samples_of(folder: Path) -> Samples:
    with np.load(folder / "index.npz") as arrays:
        samples: Samples = arrays["samples"]
    return samples


# --- any file


def flip_bits(folder: Path, rng: np.random.Generator, pattern: str = "*") -> None:
    path = pick(rng, files(folder, pattern))
    content = np.frombuffer(path.read_bytes(), np.uint8).copy()
    for _ in range(pick(rng, [1, 1, 2, 8, 64])):
        content[rng.integers(len(content))] ^= 1 << rng.integers(8)
    path.write_bytes(content.tobytes())


def flip_bits_in_a_shard(folder: Path, rng: np.random.Generator) -> None:
    flip_bits(folder, rng, "*.tar")


def flip_bits_in_the_index(folder: Path, rng: np.random.Generator) -> None:
    flip_bits(folder, rng, "index.npz")


def flip_bits_in_the_manifest(folder: Path, rng: np.random.Generator) -> None:
    flip_bits(folder, rng, "manifest.json")


def truncate(folder: Path, rng: np.random.Generator) -> None:
    path = pick(rng, files(folder))
    content = path.read_bytes()
    end = int(rng.integers(len(content)))
    if rng.random() < 0.3:
        end -= end % 512  # where a tar looks complete
    path.write_bytes(content[:end])


def append(folder: Path, rng: np.random.Generator) -> None:
    path = pick(rng, files(folder))
    number = pick(rng, [1, 100, 512, 10240])
    path.write_bytes(path.read_bytes() + pick(rng, [bytes(number), rng.bytes(number)]))


def overwrite_a_range(folder: Path, rng: np.random.Generator) -> None:
    """Overwrite bytes like a disk that loses a block, or returns another one."""
    path = pick(rng, files(folder))
    content = bytearray(path.read_bytes())
    length = int(rng.integers(1, min(len(content), 4096) + 1))
    at, other = rng.integers(len(content) - length + 1, size=2).tolist()
    kinds = [bytes(length), rng.bytes(length), bytes(content[other : other + length])]
    content[at : at + length] = pick(rng, kinds)
    path.write_bytes(content)


def lose_a_file(folder: Path, rng: np.random.Generator) -> None:
    path = pick(rng, files(folder))
    path.unlink()
    if rng.random() < 0.3:
        path.mkdir()


def exchange_two_files(folder: Path, rng: np.random.Generator) -> None:
    first, second = rng.choice(files(folder), 2, replace=False)
    one, other = first.read_bytes(), second.read_bytes()
    first.write_bytes(other)
    second.write_bytes(one)


# --- samples and members, in shards of an unchanged size


def exchange_two_samples(folder: Path, rng: np.random.Generator) -> None:
    rows = samples_of(folder)
    shard = int(rng.integers(rows["shard"].max() + 1))
    rows = rows[rows["shard"] == shard]
    order = np.arange(len(rows))
    first, second = rng.choice(len(rows), 2, replace=False)
    order[[first, second]] = second, first
    path = files(folder, "*.tar")[shard]
    content = path.read_bytes()
    parts = [content[int(row["offset"]) : int(row["offset"] + row["length"])] for row in rows[order]]
    path.write_bytes(b"".join([*parts, content[int(rows["offset"][-1] + rows["length"][-1]) :]]))


def members(folder: Path, rng: np.random.Generator) -> tuple[Path, bytes, list[tuple[int, int]]]:
    """Return a shard, its content, and start and end of each member with its header."""
    rows = samples_of(folder)
    shard = int(rng.integers(rows["shard"].max() + 1))
    found = []
    for row in rows[rows["shard"] == shard]:
        middle, end = sorted((int(row["image_offset"]), int(row["json_offset"])))[1] - 512, int(row["length"])
        begin = int(row["offset"])
        found += [(begin, begin + middle), (begin + middle, begin + end)]
    path = files(folder, "*.tar")[shard]
    return path, path.read_bytes(), found


def exchange_two_members(folder: Path, rng: np.random.Generator) -> None:
    path, content, found = members(folder, rng)
    (a, b), (c, d) = sorted(found[i] for i in rng.choice(len(found), 2, replace=False))
    path.write_bytes(content[:a] + content[c:d] + content[b:c] + content[a:b] + content[d:])


def lose_a_member(folder: Path, rng: np.random.Generator) -> None:
    """Remove a member: the rest moves up, or zeros take its place."""
    path, content, found = members(folder, rng)
    begin, end = pick(rng, found)
    gap = bytes(end - begin)
    path.write_bytes(
        pick(rng, [content[:begin] + content[end:] + gap, content[:begin] + gap + content[end:]])
    )


# --- index and manifest


def wrong_size_in_the_manifest(folder: Path, rng: np.random.Generator) -> None:
    """Truncate or extend a shard, and set that size in the manifest."""
    path = pick(rng, files(folder, "*.tar"))
    content = path.read_bytes()
    change = int(rng.integers(-len(content), 2048))
    path.write_bytes((content + bytes(max(change, 0)))[: len(content) + change])
    manifest = json.loads((folder / "manifest.json").read_text())
    for shard in manifest["shards"]:
        if shard["name"] == path.name:
            shard["size"] = len(content) + change
    (folder / "manifest.json").write_text(json.dumps(manifest))


def junk_in_the_manifest(folder: Path, rng: np.random.Generator) -> None:
    """Replace or remove a value somewhere, or add another one."""
    manifest = json.loads((folder / "manifest.json").read_text())
    node: Any = manifest
    while True:
        key = pick(rng, list(node) if isinstance(node, dict) else list(range(len(node))))
        if not isinstance(node[key], dict | list) or not node[key] or rng.random() < 0.2:
            break
        node = node[key]
    match pick(rng, ["replace", "replace", "replace", "remove", "add"]):
        case "replace":
            node[key] = pick(rng, JUNK)
        case "remove":
            del node[key]
        case "add" if isinstance(node, dict):
            node["surprise"] = pick(rng, JUNK)
        case _:
            node.append(pick(rng, JUNK))
    (folder / "manifest.json").write_text(json.dumps(manifest))


def no_manifest_at_all(folder: Path, rng: np.random.Generator) -> None:
    content = [
        b"",
        b"null",
        b"[]",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"\xff\xfe",
        b"\0" * 100,
        b"{}",
        b"9" * 5000,
    ]
    (folder / "manifest.json").write_bytes(pick(rng, content))


def another_index(folder: Path, rng: np.random.Generator) -> None:
    """Write an index with the same samples in another order, with fewer, with more, or with another crc."""
    rows = samples_of(folder)
    match rng.integers(4):
        case 0:
            rows = rows[rng.permutation(len(rows))]
        case 1:
            rows = rows[: rng.integers(len(rows))]
        case 2:
            rows = np.concatenate([rows, rows[:3]])
        case 3:
            rows["crc32"][rng.integers(len(rows))] ^= np.uint32(rng.integers(1, 2**32))
    save_index(folder, rows, in_manifest="fingerprint" if rng.random() < 0.5 else "nothing")


def a_wrong_row_in_the_index(folder: Path, rng: np.random.Generator) -> None:
    rows = samples_of(folder)
    name = pick(rng, list(rows.dtype.names or ()))
    value = int(rows[name][at := rng.integers(len(rows))])
    wrong = pick(
        rng, [value + 1, value - 1, value + 512, value * 2, 0, 2**31, 2**32 - 1, int(rng.integers(2**31))]
    )
    rows[name][at] = np.int64(wrong).astype(rows.dtype[name])
    save_index(folder, rows, in_manifest="all" if rng.random() < 0.8 else "nothing")


def another_npz(folder: Path, rng: np.random.Generator) -> None:
    rows = samples_of(folder)
    match rng.integers(7):
        case 0:
            np.savez(folder / "index.npz", other=rows)
        case 1:
            np.savez(folder / "index.npz", samples=rows[:, None])
        case 2:
            np.savez(folder / "index.npz", samples=np.array(rows.tolist(), np.int64))
        case 3:
            np.savez(folder / "index.npz", samples=np.array([{"x": 1}], object))
        case 4:
            with (folder / "index.npz").open("wb") as file:
                np.save(file, rows)
        case 5:
            np.savez_compressed(folder / "index.npz", samples=rows)  # the same, in fewer bytes
        case 6:
            content = (folder / "index.npz").read_bytes()
            shape = f"({len(rows)},)".encode()
            huge = b"(10**9,)"[: len(shape)].ljust(len(shape)) if rng.random() < 0.5 else b"9" * len(shape)
            (folder / "index.npz").write_bytes(content.replace(shape, huge))


def save_index(folder: Path, rows: Samples, *, in_manifest: Literal["nothing", "fingerprint", "all"]) -> None:
    """Write the index, and update the given part of the manifest."""
    np.savez(folder / "index.npz", samples=rows)
    if in_manifest == "nothing":
        return
    manifest = parse_manifest((folder / "manifest.json").read_bytes())
    manifest = dataclasses.replace(manifest, fingerprint=data_fingerprint(rows, manifest.categories))
    if in_manifest == "fingerprint":
        manifest.save(folder)
        return
    counts = np.bincount(rows["shard"] % len(manifest.shards), minlength=len(manifest.shards)).tolist()
    dataclasses.replace(
        manifest,
        num_samples=len(rows),
        num_annotations=int(rows["num_annotations"].sum()),
        shards=[
            dataclasses.replace(shard, num_samples=count)
            for shard, count in zip(manifest.shards, counts, strict=True)
        ],
    ).save(folder)


# --- content that fits its crc


def rewrite_part(folder: Path, rng: np.random.Generator, part: str, make: Callable[[bytes], bytes]) -> None:
    """Replace an image or json in place, padded to its old length."""
    rows = samples_of(folder)
    at = int(rng.integers(len(rows)))
    row = rows[at]
    path = files(folder, "*.tar")[row["shard"]]
    content = bytearray(path.read_bytes())
    begin, length = int(row["offset"] + row[f"{part}_offset"]), int(row[f"{part}_length"])
    new = make(bytes(content[begin : begin + length]))
    content[begin : begin + length] = new.ljust(length)[:length]
    path.write_bytes(content)
    sample = bytes(content[int(row["offset"]) : int(row["offset"] + row["length"])])
    rows["crc32"][at] = zlib.crc32(sample)
    save_index(folder, rows, in_manifest="all")


def wrongly_written_json(folder: Path, rng: np.random.Generator) -> None:
    def corrupt(text: bytes) -> bytes:
        content = json.loads(text)
        chosen = pick(rng, wrong_records(content, text))
        return chosen if isinstance(chosen, bytes) else json.dumps(chosen, separators=(",", ":")).encode()

    def wrong_records(content: Any, text: bytes) -> list[Any]:
        annotations, image = content["annotations"], content["image"]
        box = annotations[0]["bbox"] if annotations else None
        choices: list[Any] = [
            b"", b"null", b"[]", b"[" * len(text), b"\xff" * len(text), b"9" * len(text), text[: len(text) // 2],
            {"image": image}, {"annotations": annotations}, {"image": [], "annotations": annotations},
            {"image": image, "annotations": {}}, {"image": {**image, "id": -1}, "annotations": annotations},
            {"image": {"id": image["id"]}, "annotations": annotations},
            {"image": {**image, "width": image["height"] + 1}, "annotations": annotations},
        ]  # fmt: skip
        if annotations:
            first, rest = annotations[0], annotations[1:]
            wrong = [{}, 3, None,
                     {**first, "category_id": 4}, {**first, "bbox": box[:3]}, {**first, "bbox": "box"},
                     {**first, "bbox": [*box[:3], float("nan")]}, {**first, "bbox": [*box[:3], -1]},
                     {**first, "id": []},
                     {**first, "category_id": []}, {**first, "area": None}, {**first, "image_id": -1}]  # fmt: skip
            choices += [{"image": image, "annotations": rest}]
            choices += [{"image": image, "annotations": [other, *rest]} for other in wrong]
        return choices

    rewrite_part(folder, rng, "json", corrupt)


def wrongly_written_image(folder: Path, rng: np.random.Generator) -> None:
    def corrupt(image: bytes) -> bytes:
        smaller = io.BytesIO()
        Image.new("RGB", (9, 9)).save(smaller, "JPEG")
        huge = bytearray(smaller.getvalue())
        frame = huge.index(b"\xff\xc0")
        huge[frame + 5 : frame + 9] = b"\xff\xdc\xff\xdc"  # 65,500 pixels square
        return bytes(pick(rng, [b"", rng.bytes(len(image)), smaller.getvalue(), huge]))

    rewrite_part(folder, rng, "image", corrupt)


CORRUPTIONS: list[Corruption] = [
    flip_bits_in_a_shard, flip_bits_in_the_index, flip_bits_in_the_manifest, truncate, append, overwrite_a_range,
    lose_a_file, exchange_two_files, exchange_two_samples, exchange_two_members, lose_a_member,
    wrong_size_in_the_manifest, junk_in_the_manifest, no_manifest_at_all, another_index,
    a_wrong_row_in_the_index, another_npz, wrongly_written_json, wrongly_written_image,
]  # fmt: skip


def fresh_copy(original: Path, folder: Path) -> Path:
    """Copy the original to the folder, replacing its content."""
    shutil.rmtree(folder, ignore_errors=True)
    return Path(shutil.copytree(original, folder))
