"""One case from gate to rows."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from . import peak
from .ceilings import Ceilings
from .gate import Gate, Say, quiet
from .machine import Machine
from .problem import Case, Trial, UnavailableError, Variant
from .rows import NAN, Row
from .timing import Subject, Summary, interleave


@dataclass(frozen=True)
class Run:
    """What every row of one run has in common."""

    date: str
    machine: Machine
    ceilings: Ceilings
    complete: bool
    budget_s: float
    quick: bool = False


def run_case(run: Run, case: Case, say: Say = quiet) -> list[Row]:
    """Gates each variant of `case`, times those that pass, and returns a row for every one."""
    gate = Gate.of(case, run.quick, say)
    say("timing")
    subjects = [
        Subject(name, trial.run, trial.reset if case.restore else None)
        for name, trial in gate.trials.items()
    ]
    min_samples, max_samples = (3, 10) if run.quick else (5, 200)
    times = interleave(subjects, run.budget_s, min_samples, max_samples) if subjects else {}
    peaks = {name: _peak_bytes(trial) for name, trial in gate.trials.items()}
    return [
        _row(run, case, v, gate, times.get(v.name), peaks.get(v.name, NAN)) for v in case.variants
    ]


def _peak_bytes(trial: Trial) -> float:
    trial.reset()
    try:
        return peak.during(trial.run)
    except UnavailableError:
        return NAN


def _row(
    run: Run,
    case: Case,
    variant: Variant,
    gate: Gate,
    summary: Summary | None,
    peak_bytes: float,
) -> Row:
    time = summary or Summary(NAN, NAN, NAN, 0)
    verdict = gate.verdicts.get(variant.name)
    bound, floor_us = run.ceilings.bound(case.flops, case.moved_bytes)
    machine = asdict(run.machine)
    return Row(
        date=run.date,
        complete=run.complete,
        op=case.op,
        case=case.id,
        backend=variant.name,
        ours=variant.ours,
        direction=case.direction,
        dtype=case.dtype_name,
        shape=case.shape,
        reason=gate.reasons.get(variant.name, ""),
        **asdict(time),
        peak_bytes=peak_bytes,
        moved_bytes=case.moved_bytes,
        flops=case.flops,
        bandwidth_gb_s=case.moved_bytes / time.time_us / 1e3,
        gflop_s=case.flops / time.time_us / 1e3 if case.flops else math.nan,
        bound=bound,
        roofline_percent=100 * floor_us / time.time_us,
        worst=verdict.worst if verdict else "",
        error=verdict.error if verdict else NAN,
        budget=verdict.budget if verdict else NAN,
        **asdict(run.ceilings),
        machine=machine.pop("name"),
        **machine,
    )
