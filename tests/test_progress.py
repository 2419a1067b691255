"""Progress: speeds, also of slow work, and lines where there is no terminal."""

import io

import pytest
from rich.console import Console

from reverie_jax import progress
from reverie_jax.progress import ProgressBars, format_rate


@pytest.mark.parametrize("seconds", [0.1, 45.0, 120.0])
def test_a_speed_is_known_from_the_first_progress_however_slow(seconds):
    now = [0.0]
    with ProgressBars("eval", console=Console(file=io.StringIO(), get_time=lambda: now[0])) as bars:
        assert bars.speed("answers") == 0
        for done in range(100, 150, 10):  # a resumed run: 100 were there before
            bars.update("answers", done, 200)
            assert bars.speed("answers") == pytest.approx(10 / seconds if done > 100 else 0)
            now[0] += seconds


@pytest.mark.parametrize(
    ("rate", "text"),
    [
        (0, "0"),
        (1 / 700, "0.00143"),
        (0.04, "0.04"),
        (0.999, "0.999"),
        (12.34, "12.3"),
        (99.96, "100"),
        (999.6, "1,000"),
        (12345.6, "12,346"),
    ],
)
def test_a_slow_rate_is_not_zero(rate, text):
    assert format_rate(rate) == text


def test_a_line_is_printed_each_minute_where_there_is_no_terminal(monkeypatch):
    now, out = [0.0], io.StringIO()
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with ProgressBars("train", console=Console(file=out, width=200)) as bars:
        for step, total in ((1, 2000), (2, 2000), (1003, 2000), (4, None)):
            bars.update("steps", step, total, "loss 1.000" if total else "")
            now[0] += 35
        bars.update("steps", 5, None)
    assert out.getvalue().splitlines() == [
        "reverie: train steps: 1,003 of 2,000, loss 1.000",
        "reverie: train steps: 5",
    ]
