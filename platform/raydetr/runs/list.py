"""Print the states of runs as a table, with what to do about those that have ended before their end."""

from __future__ import annotations

from collections.abc import Sequence

from raydetr.console import duration, table
from raydetr.runs.state import RunState

HEAD = ("name", "kind", "state", "epoch", "done", "AP best", "AP last", "restarts", "last event")


def to_table(states: Sequence[RunState], storage: str, now: float) -> str:
    """Return a line for each run, followed by the reason and the remedy of each that did not finish.

    Args:
        states: of the runs.
        storage: where they are, as the user has named it.
        now: seconds since 1970.
    """
    if not states:
        return f"{storage}: no runs"
    lines = [table([HEAD, *(_row(state, now) for state in states)])]
    for state in states:
        about = "; ".join(text for text in (state.reason and _short(state.reason), state.remedy) if text)
        if about:
            lines.append(f"{state.name} ({state.state}): {about}")
    return "\n".join(lines)


def _row(state: RunState, now: float) -> tuple[str, ...]:
    ago = "-" if state.last_time is None else f"{ago_text(now - state.last_time)} ago"
    if state.num_trials is not None:
        epoch = f"{state.num_trials} trials"
    elif state.epoch is None:
        epoch = "-"
    else:
        epoch = f"{state.epoch:.2f}/{state.epochs}"
    return (
        state.name,
        state.kind,
        state.state,
        epoch,
        "-" if state.fraction is None else f"{state.fraction:.0%}",
        _ap(state.ap_best),
        _ap(state.ap_last),
        str(state.restarts),
        ago if state.last_event is None else f"{state.last_event}, {ago}",
    )


def ago_text(seconds: float) -> str:
    """Format how long something is ago, in its largest unit but for short times; the future is 0."""
    seconds = max(0.0, seconds)
    if seconds < 3600:
        return duration(seconds)
    hours = seconds / 3600
    return f"{hours:.1f} hours" if hours < 48 else f"{hours / 24:.0f} days"


def _ap(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _short(reason: str) -> str:
    first = reason.strip().splitlines()[0] if reason.strip() else reason
    return first if len(first) <= 160 else first[:159] + "…"
