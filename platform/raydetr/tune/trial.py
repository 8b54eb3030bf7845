"""Run one trial of a search: a normal run that also reports its evaluations to Ray Tune."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback

from raydetr.config import RunConfig, flatten, override, to_dict
from raydetr.runs import run
from raydetr.runs.lease import LeaseError
from raydetr.runs.run_folder import read_config, write_config
from raydetr.training import checkpoint
from raydetr.tune.trials import Proposal

TUNE = "tune"  # folder of Ray Tune's own files in that of a search, while it runs
LEASE_SECONDS = 90.0  # until the lease of a process that was killed is free
# Settings of where a run is: a search that goes on may be elsewhere
_PLACES = ("storage.", "tracking.", "init.", "model.backbone.weights", "recipe")


@dataclass(frozen=True)
class SearchContext:
    """Configuration and names that all trials of a search have in common."""

    config: RunConfig  # resolved; its storage.path is the folder of the search
    name: str

    @property
    def folder(self) -> Path:
        """Folder of the search."""
        return Path(self.config.storage.path)

    def trial_name(self, number: int) -> str:
        """Return the name of a trial's run, which is also its folder in the folder of the search."""
        return f"{self.name}-{number:03d}"

    def trial_folder(self, number: int) -> Path:
        """Return the folder of a trial's run."""
        return self.folder / self.trial_name(number)


def as_tune_config(proposal: Proposal) -> dict[str, Any]:
    """Return what Ray Tune hands to `run_trial`; as text, in which Tune looks for nothing to resolve."""
    return {"proposal": json.dumps(asdict(proposal))}


def run_trial(tune_config: Mapping[str, Any], context: SearchContext) -> None:
    """Train what was proposed, from the newest checkpoint of the trial. Ray Tune calls it in a separate process.

    A failure of the run is reported: Tune, which would start the trial again, does that only if this process dies.
    """
    proposal = Proposal(**json.loads(tune_config["proposal"]))
    # Temporary folders are in one that the search removes: a process that ASHA stops cannot do that itself
    tempfile.tempdir = str(context.folder / TUNE)
    try:
        _train(proposal, context)
    except Exception as error:  # of any type; the search goes on with the other trials
        text = str(error).strip() or type(error).__name__
        tune.report({"failure": text if _is_told(error) else f"{type(error).__name__}: {text}"})


def _is_told(error: Exception) -> bool:
    """Return whether the message of an error is for users: then its type says nothing more."""
    return type(error).__module__.startswith(("raydetr.", "detrs."))


def _train(proposal: Proposal, context: SearchContext) -> None:
    config = override(context.config, proposal.overrides)
    folder, name = context.trial_folder(proposal.number), context.trial_name(proposal.number)
    epoch = proposal.until_epoch or config.optim.epochs
    callbacks: list[Any] = [TuneReportCallback()]  # type: ignore[no-untyped-call]
    deadline = time.monotonic() + LEASE_SECONDS
    while True:
        last = checkpoint.newest_valid(folder, lambda message: None)
        if last is not None and checkpoint.has_reached(last, epoch):  # killed after its last checkpoint
            tune.report(checkpoint.read_metrics(last) | {"placement_group": None})
            return
        if last is not None and not (folder / "config.yaml").exists():  # it took over before its first start
            write_config(folder, config)
        try:
            if last is None:
                run.start(config, name=name, or_resume=True, kind="trial", warn=False, callbacks=callbacks,
                          until_epoch=proposal.until_epoch)  # fmt: skip
            else:
                run.resume(folder, overrides=_changes(folder, config), kind="trial", callbacks=callbacks,
                           until_epoch=proposal.until_epoch)  # fmt: skip
            return
        except LeaseError:  # of the process before this one
            if time.monotonic() > deadline:
                raise
            time.sleep(1.0)


def _changes(folder: Path, config: RunConfig) -> dict[str, Any]:
    """Return the settings that the run in a folder is to have from now on, where they differ from those it has."""
    before, now = flatten(to_dict(read_config(folder))), flatten(to_dict(config))
    return {
        path: value
        for path, value in now.items()
        if before.get(path) != value and not path.startswith(_PLACES)
    }
