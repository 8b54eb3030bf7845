"""The configuration of a run: frozen, nested, validated. One vocabulary, the dotted path.

`optim.lr` is the same word on the command line, in a search space, in an MLflow param and in a
config file. An unknown key or a wrong type is an error that names the path and the nearest valid key.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args, get_type_hints

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails

from detrs.zoo import ModelConfig
from raydetr.config.paths import check_location, is_remote
from raydetr.data.transforms.transform import ScalePer, Transform
from raydetr.store.transfer import CacheSettings, RemoteSettings

_VARIANTS = tuple(kind.paper for kind in get_args(ModelConfig))  # values of `model.paper`


# Settings whose keys are not ours: they can be set one by one, or all together as a mapping
_FREE = ("data.remote.options.",)


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the path, what was found and what to do."""


Location = Annotated[str, AfterValidator(check_location)]  # a folder, or a URL of one


class Section(BaseModel):
    """A part of the configuration: immutable, and strict about keys and types."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


NEEDED = {  # of TransformConfig: what a setting has no effect without
    "max_side": "short_sides",
    "crop_short_sides": "crop_probability",
    "crop_min_side": "crop_probability",
    "crop_max_side": "crop_probability",
    "jitter_min_scale": "jitter_side",
    "jitter_max_scale": "jitter_side",
}
AUGMENTATION = (  # of TransformConfig: what belongs in training alone
    "horizontal_flip",
    "crop_probability",
    "jitter_side",
    "mosaic_probability",
    "brightness",
    "contrast",
    "saturation",
    "hue",
    "scale_per",
)


class TransformConfig(Section):
    """What happens to an image between its file and the model."""

    short_sides: tuple[PositiveInt, ...] = ()  # pixels; one is drawn; empty: keep the size
    scale_per: ScalePer = "image"  # draw one for each image, as officially, or for each step: less padding
    max_side: PositiveInt = 1333  # pixels; the long side never exceeds it when `short_sides` is given
    horizontal_flip: float = Field(default=0.0, ge=0.0, le=1.0)  # probability
    crop_probability: float = Field(default=0.0, ge=0.0, le=1.0)  # of a random crop before the resize
    crop_short_sides: tuple[PositiveInt, ...] = ()  # pixels; resize to one of them before the crop
    crop_min_side: PositiveInt = 384  # pixels; the sides of the crop are drawn from crop_min_side
    crop_max_side: PositiveInt = 600  # to crop_max_side, or to the image's side where that is smaller
    jitter_side: PositiveInt | None = None  # pixels; large-scale jitter makes squares of it; None: no jitter
    jitter_min_scale: float = Field(default=0.1, gt=0)  # the image is made to fit jitter_side times a number
    jitter_max_scale: float = Field(default=2.0, gt=0)  # that is drawn from jitter_min_scale to this
    mosaic_probability: float = Field(default=0.0, ge=0.0, le=1.0)  # of four images in the place of one
    brightness: float = Field(default=0.0, ge=0.0)  # a factor is drawn from 1 - brightness to 1 + brightness
    contrast: float = Field(default=0.0, ge=0.0)  # likewise
    saturation: float = Field(default=0.0, ge=0.0)  # likewise
    hue: float = Field(
        default=0.0, ge=0.0, le=0.5
    )  # share of the colour circle; the largest shift either way

    @model_validator(mode="after")
    def _check_ranges(self) -> Self:
        for low, high in (("crop_min_side", "crop_max_side"), ("jitter_min_scale", "jitter_max_scale")):
            if getattr(self, low) > getattr(self, high):
                raise ValueError(f"{low} {getattr(self, low)} exceeds {high} {getattr(self, high)}")
        return self

    @model_validator(mode="after")
    def _check_effects(self) -> Self:
        """A setting that has no effect is a mistake, and not what its user believes."""
        for name, needed in NEEDED.items():
            value = getattr(self, name)
            if self.changes((name,)) and not getattr(self, needed):
                raise ValueError(f"{name} {value} has no effect without {needed}: set that too, or neither")
        for name in ("short_sides", "crop_probability"):
            value = getattr(self, name)
            if value and self.jitter_side is not None:
                raise ValueError(f"{name} {value} has no effect with jitter_side: jitter resizes and crops")
        if self.scale_per == "step" and len(self.short_sides) < 2:
            raise ValueError(
                f"scale_per=step has no effect with short_sides {list(self.short_sides)}: "
                "name two or more, or leave scale_per out"
            )
        return self

    def changes(self, names: tuple[str, ...]) -> list[str]:
        """Those of these settings that are not the default ones."""
        fields = type(self).model_fields
        return [name for name in names if getattr(self, name) != fields[name].default]

    def build(self) -> Transform:
        """The transform that these settings describe."""
        return Transform(**self.model_dump())


class RemoteConfig(Section):
    """How shards at s3://, gs:// and http(s):// are read (docs/data.md, Remote data)."""

    options: dict[
        str, Any
    ] = {}  # of fsspec's backend, e.g. {endpoint_url: http://minio:9000}; no credentials
    connect_seconds: float = Field(default=10.0, gt=0)  # until a server has answered a connection
    stall_seconds: float = Field(default=30.0, gt=0)  # without bytes, before a request is made again
    attempts: PositiveInt = 6  # at a range, without progress, before a run stops
    max_requests: PositiveInt = 16  # at a time, of a process
    merge_gap_kb: int = Field(default=64, ge=0)  # samples that lie nearer come in one request


