"""Upload runs to MLflow after their end, from their events."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from raydetr.config import ConfigError
from raydetr.console import print_status
from raydetr.locations import absolute_tracking_uri, base_folder
from raydetr.store.folders import open_folder
from raydetr.tracking.upload_process import MAX_ERRORS, runs_in
from raydetr.tracking.uris import TrackingError


def sync_runs(locations: Sequence[str], uri: str | None = None) -> Iterator[str]:
    """Upload what MLflow lacks of runs, and of searches and their trials; yield a line for each.

    One that fails does not keep the others from being uploaded.

    Args:
        locations: their folders or URLs.
        uri: the tracking URI; None: that of each run.

    Raises:
        TrackingError: some were not uploaded; the message has the reason for each.
    """
    uri = None if uri is None else absolute_tracking_uri(uri, base_folder())
    failures: list[str] = []
    for location in locations:
        try:
            yield from _sync(location, uri, failures)
        except (ValueError, OSError) as error:
            failures.append(str(error))
    if len(failures) == 1:
        raise TrackingError(failures[0])
    if failures:
        lines = "".join(f"\n  {failure}" for failure in failures)
        raise TrackingError(f"{len(failures)} runs could not be uploaded:{lines}")


def _sync(location: str, uri: str | None, failures: list[str]) -> Iterator[str]:
    """Upload a run, or a search and its trials; after the second one that fails, MLflow is taken for away.

    Raises:
        ValueError: there is no run.
        OSError: the folder cannot be read.
    """
    from raydetr.tracking.uploader import Uploader  # mlflow takes seconds to import

    folder = open_folder(location)
    if not (folder / "events").exists():
        raise ConfigError(f"{folder}: not the folder of a run or a search (events/ is missing)")
    runs, num_failed = runs_in(folder), 0
    for run in runs:
        try:
            uploader = Uploader(run, uri)
            uploader.collect()
            pending = uploader.pending
            if pending is not None:
                print_status(f"{run.name}: sending {pending}")
            uploader.sync()
        except (OSError, TrackingError) as error:
            failures.append(f"{run}: {error}")
            num_failed += 1
            if num_failed == MAX_ERRORS:
                failures[-1] += "; the trials after it were not tried" if run != runs[-1] else ""
                return
            continue
        yield f"{run.name}: {'complete' if pending is None else f'sent {pending}'}"
