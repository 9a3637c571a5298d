"""One row per measurement, appended to benchmarks/results/<machine>/<op>.csv."""

from __future__ import annotations

import csv
import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

RESULTS = Path(__file__).resolve().parent / "results"
NAN = math.nan


@dataclass(frozen=True)
class Row:
    """A measurement, or the reason why there is none (then the times are NaN).

    date names the run. complete: the run had every case of the op. error and budget: relative
    2-norm error of the `worst` result against the float64 reference, and what our kernels are
    allowed. roofline_percent: of the ceiling that `bound` names, which was measured in the same
    run; NaN where latency is the bound. peak_bytes: the most that a call held beyond what was there
    before it, results among it; NaN where that cannot be known.
    """

    date: str
    complete: bool
    op: str
    case: str
    backend: str
    ours: bool
    direction: str
    dtype: str
    shape: str
    reason: str
    time_us: float
    p20_us: float
    p80_us: float
    samples: int
    peak_bytes: float
    moved_bytes: int
    flops: int
    bandwidth_gb_s: float
    gflop_s: float
    bound: str
    roofline_percent: float
    worst: str
    error: float
    budget: float
    copy_gb_s: float
    sgemm_gflop_s: float
    fresh_clone_gb_s: float
    device: str
    machine: str
    threads: int
    isa: str
    torch: str
    python: str
    commit: str
    dirty: bool
    load: float

    @property
    def measured(self) -> bool:
        return not math.isnan(self.time_us)


AnyRow = TypeVar("AnyRow")
_READERS = {"bool": lambda text: text == "True", "int": int, "float": float, "str": str}


def append(path: Path, rows: Sequence[Any]) -> None:
    """Adds rows of one dataclass to the file; the first line of a new one names the columns."""
    columns = _columns(type(rows[0]))
    path.parent.mkdir(parents=True, exist_ok=True)
    exists = path.exists()
    if exists:
        _check_columns(path, columns)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if not exists:
            writer.writeheader()
        for row in rows:
            writer.writerow({name: _text(value) for name, value in vars(row).items()})


def read(path: Path, kind: type[AnyRow]) -> list[AnyRow]:
    _check_columns(path, _columns(kind))
    with path.open(newline="") as file:
        return [_parse(record, kind) for record in csv.DictReader(file)]


def newest_complete(rows: Iterable[Row]) -> list[Row]:
    """The rows of the last run that had every case, or [] when there is none."""
    complete = [row for row in rows if row.complete]
    last = max((row.date for row in complete), default="")
    return [row for row in complete if row.date == last]


def _columns(kind: type) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


def _parse(record: dict[str, str], kind: type[AnyRow]) -> AnyRow:
    types = {field.name: str(field.type) for field in dataclasses.fields(kind)}
    return kind(**{name: _READERS[types[name]](text) for name, text in record.items()})


def _text(value: object) -> object:
    """Floats to five digits: the sixth is noise."""
    return f"{value:.5g}" if isinstance(value, float) else value


def _check_columns(path: Path, columns: list[str]) -> None:
    with path.open(newline="") as file:
        found = next(csv.reader(file), [])
    if found != columns:
        raise ValueError(f"{path}: its columns are not those of this version; move it away")