class DataConfig(Section):
    """Which shards are read and how they become batches."""

    train: Location  # a folder of shards, or its s3://, gs://, http(s):// or file:// URL
    val: Location
    batch_size: PositiveInt  # images of one optimizer step, over all workers
    eval_batch_size: PositiveInt  # images of one evaluation batch on one worker
    label_map: Literal["contiguous", "category_id"] = "contiguous"
    train_transform: TransformConfig = TransformConfig()
    val_transform: TransformConfig = TransformConfig()
    num_loader_workers: int = Field(default=0, ge=0)  # processes a worker; 0: load in the worker itself
    limit_images: PositiveInt | None = None  # only the first images of each split; None: all
    on_damage: Literal["raise", "substitute", "mask"] = "raise"  # what becomes of a damaged sample
    max_damaged: int | None = Field(default=None, ge=0)  # such samples before a run stops; None: 1%, or 10
    sample: Literal["easy", "hard"] | None = None  # write sample shards to `train`, `val` if missing
    remote: RemoteConfig = RemoteConfig()
    cache: Path | None = None  # a folder on each node's own disk, for what is read from remote shards
    cache_gb: float | None = Field(default=None, gt=0)  # its size, never exceeded

    @model_validator(mode="after")
    def _check_evaluation(self) -> Self:
        for name in self.val_transform.changes(AUGMENTATION):
            raise ValueError(
                f"val_transform.{name} {getattr(self.val_transform, name)} is augmentation, and evaluation "
                "needs the image as it is: leave it out"
            )
        return self

    @model_validator(mode="after")
    def _check_remote(self) -> Self:
        """A setting that has no effect is a mistake, and not what its user believes."""
        if (self.cache is None) != (self.cache_gb is None):
            raise ValueError(
                "cache and cache_gb belong together: name a folder and the gigabytes it may fill"
            )
        if is_remote(self.train) or is_remote(self.val):
            return self
        changed = [name for name, value in self.remote if value != RemoteConfig.model_fields[name].default]
        idle = [f"remote.{name}" for name in changed] + (["cache", "cache_gb"] if self.cache else [])
        if idle:
            raise ValueError(
                f"{', '.join(idle)} would have no effect: {self.train} and {self.val} are local; leave it out"
            )
        return self

    def build_remote(self, location: str) -> RemoteSettings | None:
        """How `location` is read; None of a local one."""
        if not is_remote(location):
            return None
        values = self.remote.model_dump()
        gap = values.pop("merge_gap_kb") * 1024
        cache = None
        if self.cache is not None and self.cache_gb is not None:
            cache = CacheSettings(str(self.cache), int(self.cache_gb * 1e9))
        return RemoteSettings(**values, merge_gap=gap, cache=cache)

    @model_validator(mode="after")
    def _check_damage(self) -> Self:
        """A setting that has no effect is a mistake, and not what its user believes."""
        if self.max_damaged is not None and self.on_damage == "raise":
            raise ValueError(f"max_damaged {self.max_damaged} has no effect with on_damage=raise")
        return self


