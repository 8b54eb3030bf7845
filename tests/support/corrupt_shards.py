"""Corrupt single samples of shards on disk, as disks, networks and people do."""

from __future__ import annotations

from pathlib import Path

from raydetr.shards.reader import Shards


def corrupt_sample(shards: Shards, index: int, *, part: str = "image") -> tuple[Path, str]:
    """Flip a bit in the middle of a sample's image or json on disk; return its shard and key."""
    row = shards.samples[index]
    path = shards.files.paths[row["shard"]]
    middle = int(row["offset"]) + int(row[f"{part}_offset"]) + int(row[f"{part}_length"]) // 2
    content = bytearray(path.read_bytes())
    content[middle] ^= 16
    path.write_bytes(content)
    return path, shards.key(index)
