"""Mark runs whose driver died without a word, in their events and in MLflow."""

from __future__ import annotations

from collections.abc import Iterable

from raydetr.console import print_status
from raydetr.runs.run_tracking import unsent
from raydetr.runs.state import RunState, list_runs
from raydetr.store.folders import Folder
from raydetr.tracking.events import EventLog, read_events
from raydetr.tracking.upload_process import UploadProcess


def mark_lost(states: Iterable[RunState]) -> None:
    """Log that runs are lost, once each, and upload that; MLflow then shows them as failed, until they are resumed.

    What cannot be written or uploaded is a warning.

    Args:
        states: of runs and searches; the trials of a lost search are marked as well.
    """
    for state in states:
        if state.state != "lost":
            continue
        trials = list_runs(state.folder) if state.kind == "search" else []
        lost = [state, *(trial for trial in trials if trial.state == "lost")]
        marked = [one for one in lost if _mark(one.folder)]
        if marked and _is_uploaded(state.folder):
            pending = UploadProcess(state.folder, None, lambda problem: None).finish()
            if pending is not None:
                print_status(f"warning: {unsent(pending, state.folder)}")


def _mark(run: Folder) -> bool:
    """Log that a run is lost, unless that was done; return whether it was logged."""
    kinds = [event["kind"] for event in read_events(run) if event["kind"] in ("launched", "lost")]
    if kinds[-1:] != ["launched"]:
        return False
    log = EventLog(run)
    log.append("lost", reason="its driver gives no sign of life")
    if not log.flush():
        print_status(f"warning: {run} is lost, and that cannot be logged: {log.problem}")
        return False
    return True


def _is_uploaded(run: Folder) -> bool:
    """Return whether the run's last driver uploads it."""
    return bool([event.get("upload", True) for event in read_events(run) if event["kind"] == "launched"][-1])
