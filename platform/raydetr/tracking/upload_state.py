"""Keep in the folder of a run how far its upload to MLflow got."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field

from raydetr.store.folders import Folder, write_file
from raydetr.tracking.events import EventReader

STATE = "mlflow.json"


@dataclass
class UploadState:
    """The id of the MLflow run, and what it has."""

    uri: str | None = None  # where, as it is stored
    run_id: str | None = None
    experiment_id: str | None = None
    done: dict[str, int] = field(default_factory=dict)  # bytes of each segment of events
    last_steps: dict[str, int] = field(default_factory=dict)  # the last step of each metric
    steps_before: dict[str, int] = field(default_factory=dict)  # the same when the newest process began
    evaluated_steps: list[int] = field(default_factory=list)

    @classmethod
    def read(cls, run: Folder) -> UploadState:
        """Read the state; without a valid one, everything is sent again.

        Raises:
            OSError: it cannot be read.
        """
        try:
            return cls(**json.loads((run / STATE).read_text()))
        except (FileNotFoundError, ValueError, TypeError):
            return cls()

    def write(self, run: Folder) -> None:
        """Write it.

        Raises:
            OSError: it cannot be written.
        """
        write_file(run / STATE, json.dumps(asdict(self)).encode())


def is_uploaded(run: Folder) -> bool:
    """Return whether MLflow has all events of the run in a folder.

    Raises:
        OSError: they cannot be read.
    """
    return not EventReader(run, UploadState.read(run).done).read()


def read_run_id(run: Folder) -> str | None:
    """Return the id of the MLflow run of the run in a folder; None if it was not created yet."""
    return UploadState.read(run).run_id


def page_of(run: Folder, uri: str) -> str | None:
    """Return the address of the page of a run on an MLflow server; None without a server, or before there is a page.

    Args:
        run: folder of the run.
        uri: the tracking URI.
    """
    state = UploadState.read(run)
    if state.run_id is None or not uri.startswith(("http://", "https://")):
        return None
    # Without the query, a browser that MLflow does not know yet shows the pages for language models
    page = f"#/experiments/{state.experiment_id}/runs/{state.run_id}?workflowType=machine_learning"
    return f"{uri.rstrip('/')}/{page}"
