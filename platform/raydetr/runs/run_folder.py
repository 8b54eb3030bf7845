"""Describe a run: what all its workers get, and its configuration in its folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from raydetr.config import RunConfig, from_yaml, from_yaml_text, override, to_yaml
from raydetr.store.folders import Folder, write_file
from raydetr.tracking.uris import absolute_uri, storable_uri


@dataclass(frozen=True)
class Run:
    """A run, as all its workers get it."""

    config: RunConfig  # resolved: paths are absolute
    folder: Folder  # on storage that all nodes reach
    resume_from: Folder | None = None  # checkpoint folder
    waits_for_scores: bool = False  # the step after an evaluation waits for its AP: a search chooses by it
    until_epoch: int | None = None  # where it ends for now, to go on with other settings; None: at its end

    @property
    def last_epoch(self) -> int:
        """Epoch at which it ends, for now or at all."""
        return self.until_epoch or self.config.optim.epochs


def read_config(run: Folder) -> RunConfig:
    """Return the configuration of the run in a folder, which may have been moved with its runs.

    Raises:
        ConfigError: it is not a valid configuration.
        OSError: it cannot be read.
    """
    file = run / "config.yaml"
    config = from_yaml(file) if isinstance(file, Path) else from_yaml_text(file.read_text(), str(file))
    uri = config.tracking.uri
    return override(
        config,
        {
            "storage.path": str(run.parent),
            "tracking.uri": None if uri is None else absolute_uri(uri, run),
        },
    )


def write_config(run: Folder, config: RunConfig) -> None:
    """Write the configuration of a run to its folder.

    Raises:
        OSError: it cannot be written.
    """
    uri = config.tracking.uri
    stored = config if uri is None else override(config, {"tracking.uri": storable_uri(uri, run)})
    write_file(run / "config.yaml", to_yaml(stored).encode())
