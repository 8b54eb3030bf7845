"""The metrics file of a run after a kill and a resume."""

from __future__ import annotations

from pathlib import Path

from raydetr.tracking.history import History


def test_a_resumed_run_drops_rows_after_its_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    first = History(path, position=0, is_writer=True)
    first.append(10, 160, {"loss": 3.0})
    first.append(20, 320, {"AP": 0.25})
    first.append(30, 480, {"loss": 1.0})
    with path.open("a") as file:
        file.write('{"step": 40, "posi')  # killed within a line
    resumed = History(path, position=320, is_writer=True)
    assert [row["step"] for row in resumed.rows] == [10, 20]
    assert resumed.last_ap() == 0.25
    resumed.append(30, 480, {"loss": 2.0})
    again = History(path, position=480, is_writer=False)
    assert [(row["step"], row.get("loss")) for row in again.rows] == [(10, 3.0), (20, None), (30, 2.0)]


def test_other_workers_read_but_do_not_write(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    History(path, position=0, is_writer=False)
    assert not path.exists()