class OptimConfig(Section):
    """AdamW, its schedule, clipping and the moving average of the weights."""

    epochs: PositiveInt
    lr: float = Field(gt=0)
    lr_backbone: float = Field(gt=0)
    lr_sampling: float = Field(gt=0)  # sampling offsets and reference points (Deformable DETR, A.4)
    weight_decay: NonNegativeFloat = 1e-4
    decay_norms_and_biases: bool = True  # the official code decays every parameter
    schedule: Literal["step", "cosine"] = "step"
    warmup_share: float = Field(default=0.0, ge=0.0, lt=1.0)  # of all steps, linear from 0
    drop_epochs: tuple[PositiveInt, ...] = ()  # "step": lr is multiplied by 0.1 after each of these
    final_lr_share: float = Field(default=0.0, ge=0.0, le=1.0)  # "cosine": of lr, at the last step
    clip_norm: float | None = Field(default=0.1, gt=0)  # None: no clipping
    ema_decay: float | None = Field(default=None, gt=0, lt=1)  # None: no moving average
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"  # of the model; losses and boxes are float32 always
    max_skipped_steps: int = Field(default=10, ge=0)  # steps with NaN or infinity before a run stops

    @model_validator(mode="after")
    def _check_schedule(self) -> Self:
        """A setting that has no effect is a mistake, and not what its user believes."""
        if self.schedule == "cosine" and self.drop_epochs:
            raise ValueError(f"drop_epochs {list(self.drop_epochs)} has no effect with schedule=cosine")
        if self.schedule == "step" and self.final_lr_share:
            raise ValueError(f"final_lr_share {self.final_lr_share} has no effect with schedule=step")
        return self


class InitConfig(Section):
    """What the weights start from."""

    # a checkpoint of a run, or what `raydetr import-checkpoint` wrote; None: new ones
    checkpoint: Path | None = None


class EvaluationConfig(Section):
    """When the validation split is evaluated."""

    every_epochs: PositiveInt = 1  # the last epoch is always evaluated


class ClusterConfig(Section):
    """Where the run happens."""

    address: str | None = None  # None: the cluster of this job, else a new one on this machine
    num_workers: PositiveInt = 1
    use_gpu: bool = False
    cpus_per_worker: PositiveInt = 1
    max_failures: int = Field(default=3, ge=-1)  # restarts of the worker group; -1: without end


class StorageConfig(Section):
    """Where runs are kept. With more than one node this is storage that every node sees."""

    path: Path = Path("runs")
    keep_checkpoints: PositiveInt = 2


class TrackingConfig(Section):
    """Where MLflow holds the run."""

    uri: str | None = None  # None: sqlite beside the runs
    experiment: str = "raydetr"
    log_every_steps: PositiveInt = 10


class RunConfig(Section):
    """A complete run. Recipes return one; nothing outside it changes what is trained."""

    recipe: str
    seed: int = Field(default=0, ge=0)
    data: DataConfig
    model: ModelConfig = Field(discriminator="paper")
    optim: OptimConfig
    init: InitConfig = InitConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    cluster: ClusterConfig = ClusterConfig()
    storage: StorageConfig = StorageConfig()
    tracking: TrackingConfig = TrackingConfig()


