"""Status lines, the progress of a run, and progress bars, as they appear in the terminal."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest

from raydetr.console import Display, RunProgress, duration, progress_bar, table

HALF = RunProgress(
    step=50,
    total_steps=100,
    first_step=20,
    epoch=1.0,
    epochs=2,
    seconds=60.0,
    images_per_second=80.0,
    loss=1.5,
)


def test_time_left_counts_from_the_first_step_of_this_process() -> None:
    assert HALF.seconds_left == 60.0 / 30 * 50
    assert replace(HALF, step=20).seconds_left is None


def test_a_line_has_epoch_step_loss_speed_time_left_and_ap() -> None:
    line = replace(HALF, ap=0.4567).line()
    for part in ("epoch 1.00/2", "step 50/100", "loss 1.500", "80 images/s", "left 1:40", "AP 0.457"):
        assert part in line
    assert "AP -" in HALF.line()


def test_columns_of_a_table_are_aligned() -> None:
    rows = [["name", "AP", "objects"], ["cat", "0.5", ""], ["a longer one", "-", "12"]]
    assert table(rows).splitlines() == [
        "name          AP   objects",
        "cat           0.5",
        "a longer one  -    12",
    ]
    assert table(rows, right=True).splitlines() == [
        "name           AP  objects",
        "cat           0.5",
        "a longer one    -       12",
    ]


def test_durations_are_formatted() -> None:
    assert [duration(s) for s in (None, 0, 61, 3599.7, 3723)] == ["-", "0:00", "1:01", "1:00:00", "1:02:03"]


def test_without_a_terminal_plain_lines_are_printed_now_and_then_and_at_the_end() -> None:
    stream = io.StringIO()
    with Display(stream) as display:
        for step in range(50, 60):
            display.show(replace(HALF, step=step))
        display.show(replace(HALF, step=60, ap=0.5))
        display.show(replace(HALF, step=61, ap=0.5))
    with Display(stream) as display:
        display.show(replace(HALF, step=62))
    lines = stream.getvalue().splitlines()
    # The first, the one with a new AP, and the last; not one for each of the 12 steps, and none twice
    assert [line.split("  ")[2] for line in lines] == [f"step {n}/100" for n in (50, 60, 61, 62)]
    assert "\x1b" not in stream.getvalue()


def test_a_progress_bar_is_drawn_on_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("images") as progress:
        progress(1, 3)
        progress(3, 3)
    printed = capsys.readouterr()
    assert "images" in printed.err
    assert "3/3" in printed.err
    assert printed.out == ""  # Reserved for results


def test_an_error_before_the_first_step_is_printed_without_a_bar(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="nothing there"), progress_bar("images"):
        raise ValueError("nothing there")
    assert capsys.readouterr().err == ""
