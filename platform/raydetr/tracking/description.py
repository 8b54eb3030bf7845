"""Describe a run in Markdown, for its page in MLflow: AP, pictures, and the command that trains it again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from raydetr.store.folders import Folder
from raydetr.tracking.events import Event, EventReader

CURVES, PREDICTIONS = "curves.png", "predictions.png"
PICTURES = PREDICTIONS, CURVES  # in the folder of a run, of its last evaluation
NUMBERS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


def describe(run: Folder, launch: Event, run_id: str) -> str:
    """Return the description of a run with the evaluations so far.

    Args:
        run: its folder.
        launch: its first event.
        run_id: of the MLflow run, whose artifacts have the pictures.
    """
    events = EventReader(run, all_steps=False).read()
    evaluations = [event for event in events if event["kind"] == "evaluation"]
    evaluations.sort(key=lambda event: int(event["step"]))  # not always scored in this order
    text = [f"**{launch['recipe']}** in `{run}`", ""]
    if evaluations:
        text += _ap_table(evaluations)
        text += [f"![{name}](get-artifact?path={name}&run_uuid={run_id})\n" for name in PICTURES]
    num_restarts = sum(event["kind"] == "restart" for event in events)
    if num_restarts:
        text += [f"The workers were started again {num_restarts} times.", ""]
    text += ["Train it again:", "", "```bash", launch["command"], "```"]
    return "\n".join(text)


def _ap_table(evaluations: list[Event]) -> list[str]:
    scored = [event for event in evaluations if event["metrics"].get("AP") is not None]
    best = max(scored, key=lambda event: float(event["metrics"]["AP"]), default=None)
    rows: list[tuple[str, Mapping[str, Any]]] = [("last", evaluations[-1]["metrics"])]
    if best is not None:
        rows.append(("best", best["metrics"]))
    lines = [f"| | epoch | {' | '.join(NUMBERS)} |", f"|---|---|{'---|' * len(NUMBERS)}"]
    for title, metrics in rows:
        cells = [_number(metrics.get(name)) for name in NUMBERS]
        lines.append(f"| {title} | {json.dumps(metrics.get('epoch'))} | {' | '.join(cells)} |")
    return [*lines, ""]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
