"""What a person sees while a run goes on."""

from __future__ import annotations

import io
from dataclasses import replace

from raydetr.console import Display, Progress, duration

HALF = Progress(
    step=50,
    total_steps=100,
    first_step=20,
    epoch=1.0,
    epochs=2,
    seconds=60.0,
    images_per_second=80.0,
    loss=1.5,
)


def test_time_left_counts_from_where_this_attempt_began() -> None:
    assert HALF.seconds_left == 60.0 / 30 * 50
    assert replace(HALF, step=20).seconds_left is None


def test_a_line_says_epoch_step_loss_speed_time_left_and_ap() -> None:
    line = replace(HALF, ap=0.4567).line()
    for part in ("epoch 1.00/2", "step 50/100", "loss 1.500", "80 images/s", "left 1:40", "AP 0.457"):
        assert part in line
    assert "AP -" in HALF.line()


def test_durations_read_well() -> None:
    assert [duration(s) for s in (None, 0, 61, 3599.7, 3723)] == ["-", "0:00", "1:01", "1:00:00", "1:02:03"]


def test_without_a_terminal_there_is_a_plain_line_now_and_then_and_one_at_the_end() -> None:
    stream = io.StringIO()
    with Display(stream) as display:
        for step in range(50, 60):
            display.show(replace(HALF, step=step))
        display.show(replace(HALF, step=60, ap=0.5))
        display.show(replace(HALF, step=61, ap=0.5))
    lines = stream.getvalue().splitlines()
    # the first, the one with a new AP, the last; not one for each of the 12 steps
    assert [line.split("  ")[2] for line in lines] == ["step 50/100", "step 60/100", "step 61/100"]
    assert "\x1b" not in stream.getvalue()
