"""Interleaved timing with a settled warm-up; times in microseconds."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

SHORT_CALL_US = 100.0  # shorter calls are timed several at once, as the clock costs 0.1 us
SETTLED = 0.95  # warm when a call is no longer 5 % faster than the best before it
SLOW_SHARE = 8  # a variant this many times slower than the fastest sits rounds out


@dataclass(frozen=True)
class Summary:
    """Median and 20th and 80th percentile of the samples, in microseconds."""

    time_us: float
    p20_us: float
    p80_us: float
    samples: int


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear interpolation between the two nearest of the sorted values."""
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def summarize(samples_us: Sequence[float]) -> Summary:
    p20, p50, p80 = (percentile(samples_us, percent) for percent in (20, 50, 80))
    return Summary(p50, p20, p80, len(samples_us))


@dataclass
class Subject:
    """Something to time: `run` is inside the clock, `reset` before it and outside."""

    name: str
    run: Callable[[], object]
    reset: Callable[[], None] | None = None
    calls: int = 1  # calls in one sample
    turn: int = 1  # takes part in every turn-th round
    samples_us: list[float] = field(default_factory=list)

    def sample(self) -> float:
        """Microseconds of one call. Its results are freed after the clock has stopped."""
        if self.reset is not None:
            self.reset()
        run = self.run
        if self.calls == 1:
            began = time.perf_counter_ns()
            result = run()
            elapsed_ns = time.perf_counter_ns() - began
            del result
            return elapsed_ns / 1e3
        rounds = range(self.calls)
        began = time.perf_counter_ns()
        for _ in rounds:
            run()
        return (time.perf_counter_ns() - began) / 1e3 / self.calls


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def settle(subject: Subject, limit_s: float = 1.0) -> float:
    """Calls `subject` until it is warm, and returns its best time in microseconds.

    Ends early after `limit_s` seconds; always calls twice, unless one call takes that long.
    """
    deadline = time.perf_counter() + limit_s
    best_us = subject.sample()
    while time.perf_counter() < deadline:
        time_us = subject.sample()
        settled = time_us >= SETTLED * best_us
        best_us = min(best_us, time_us)
        if settled:
            break
    return best_us


def schedule(subjects: Sequence[Subject], best_us: Sequence[float]) -> None:
    """Sets calls per sample, and lets variants far slower than the fastest sit rounds out."""
    fastest_us = min(best_us)
    for subject, time_us in zip(subjects, best_us, strict=True):
        if subject.reset is None and time_us < SHORT_CALL_US:
            subject.calls = math.ceil(SHORT_CALL_US / max(time_us, 0.1))
        subject.turn = min(32, max(1, round(time_us / fastest_us / SLOW_SHARE)))


def interleave(
    subjects: Sequence[Subject],
    budget_s: float,
    min_samples: int = 5,
    max_samples: int = 200,
) -> dict[str, Summary]:
    """Times the subjects in turn, call by call; the first of a round is another one each time.

    Goes on for `budget_s` seconds, longer if one of them has fewer than `min_samples` by then, and
    stops when the one with the fewest has `max_samples`.
    """
    schedule(subjects, [settle(subject) for subject in subjects])
    with no_garbage_collection():
        deadline = time.perf_counter() + budget_s
        number = 0
        while True:
            first = number % len(subjects)
            for subject in (*subjects[first:], *subjects[:first]):
                if number % subject.turn == 0:
                    subject.samples_us.append(subject.sample())
            number += 1
            fewest = min(len(subject.samples_us) for subject in subjects)
            if fewest >= max_samples or (fewest >= min_samples and time.perf_counter() >= deadline):
                break
    return {subject.name: summarize(subject.samples_us) for subject in subjects}
