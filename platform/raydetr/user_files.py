"""Read users' files: regular files only, and JSON and YAML that is not ambiguous."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections import Counter
from pathlib import Path
from typing import Any, BinaryIO

import yaml


def open_file(path: Path) -> BinaryIO:
    """Open a regular file to read its bytes; reading a pipe or a device might never end.

    Raises:
        OSError: it cannot be opened, or is no regular file; `strerror` is the reason.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # opening a pipe would wait for its writer
    except ValueError:
        raise OSError(errno.EINVAL, "not a valid path", str(path)) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return os.fdopen(descriptor, "rb")


def read_file(path: Path) -> bytes:
    """Read a regular file.

    Raises:
        OSError: as `open_file`.
    """
    with open_file(path) as file:
        return file.read()


def read_text(path: Path) -> str:
    """Read a regular file as UTF-8, with or without a byte order mark.

    Raises:
        OSError: as `open_file`.
        ValueError: it is not UTF-8.
    """
    try:
        return read_file(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 ({error.reason} at byte {error.start})") from None


def parse_json(content: bytes) -> Any:
    """Parse strict JSON: no key twice in an object, no NaN, no Infinity.

    Raises:
        ValueError: the content is not strict JSON.
    """
    try:
        return json.loads(content, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def parse_yaml(content: bytes | str) -> Any:
    """Parse YAML without arbitrary Python objects, in which no key occurs twice in a mapping.

    Raises:
        ValueError: the content is not such YAML.
    """
    try:
        return yaml.load(content, _UniqueKeyLoader)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def parse_yaml_documents(content: bytes | str) -> list[Any]:
    """Parse YAML of several documents, as `parse_yaml` does one.

    Raises:
        ValueError: the content is not such YAML.
    """
    try:
        return list(yaml.load_all(content, _UniqueKeyLoader))
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


class _UniqueKeyLoader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        counts = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        twice = [key for key, count in counts.items() if count > 1]
        if twice:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {twice[0]!r:.60} occurs twice", node.start_mark
            )
        return super().construct_mapping(node, deep)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        ((key, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {key!r:.60} occurs twice in an object")
    return record


def _refuse_constant(name: str) -> float:
    raise ValueError(f"it holds {name}, which is not JSON")
