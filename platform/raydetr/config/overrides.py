"""Read, override and write settings: by dotted path, as YAML, and as `path=value`.

A setting has the same name, such as `optim.lr`, on the command line, in search spaces, in MLflow params and in config
files. Unknown keys and wrong types are errors whose message has the path and the nearest valid key.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from detrs.backbone import PathOrUrl
from detrs.zoo import ModelConfig
from raydetr.config.schema import RunConfig
from raydetr.locations import MakeAbsolute, absolute, absolute_file, absolute_tracking_uri
from raydetr.user_files import parse_yaml, read_text

_VARIANTS = tuple(kind.architecture for kind in get_args(ModelConfig))  # values of `model.architecture`
# Mappings with arbitrary keys, which can be set one by one or together
_MAPPINGS = ("data.remote.options.",)


class ConfigError(ValueError):
    """A configuration cannot be used; the message has the path, the value and the remedy."""


def from_dict(values: Mapping[str, Any]) -> RunConfig:
    """Validate nested values into a RunConfig.

    Raises:
        ConfigError: a key is unknown, missing, or has a value of the wrong type.
    """
    try:
        return RunConfig.model_validate(_renamed(values))
    except ValidationError as error:
        raise ConfigError(_explain(error)) from None


def _renamed(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the values of a run of an earlier version under the names of today."""
    model = values.get("model")
    if not isinstance(model, Mapping) or "shared_heads" not in model:
        return values
    shared = {"shared_class_heads": model["shared_heads"], "shared_box_heads": model["shared_heads"]}
    others = {name: value for name, value in model.items() if name != "shared_heads"}
    return {**values, "model": shared | others}


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Return the configuration as nested plain values, as in YAML and JSON."""
    return config.model_dump(mode="json")


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested values to {dotted path: value}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        path = f"{prefix}{key}"
        flat |= flatten(value, f"{path}.") if isinstance(value, Mapping) and value else {path: value}
    return flat


def override(config: RunConfig, assignments: Mapping[str, Any]) -> RunConfig:
    """Return a copy of `config` with other values at some dotted paths.

    Raises:
        ConfigError: a path does not exist (the message has the nearest one), or a value is not valid.
    """
    values = to_dict(config)
    for path, value in assignments.items():
        _assign(values, path, value)
    return from_dict(values)


def parse_assignments(arguments: Iterable[str]) -> dict[str, Any]:
    """Parse `["optim.lr=2e-4"]` to {"optim.lr": 2e-4}; values are YAML scalars or lists.

    Raises:
        ConfigError: an argument is not of the form `path=value`.
    """
    assignments: dict[str, Any] = {}
    for argument in arguments:
        path, equals, text = argument.partition("=")
        if not equals or not path:
            raise ConfigError(f"{argument!r} is not an override: write it as path=value, e.g. optim.lr=2e-4")
        if path in assignments:
            raise ConfigError(f"{path} is set twice, to {assignments[path]!r} and to {text!r}: keep one")
        assignments[path] = _parse_value(path, text)
    return assignments


def to_yaml(config: RunConfig) -> str:
    """Return the configuration as YAML, which `from_yaml` reads back to an equal one."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def from_yaml(path: Path) -> RunConfig:
    """Read a configuration file.

    Raises:
        ConfigError: the file is missing, is not a YAML mapping, or is not a valid configuration.
    """
    try:
        text = read_text(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None
    return from_yaml_text(text, str(path))


def from_yaml_text(text: str, name: str) -> RunConfig:
    """Parse the text of a configuration file; `name` is that of the file, for messages.

    Raises:
        ConfigError: it is not a YAML mapping, or is not a valid configuration.
    """
    try:
        values = parse_yaml(text)
    except ValueError as error:
        raise ConfigError(f"{name}: cannot be read ({error})") from None
    if not isinstance(values, dict):
        raise ConfigError(
            f"{name}: contains {type(values).__name__}, not a mapping; `raydetr config` prints one"
        )
    try:
        return from_dict(values)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None


def nearest(word: str, known: Iterable[str]) -> str:
    """Return "; did you mean X?" with the known word most similar to `word`, in upper or lower case; an empty string if
    none is similar.
    """
    words = {each.lower(): each for each in known}
    close = difflib.get_close_matches(word.lower(), list(words), n=1)
    return f"; did you mean {words[close[0]]}?" if close else ""


def _parse_value(path: str, text: str) -> Any:
    try:
        value = parse_yaml(text)
    except ValueError as error:
        raise ConfigError(f"{path}: the value {text!r} is not YAML ({error})") from None
    # YAML 1.1 reads 2e-4 as text, because it has no decimal point
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _assign(values: dict[str, Any], path: str, value: Any) -> None:
    node: Any = values
    *parents, leaf = path.split(".")
    for depth, key in enumerate([*parents, leaf]):
        if isinstance(node, dict) and f"{'.'.join(parents[:depth])}.".startswith(_MAPPINGS):
            node.setdefault(key, {} if depth < len(parents) else None)
        if not isinstance(node, dict) or key not in node:
            raise ConfigError(f"{path}: no such setting{nearest(path, _all_paths(values))}")
        if key is not leaf:
            node = node[key]
    if isinstance(node[leaf], dict) and not f"{path}.".startswith(_MAPPINGS):
        raise ConfigError(f"{path} is a section: set one of {', '.join(sorted(node[leaf]))} below it")
    node[leaf] = value


def _all_paths(values: Mapping[str, Any]) -> list[str]:
    return list(flatten(values))


def _explain(error: ValidationError) -> str:
    return "; ".join(_explain_problem(problem) for problem in error.errors())


def _explain_problem(problem: ErrorDetails) -> str:
    # The location has pydantic's name of the variant of `model`, which is not part of the path: model.dino.num_queries
    path = ".".join(str(part) for part in problem["loc"] if part not in _VARIANTS)
    if problem["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"{path}: no such setting{nearest(path, known_paths(RunConfig))}"
    if problem["type"] == "missing":
        return f"{path}: missing"
    if problem["type"] == "value_error":  # from a validator of a section
        return f"{path}: {problem['msg'].removeprefix('Value error, ')}"
    return f"{path}: {problem['msg']}, found {problem['input']!r}"


def known_paths(kind: Any, prefix: str = "") -> list[str]:
    """Return all dotted paths below a section's type, including those of every variant of the model."""
    return list(dict.fromkeys(path for path, _ in _settings(kind, prefix)))


def absolute_paths(config: RunConfig, base: Path) -> RunConfig:
    """Return the configuration with every setting that names a file or folder made absolute, starting from `base`.

    The types of the settings determine which these are (`raydetr.locations`).

    Raises:
        ConfigError: a setting that must be a file or folder is a URL.
    """
    values = flatten(to_dict(config))
    changed = {}
    for path, rule in path_settings().items():
        if values.get(path) is not None:
            try:
                changed[path] = rule(values[path], base)
            except ValueError as error:
                raise ConfigError(f"{path} {error}") from None
    return override(config, changed)


def path_settings() -> dict[str, MakeAbsolute]:
    """Return the settings that name a file or folder, with the function that makes their value absolute."""
    return {path: rule for path, kind in _settings(RunConfig) if (rule := path_rule(kind))}


def path_rule(annotation: Any) -> MakeAbsolute | None:
    """Return the function that makes a setting of this type absolute; None if it does not name a file.

    It depends on the metadata of `Annotated` types; a union such as `Path | None` has the function of its member.
    """
    marks = [annotation] if annotation is Path else list(getattr(annotation, "__metadata__", ()))
    path_or_url = get_args(PathOrUrl)[1]
    rules: tuple[tuple[Any, MakeAbsolute], ...] = (
        (Path, absolute_file),
        (absolute, absolute),
        (path_or_url, absolute),
        (absolute_tracking_uri, absolute_tracking_uri),
    )
    for mark, make_absolute in rules:
        if mark in marks:
            return make_absolute
    if get_origin(annotation) is Annotated:
        return None
    return next((rule for part in get_args(annotation) if (rule := path_rule(part)) is not None), None)


def _settings(kind: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted path and the type of each setting below a section's type."""
    sections = [part for part in (kind, *get_args(kind)) if _is_section(part)]
    for section in sections:
        for name, annotation in get_type_hints(section, include_extras=True).items():
            if name in _fields(section):
                yield from _settings(annotation, f"{prefix}{name}.")
    if not sections:
        yield prefix.removesuffix("."), kind


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and (issubclass(kind, BaseModel) or dataclasses.is_dataclass(kind))


def _fields(section: Any) -> set[str]:
    if issubclass(section, BaseModel):
        return set(section.model_fields)
    return {field.name for field in dataclasses.fields(section)}
