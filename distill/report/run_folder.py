"""What a run has left in its folder, as the report reads it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distill.errors import DistillError

METRICS, SCORES, RECIPE, ENVIRONMENT = (
    "metrics.jsonl",
    "scores.json",
    "recipe.yaml",
    "environment.json",
)
CONTROLS = "controls"  # a folder of runs, each a control


def control_students(path: Path) -> dict[str, Path]:
    """Folders of the finished controls of a run, by name."""
    return {folder.parent.name: folder for folder in sorted((path / CONTROLS).glob("*/student"))}


@dataclass(frozen=True)
class Curve:
    """Values over the tokens of all stages so far."""

    tokens: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class RunFolder:
    """lines: of metrics.jsonl, `tokens` counted over all stages; scores: what `assess` returns."""

    path: Path
    lines: list[dict[str, Any]]
    scores: dict[str, Any]
    recipe: str
    environment: dict[str, Any]
    controls: dict[str, RunFolder]

    @classmethod
    def read(cls, path: Path) -> RunFolder:
        """Reads what is there; at least metrics or scores must be.

        Raises:
            DistillError: there is neither, or a file is damaged.
        """
        if not (path / METRICS).exists() and not (path / SCORES).exists():
            raise DistillError(f"report: {path} must have {METRICS} or {SCORES}, got neither")
        recipe = path / RECIPE
        controls = sorted((path / CONTROLS).glob(f"*/{METRICS}"))
        return cls(
            path,
            list(_over_stages(_lines(path / METRICS))),
            _json(path / SCORES),
            recipe.read_text() if recipe.exists() else "",
            _json(path / ENVIRONMENT),
            {file.parent.name: cls.read(file.parent) for file in controls},
        )

    @property
    def stages(self) -> list[str]:
        """In their order."""
        return list(dict.fromkeys(str(line.get("stage", "")) for line in self.lines))

    def curve(self, *names: str, stage: str | None = None) -> Curve:
        """A value by its path within a line, where a line has it."""
        curve = Curve()
        for line in self.lines:
            value: Any = line
            for name in names:
                value = value.get(name) if isinstance(value, dict) else None
            if _is_finite(value) and stage in (None, line.get("stage")):
                curve.tokens.append(line["tokens"])
                curve.values.append(float(value))
        return curve

    def names(self, part: str, stage: str | None = None) -> list[str]:
        """Of the values that lines have within `part`."""
        found = (
            line[part]
            for line in self.lines
            if isinstance(line.get(part), dict) and stage in (None, line.get("stage"))
        )
        return list(dict.fromkeys(name for values in found for name in values))


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise DistillError(f"report: {path} is damaged: {error}") from error
    if not isinstance(found, dict):
        raise DistillError(f"report: {path} must hold an object, got {type(found).__name__}")
    return found


def _lines(path: Path) -> list[dict[str, Any]]:
    """A step that a continued run did again counts as it was the last time."""
    texts = path.read_text().split("\n") if path.exists() else []
    lines: dict[Any, dict[str, Any]] = {}
    for number, text in enumerate(texts, 1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
            if not isinstance(line, dict) or not isinstance(line.get("tokens", 0), int | float):
                raise ValueError("it must be an object, its tokens a number")
        except ValueError as error:
            if number == len(texts):  # a killed run's last, not closed
                continue
            raise DistillError(f"report: {path} is damaged in line {number}: {error}") from error
        key = (line.get("stage"), line.get("step"), "heldout" in line)
        lines.pop(key, None)
        lines[key] = line
    return list(lines.values())


def _over_stages(lines: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Where each stage counts its tokens from 0, go on from the stage before."""
    before, last, stage = 0, 0, None
    for line in lines:
        tokens = line.get("tokens", last - before)
        if line.get("stage") != stage and tokens + before < last:
            before = last
        stage, last = line.get("stage"), max(last, tokens + before)
        yield line | {"tokens": tokens + before}
