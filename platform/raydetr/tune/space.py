"""Read search spaces: YAML files with dotted paths and the distributions of their values.

    optim.lr: {loguniform: [1e-4, 1e-2]}
    optim.weight_decay: {uniform: [0.0, 1e-3]}
    model.num_queries: {randint: [10, 50]}      # both ends can be drawn
    optim.schedule: {choice: [step, cosine]}
    optim.min_lr_ratio: {uniform: [0.0, 0.1], when: {optim.schedule: cosine}, otherwise: 0.0}

With `when`, a value is drawn only if an earlier path has the given value, or one of a list of values. If not, the
setting is `otherwise`; without that, it keeps the value of the configuration.

Every path, and every end or choice of a distribution, is checked against the configuration when the file is read, so
that each value alone is valid. Whether it can be trained is checked by `raydetr.tune.check`.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from raydetr.config import ConfigError, RunConfig, nearest, override, path_settings
from raydetr.user_files import parse_yaml, read_text

Kind = Literal["uniform", "loguniform", "randint", "choice"]
KINDS: tuple[Kind, ...] = get_args(Kind)
WHEN, OTHERWISE = "when", "otherwise"
MAX_GRID = 10_000  # combinations

_OTHER_DATA = "trials on other images cannot be compared; run one search per data set"
_NO_EFFECT = "it has no effect on what a trial learns; set it on the command line"
# A path, or a section with a dot at its end, and why a search cannot vary it
NOT_SEARCHABLE = {
    "recipe": "it only names the run",
    "data.val": _OTHER_DATA,
    "data.synthetic": _OTHER_DATA,
    "data.limit_images": _OTHER_DATA,
    "data.label_map": "it is a property of the data",
    "data.eval_batch_size": _NO_EFFECT,
    "data.num_loader_workers": _NO_EFFECT,
    "data.on_corrupt": _NO_EFFECT,
    "data.max_corrupt": _NO_EFFECT,
    "data.remote.": _NO_EFFECT,
    "optim.activation_checkpointing": _NO_EFFECT,
    "optim.max_skipped_steps": _NO_EFFECT,
    "evaluation.": "trials are compared at the same epochs; set it on the command line",
    "cluster.address": _NO_EFFECT,
    "cluster.num_workers": _NO_EFFECT,
    "cluster.use_gpu": _NO_EFFECT,
    "cluster.cpus_per_worker": _NO_EFFECT,
    "cluster.max_failures": _NO_EFFECT,
    "cluster.min_workers": _NO_EFFECT,
    "cluster.wait_minutes": _NO_EFFECT,
    "cluster.stall_minutes": _NO_EFFECT,
    "storage.": _NO_EFFECT,
    "tracking.": _NO_EFFECT,
}


@dataclass(frozen=True)
class Distribution:
    """Distribution of a value: `values` are the two ends of a range, or the choices.

    `when` is an earlier path and those of its values for which this one is drawn; None: always. `otherwise` has the
    value of the setting if it is not drawn; empty: that of the configuration.
    """

    kind: Kind
    values: tuple[Any, ...]
    when: tuple[str, tuple[Any, ...]] | None = None
    otherwise: tuple[Any, ...] = ()

    def examples(self) -> tuple[Any, ...]:
        """Return values to check in place of all possible ones: the ends and one between them, or each choice."""
        if self.kind not in ("uniform", "loguniform"):
            return self.values
        low, high = self.values
        # The ends alone could be valid integers, such as 64.0; a value between them (golden ratio) is not
        return low, high, low + (high - low) * 0.381966

    def draw(self, generator: random.Random) -> Any:
        """Draw a value."""
        match self.kind:
            case "uniform":
                return generator.uniform(*self.values)
            case "loguniform":
                low, high = self.values
                drawn = math.exp(generator.uniform(math.log(low), math.log(high)))
                return min(max(drawn, low), high)
            case "randint":
                return generator.randint(*self.values)
            case "choice":
                return generator.choice(self.values)

    def __str__(self) -> str:
        values = f"{self.kind} {list(self.values)}"
        return values if self.when is None else f"{values} when {self.when[0]} is {list(self.when[1])}"


@dataclass(frozen=True)
class Space:
    """Distributions of a search by dotted path, and the file they were read from."""

    path: Path
    text: str
    distributions: Mapping[str, Distribution]

    def draw(self, choose: Callable[[str, Distribution], Any]) -> dict[str, Any]:
        """Return one configuration of the space, {path: value}.

        Args:
            choose: returns the value of a path.
        """
        drawn: dict[str, Any] = {}
        for path, distribution in self.distributions.items():
            if _is_drawn(distribution, drawn):
                drawn[path] = choose(path, distribution)
            elif distribution.otherwise:
                drawn[path] = distribution.otherwise[0]
        return drawn

    def is_drawn(self, path: str, overrides: Mapping[str, Any]) -> bool:
        """Return whether the value of a path was drawn in a configuration of the space."""
        return _is_drawn(self.distributions[path], overrides)

    def draw_random(self, generator: random.Random) -> dict[str, Any]:
        """Return a random configuration of the space, {path: value}."""
        return self.draw(lambda path, distribution: distribution.draw(generator))

    def grid(self) -> list[dict[str, Any]]:
        """Return all configurations of the space, the last path varying fastest.

        Raises:
            ConfigError: it has a distribution of real numbers, or too many combinations.
        """
        values = {}
        for path, distribution in self.distributions.items():
            if distribution.kind in ("uniform", "loguniform"):
                raise ConfigError(
                    f"{self.path}: {path}: a grid needs a list of values, found {distribution.kind}; write "
                    f"{path}: {{choice: [...]}}, or search with another --algorithm"
                )
            low, high = distribution.values[0], distribution.values[-1]
            is_range = distribution.kind == "randint"
            values[path] = list(range(low, high + 1)) if is_range else list(distribution.values)
        if (size := math.prod(map(len, values.values()))) > MAX_GRID:
            raise ConfigError(
                f"{self.path}: the grid has {size:,} combinations, and at most {MAX_GRID:,} are possible: list fewer "
                "values, or search with another --algorithm"
            )
        configurations = {}
        for chosen in itertools.product(*values.values()):
            by_path = dict(zip(values, chosen, strict=True))
            drawn = self.draw(lambda path, distribution, by_path=by_path: by_path[path])  # type: ignore[misc]
            configurations[repr(drawn)] = drawn  # paths that are not drawn do not multiply it
        return list(configurations.values())

    def examples(self) -> Iterator[tuple[str, Any, dict[str, Any]]]:
        """Yield each value to be checked: path, value, and a configuration that has it.

        Other paths are in the configuration only if they depend on that path, or if it depends on them.
        """
        for path, distribution in self.distributions.items():
            needed = self._conditions(path)
            for value in distribution.examples():
                given = {**needed, path: value}
                drawn: dict[str, Any] = {}
                for other, one in self.distributions.items():
                    if other in given:
                        drawn[other] = given[other]
                    elif one.when is not None and one.when[0] in drawn:
                        if _is_drawn(one, drawn):
                            drawn[other] = one.values[0]
                        elif one.otherwise:
                            drawn[other] = one.otherwise[0]
                yield path, value, drawn

    def _conditions(self, path: str) -> dict[str, Any]:
        """Return the values of other paths for which this one is drawn."""
        when = self.distributions[path].when
        return {} if when is None else {**self._conditions(when[0]), when[0]: when[1][0]}


def _is_drawn(distribution: Distribution, drawn: Mapping[str, Any]) -> bool:
    if distribution.when is None:
        return True
    path, values = distribution.when
    return path in drawn and drawn[path] in values


def read_space(path: Path, config: RunConfig, base: Path | None = None) -> Space:
    """Read a search space and check it against `config`.

    Args:
        path: of the file.
        config: the configuration that the values override.
        base: folder from which values that name files or folders are made absolute; None: they stay as they are.

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
        distributions: dict[str, Distribution] = {}
        for key, value in values.items():
            distributions[str(key)] = _read_distribution(str(key), value, distributions)
        space = Space(path, text, distributions)
        _check_values(config, space)
        return space if base is None else _absolute(space, base)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


