from __future__ import annotations

import pytest

from raydetr.console import progress_bar


def test_the_bar_is_told_how_far_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("images") as progress:
        progress(1, 3)
        progress(3, 3)
    said = capsys.readouterr()
    assert "images" in said.err
    assert "3/3" in said.err
    assert said.out == ""  # which others read


def test_an_error_before_the_first_step_stands_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="nothing there"), progress_bar("images"):
        raise ValueError("nothing there")
    assert capsys.readouterr().err == ""
