"""What the user sees while a run goes on: a live bar on a terminal, sparse lines elsewhere."""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
)
from rich.table import Column, Table
from rich.text import Text

PLAIN_INTERVAL_S = 10.0


def table_of(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """Numbers to print; the first column names the rows."""
    table = Table(box=box.SIMPLE_HEAD)
    for at, head in enumerate(heads):
        table.add_column(head, justify="right" if at else "left")
    for row in rows:
        table.add_row(*row)
    return table


def seconds(value: float) -> str:
    """A duration to read: 42 s, 3 min 05 s."""
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def rate(tokens_per_s: float) -> str:
    """A throughput to read: 850, 12.3k."""
    return f"{tokens_per_s / 1e3:.1f}k" if tokens_per_s >= 1e3 else f"{tokens_per_s:.0f}"


class Reporter:
    """Messages and one meter at a time on a console."""

    def __init__(self, console: Console):
        self.console = console
        self.live = console.is_terminal and not console.is_dumb_terminal

    def say(self, message: str) -> None:
        self.console.print(message, markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def meter(self, title: str, total: int, start: int = 0) -> "Iterator[Meter]":
        """A meter for a piece of work of `total` steps, `start` of which are already done."""
        if not self.live:
            yield PlainMeter(self, title, total, start)
            return
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}", table_column=Column(min_width=17)),
            BarColumn(bar_width=None, table_column=Column(ratio=1)),
            TextColumn("{task.completed:>4.0f}/{task.total:.0f}"),
            StatusColumn(),
        )
        with Progress(*columns, console=self.console, expand=True) as progress:
            task = progress.add_task(title, total=total, completed=start, status="")
            yield LiveMeter(progress, task, total, start)


class Within(Reporter):
    """Meters of a recipe under a name; what it says of itself is in its run folder."""

    def __init__(self, outer: Reporter, name: str):
        super().__init__(outer.console)
        self.outer, self.name = outer, name

    def say(self, message: str) -> None:
        pass

    @contextmanager
    def meter(self, title: str, total: int, start: int = 0) -> "Iterator[Meter]":
        with self.outer.meter(f"{self.name}: {title}", total, start) as meter:
            yield meter


class StatusColumn(ProgressColumn):
    """Loss, tokens/s and time left, as the meter last put them."""

    def render(self, task: Task) -> Text:
        return Text(task.fields["status"], style="cyan")


class Pace:
    """Tokens per second and the time left, from the steps this process has done."""

    def __init__(self, total: int, start: int):
        self.total, self.start, self.began, self.tokens = total, start, time.perf_counter(), 0

    def status(
        self, done: int, loss: float | None, tokens: int, losses: Mapping[str, float]
    ) -> str:
        self.tokens += tokens
        elapsed = max(time.perf_counter() - self.began, 1e-9)
        left = elapsed / max(done - self.start, 1) * (self.total - done)
        parts = [f"loss {loss:.3f}"] if loss is not None else []
        parts += [f"{name} {value:.3f}" for name, value in losses.items()]
        parts += [f"{rate(self.tokens / elapsed)} tokens/s"] if self.tokens else []
        return "  ".join([*parts, f"{seconds(left)} left"])


class Meter:
    """Takes one call for every step done."""

    def __init__(self, total: int, start: int):
        self.total, self.pace = total, Pace(total, start)

    def update(
        self,
        done: int,
        loss: float | None = None,
        tokens: int = 0,
        parts: Mapping[str, float] | None = None,
    ) -> None:
        """parts: of the loss, by name."""
        self.show(done, self.pace.status(done, loss, tokens, parts or {}))

    def show(self, done: int, status: str) -> None:
        raise NotImplementedError


class LiveMeter(Meter):
    def __init__(self, progress: Progress, task: TaskID, total: int, start: int):
        super().__init__(total, start)
        self.progress, self.task = progress, task

    def show(self, done: int, status: str) -> None:
        self.progress.update(self.task, completed=done, status=status)


class PlainMeter(Meter):
    """One line at the start, at the end, and at most every `PLAIN_INTERVAL_S` seconds."""

    def __init__(self, reporter: Reporter, title: str, total: int, start: int):
        super().__init__(total, start)
        self.reporter, self.title, self.said_at = reporter, title, -PLAIN_INTERVAL_S

    def show(self, done: int, status: str) -> None:
        now = time.perf_counter()
        if done >= self.total or now - self.said_at >= PLAIN_INTERVAL_S:
            self.said_at = now
            self.reporter.say(f"{self.title}  {done}/{self.total}  {status}")