_EXAMPLE = "{loguniform: [1e-4, 1e-2]}"


def _read_distribution(path: str, value: Any, earlier: Mapping[str, Distribution]) -> Distribution:
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: found {value!r}, not a distribution; write it as {_EXAMPLE}")
    named = {name: values for name, values in value.items() if name not in (WHEN, OTHERWISE)}
    if len(named) != 1:
        names = ", ".join(map(str, named)) or "none"
        raise ConfigError(f"{path}: takes one distribution, found {names}; write it as {_EXAMPLE}")
    (name, values), *_ = named.items()
    if name not in KINDS:
        known = ", ".join(KINDS)
        below = "; for a setting in a section write the full dotted path" if isinstance(values, dict) else ""
        raise ConfigError(
            f"{path}: no distribution {name!r} (there are {known}){nearest(str(name), KINDS)}{below}"
        )
    if not isinstance(values, list):
        raise ConfigError(f"{path}: {name} takes a list in [ ], found {values!r}")
    read = _read_choices if name == "choice" else _read_ends
    when = _read_condition(path, value[WHEN], earlier) if WHEN in value else None
    if when is None and OTHERWISE in value:
        raise ConfigError(f"{path}: {OTHERWISE} has no effect without {WHEN}: omit it")
    otherwise = (_number(value[OTHERWISE]),) if OTHERWISE in value else ()
    return Distribution(name, read(path, name, values), when, otherwise)


