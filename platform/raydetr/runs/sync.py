"""Upload runs to MLflow after their end, from their events."""

from __future__ import annotations

from collections.abc import Iterator

from raydetr.config import ConfigError
from raydetr.console import print_status
from raydetr.locations import absolute_tracking_uri, base_folder
from raydetr.store.folders import open_folder
from raydetr.tracking.upload_process import runs_in


def sync_run(location: str, uri: str | None = None) -> Iterator[str]:
    """Upload what MLflow lacks of a run, or of a search and its trials; yield a line for each.

    Args:
        location: its folder or URL.
        uri: the tracking URI; None: that of the run.

    Raises:
        ConfigError: there is no run.
        OSError: the run cannot be read.
        TrackingError: MLflow cannot be reached, or refuses.
    """
    from raydetr.tracking.uploader import Uploader  # mlflow takes seconds to import

    folder = open_folder(location)
    uri = None if uri is None else absolute_tracking_uri(uri, base_folder())
    if not (folder / "events").exists():
        raise ConfigError(f"{folder}: not the folder of a run or a search (events/ is missing)")
    for run in runs_in(folder):
        uploader = Uploader(run, uri)
        uploader.collect()
        pending = uploader.pending
        if pending is not None:
            print_status(f"{run.name}: sending {pending}")
        uploader.sync()
        yield f"{run.name}: {'complete' if pending is None else f'sent {pending}'}"