def from_dict(values: Mapping[str, Any]) -> RunConfig:
    """Validate nested values into a RunConfig.

    Raises:
        ConfigError: a key is unknown, missing, or has a value of the wrong type.
    """
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_explain(error)) from None


def to_dict(config: RunConfig) -> dict[str, Any]:
    """The configuration as nested plain values (what YAML and JSON can hold)."""
    return config.model_dump(mode="json")


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values as {dotted path: value}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        path = f"{prefix}{key}"
        flat |= flatten(value, f"{path}.") if isinstance(value, Mapping) and value else {path: value}
    return flat


def override(config: RunConfig, assignments: Mapping[str, Any]) -> RunConfig:
    """A copy of `config` with the values at some dotted paths replaced.

    Raises:
        ConfigError: a path does not exist (the nearest one is named) or a value does not fit.
    """
    values = to_dict(config)
    for path, value in assignments.items():
        _assign(values, path, value)
    return from_dict(values)


def parse_assignments(arguments: Iterable[str]) -> dict[str, Any]:
    """`["optim.lr=2e-4"]` as {"optim.lr": 2e-4}; values are YAML scalars or lists.

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
    """The configuration as YAML that `from_yaml` reads back to an equal one."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def from_yaml(path: Path) -> RunConfig:
    """Read a configuration file.

    Raises:
        ConfigError: the file is missing, is no YAML mapping, or does not hold a valid configuration.
    """
    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML ({error})") from None
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path}: holds {type(values).__name__}, not a mapping; `raydetr config` prints one"
        )
    try:
        return from_dict(values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean X?` for the known word most like `word`, or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def _parse_value(path: str, text: str) -> Any:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
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
        if isinstance(node, dict) and f"{'.'.join(parents[:depth])}.".startswith(_FREE):
            node.setdefault(key, {} if depth < len(parents) else None)
        if not isinstance(node, dict) or key not in node:
            raise ConfigError(f"{path}: no such setting{nearest(path, _all_paths(values))}")
        if key is not leaf:
            node = node[key]
    if isinstance(node[leaf], dict) and not f"{path}.".startswith(_FREE):
        raise ConfigError(f"{path} is a section: set one of {', '.join(sorted(node[leaf]))} below it")
    node[leaf] = value


def _all_paths(values: Mapping[str, Any]) -> list[str]:
    return list(flatten(values))


def _explain(error: ValidationError) -> str:
    return "; ".join(_explain_problem(problem) for problem in error.errors())


def _explain_problem(problem: ErrorDetails) -> str:
    # pydantic names the variant of `model` in the location: model.dino.num_queries
    path = ".".join(str(part) for part in problem["loc"] if part not in _VARIANTS)
    if problem["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"{path}: no such setting{nearest(path, known_paths(RunConfig))}"
    if problem["type"] == "missing":
        return f"{path}: missing"
    if problem["type"] == "value_error":  # of a whole section, by our own check
        return f"{path}: {problem['msg'].removeprefix('Value error, ')}"
    return f"{path}: {problem['msg']}, found {problem['input']!r}"


def known_paths(kind: Any, prefix: str = "") -> list[str]:
    """All dotted paths below a section's type, those of every variant of the model included."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        fields = {name: field.annotation for name, field in kind.model_fields.items()}
    elif dataclasses.is_dataclass(kind) and isinstance(kind, type):
        hints = get_type_hints(kind)
        fields = {field.name: hints[field.name] for field in dataclasses.fields(kind)}
    else:
        variants = [part for part in get_args(kind) if isinstance(part, type)]
        nested = [path for part in variants for path in known_paths(part, prefix)]
        return list(dict.fromkeys(nested)) or [prefix.removesuffix(".")]
    return [path for name, part in fields.items() for path in known_paths(part, f"{prefix}{name}.")]
