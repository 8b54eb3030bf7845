"""Read search spaces: YAML files with dotted paths and the distributions of their values.

    optim.lr: {loguniform: [1e-4, 1e-2]}
    optim.weight_decay: {uniform: [0.0, 1e-3]}
    model.num_queries: {randint: [10, 50]}      # both ends can be drawn
    optim.schedule: {choice: [step, cosine]}

Every path, and every end or choice of a distribution, is checked against the configuration when the file is read, so
that each value alone is valid.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from raydetr.config import ConfigError, RunConfig, nearest, override
from raydetr.user_files import parse_yaml, read_text

Kind = Literal["uniform", "loguniform", "randint", "choice"]
KINDS: tuple[Kind, ...] = get_args(Kind)

# A path, or a section with a dot at its end, and why a search cannot vary it
NOT_SEARCHABLE = {
    "recipe": "it only names the run",
    "data.train": "trials on other data cannot be compared; run one search per data set",
    "data.val": "trials on other data cannot be compared; run one search per data set",
    "data.synthetic": "trials on other data cannot be compared; run one search per data set",
    "data.limit_images": "trials on other data cannot be compared; set it on the command line",
    "data.label_map": "it is a property of the data",
    "optim.epochs": "trials are compared at the same epoch of the same schedule; set it on the command line",
    "evaluation.": "trials are compared at the same epochs; set it on the command line",
    "cluster.": "it determines where trials run, not what they learn; set it on the command line",
    "storage.": "it determines where trials are stored; set it on the command line",
    "tracking.": "it determines where trials are logged; set it on the command line",
}


@dataclass(frozen=True)
class Distribution:
    """Distribution of a value: `values` are the two ends of a range, or the choices."""

    kind: Kind
    values: tuple[Any, ...]

    def examples(self) -> tuple[Any, ...]:
        """Return values to check in place of all possible ones: the ends and one between them, or each choice."""
        if self.kind not in ("uniform", "loguniform"):
            return self.values
        low, high = self.values
        # The ends alone could be valid integers, such as 64.0; a value between them (golden ratio) is not
        return low, high, low + (high - low) * 0.381966


@dataclass(frozen=True)
class Space:
    """Distributions of a search by dotted path, and the file they were read from."""

    path: Path
    text: str
    distributions: Mapping[str, Distribution]


def read_space(path: Path, config: RunConfig) -> Space:
    """Read a search space and check it against `config`.

    Raises:
        ConfigError: the file is missing or is not a mapping of paths to distributions; a path does not exist, is a
            section, is given twice or cannot be searched; a distribution is unknown or its values are not valid.
    """
    try:
        text = read_text(path)
        values = parse_yaml(text)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; --space takes a YAML file of paths to search") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None
    if not isinstance(values, dict) or not values:
        raise ConfigError(f"{path}: has no paths to search; write lines such as optim.lr: {_EXAMPLE}")
    try:
        distributions = {str(key): _read_distribution(str(key), value) for key, value in values.items()}
        for key, distribution in distributions.items():
            _check_values(config, key, distribution)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return Space(path, text, distributions)


_EXAMPLE = "{loguniform: [1e-4, 1e-2]}"


def _read_distribution(path: str, value: Any) -> Distribution:
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: found {value!r}, not a distribution; write it as {_EXAMPLE}")
    if len(value) != 1:
        names = ", ".join(map(str, value)) or "none"
        raise ConfigError(f"{path}: takes one distribution, found {names}; write it as {_EXAMPLE}")
    (name, values), *_ = value.items()
    if name not in KINDS:
        known = ", ".join(KINDS)
        below = "; for a setting in a section write the full dotted path" if isinstance(values, dict) else ""
        raise ConfigError(
            f"{path}: no distribution {name!r} (there are {known}){nearest(str(name), KINDS)}{below}"
        )
    if not isinstance(values, list):
        raise ConfigError(f"{path}: {name} takes a list in [ ], found {values!r}")
    read = _read_choices if name == "choice" else _read_ends
    return Distribution(name, read(path, name, values))


def _read_choices(path: str, name: str, values: list[Any]) -> tuple[Any, ...]:
    choices = tuple(_number(value) for value in values)
    if len(choices) < 2:
        raise ConfigError(
            f"{path}: choice takes two values or more, found {values!r}; a single one is an override: "
            f"{path}=VALUE"
        )
    repeated = [choice for i, choice in enumerate(choices) if choice in choices[:i]]
    if repeated:
        raise ConfigError(f"{path}: choice has {repeated[0]!r} twice: keep one")
    return choices


def _read_ends(path: str, name: str, values: list[Any]) -> tuple[Any, ...]:
    number = int if name == "randint" else (int, float)
    ends = tuple(_number(value) for value in values)
    if len(ends) != 2 or not all(_is_number(end, number) for end in ends):
        kind = "two integers" if name == "randint" else "two numbers"
        raise ConfigError(f"{path}: {name} takes {kind} [low, high], found {values!r}")
    low, high = ends
    if low >= high:
        raise ConfigError(f"{path}: {name} takes [low, high] with low below high, found {values!r}")
    if name == "loguniform" and low <= 0:
        raise ConfigError(f"{path}: loguniform needs ends above 0, found {values!r}; or use uniform")
    return ends if name == "randint" else (float(low), float(high))


def _is_number(value: Any, number: Any) -> bool:
    is_number = isinstance(value, number) and not isinstance(value, bool)
    return is_number and abs(value) < 2**63 and math.isfinite(value)


def _number(value: Any) -> Any:
    """Convert text to a number if possible: YAML 1.1 reads 1e-4, which has no decimal point, as text."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _check_values(config: RunConfig, path: str, distribution: Distribution) -> None:
    for name, reason in NOT_SEARCHABLE.items():
        if path == name or (name.endswith(".") and path.startswith(name)):
            raise ConfigError(f"{path} cannot be searched: {reason}")
    for value in distribution.examples():
        try:
            override(config, {path: value})
        except ConfigError as error:
            raise ConfigError(f"{error} ({value!r} of {distribution.kind})") from None