def _read_condition(
    path: str, value: Any, earlier: Mapping[str, Distribution]
) -> tuple[str, tuple[Any, ...]]:
    """Read `when: {PATH: VALUE}` or `when: {PATH: [VALUE, ...]}`."""
    if not isinstance(value, dict) or len(value) != 1:
        raise ConfigError(
            f"{path}: {WHEN} takes one path and its value, found {value!r}; write it as {{optim.schedule: step}}"
        )
    (other, wanted), *_ = value.items()
    if other not in earlier:
        raise ConfigError(
            f"{path}: {WHEN} names {other}, which is not a path above it{nearest(str(other), earlier)}; a condition "
            "depends on a path that is drawn before"
        )
    distribution = earlier[other]
    if distribution.kind != "choice":
        raise ConfigError(f"{path}: {WHEN} needs a path with choices, and {other} is {distribution.kind}")
    choices = distribution.values
    is_list = isinstance(wanted, list) and wanted not in choices  # a choice can be a list itself
    values = tuple(_number(each) for each in (wanted if is_list else [wanted]))
    unknown = [each for each in values if each not in choices]
    if unknown or not values:
        raise ConfigError(
            f"{path}: {WHEN} {other} is {unknown or wanted}, which is none of its choices {list(choices)}"
        )
    if all(choice in values for choice in choices):
        raise ConfigError(f"{path}: {WHEN} has no effect: it names every choice of {other}; omit it")
    return str(other), values


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


def _check_values(config: RunConfig, space: Space) -> None:
    for path in space.distributions:
        for name, reason in NOT_SEARCHABLE.items():
            if path == name or (name.endswith(".") and path.startswith(name)):
                raise ConfigError(f"{path} cannot be searched: {reason}")
    for path, value, drawn in space.examples():
        try:
            override(config, drawn)
        except ConfigError as error:
            raise ConfigError(f"{error} ({value!r} of {space.distributions[path].kind})") from None


def _absolute(space: Space, base: Path) -> Space:
    """Return the space with the values that name files or folders made absolute, starting from `base`."""
    rules = path_settings()

    def absolute(path: str, values: tuple[Any, ...]) -> tuple[Any, ...]:
        rule = rules.get(path)
        if rule is None:
            return values
        try:
            return tuple(value if value is None else rule(value, base) for value in values)
        except ValueError as error:
            raise ConfigError(f"{path} {error}") from None

    distributions = {
        path: replace(
            one,
            values=absolute(path, one.values),
            when=None if one.when is None else (one.when[0], absolute(*one.when)),
            otherwise=absolute(path, one.otherwise),
        )
        for path, one in space.distributions.items()
    }
    return replace(space, distributions=distributions)
