"""A live bar where there is a terminal, sparse lines where there is none."""

import io

import pytest
from rich.console import Console

from distill.progress import Reporter, rate, seconds


def meter_output(monkeypatch, steps: int, step_s: float, **console) -> str:
    """What a meter writes over `steps` steps of `step_s` seconds each on a pretended clock."""
    now = 100.0
    monkeypatch.setattr("distill.progress.time.perf_counter", lambda: now)
    output = io.StringIO()
    with Reporter(Console(file=output, width=100, **console)).meter("teacher", steps) as meter:
        for step in range(steps):
            now += step_s
            meter.update(step + 1, loss=2.5, tokens=1000)
    return output.getvalue()


def test_plain_lines_come_every_ten_seconds(monkeypatch):
    lines = meter_output(monkeypatch, steps=60, step_s=0.5).splitlines()
    assert [line.split()[1] for line in lines] == ["1/60", "21/60", "41/60", "60/60"]
    assert lines[1] == "teacher  21/60  loss 2.500  2.0k tokens/s  20 s left"


def test_dumb_terminal_gets_plain_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    text = meter_output(monkeypatch, steps=3, step_s=0.5, force_terminal=True)
    assert "\x1b" not in text and "\r" not in text


def test_terminal_gets_a_bar_with_loss_rate_and_time_left(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    text = meter_output(monkeypatch, steps=3, step_s=0.5, force_terminal=True)
    assert "\x1b[" in text
    for part in ("teacher", "3/3", "loss 2.500", "2.0k tokens/s", "0 s left"):
        assert part in text


def test_resumed_meter_counts_only_its_own_steps(monkeypatch):
    now = 0.0
    monkeypatch.setattr("distill.progress.time.perf_counter", lambda: now)
    output = io.StringIO()
    with Reporter(Console(file=output, width=100)).meter("student", 100, start=90) as meter:
        now = 1.0
        meter.update(91, loss=1.0, tokens=500)
    assert output.getvalue() == "student  91/100  loss 1.000  500 tokens/s  9 s left\n"


@pytest.mark.parametrize(
    ("value", "text"), [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (185, "3 min 05 s")]
)
def test_seconds(value, text):
    assert seconds(value) == text


@pytest.mark.parametrize(("value", "text"), [(850, "850"), (12_340, "12.3k")])
def test_rate(value, text):
    assert rate(value) == text
