"""Everything that only a GPU can show: `make gpu`, or for a part of it

    python -m benchmarks.gpu --op slstm --budget-s 540

builds, runs every operation's tests natively, then small ones under compute-sanitizer where that is
installed, and times the cases of operations whose tests pass. A step that is done is not done again
for the same commit: a call that runs out of its budget says so and exits with 75, and the next goes
on from there. Results: benchmarks/results/<gpu>/<op>.csv and summary.md.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch

from . import gpu_cases, machine, rows
from .gpu_cases import GpuCase

OK, RED, USAGE, GO_ON = 0, 1, 2, 75
NOTHING_TO_RUN = 5  # pytest's
# What a step may take where there is no budget; a hang would otherwise be for ever.
STEP_S = 1800.0
OPS = sorted(path.parent.name for path in machine.ROOT.glob("xlstm_kernels/ops/*/op.py"))
# The operation whose tests a case's speed waits for, where it has another name.
TESTED_AS = {"slstm": "recurrence", "lstm": "recurrence"}
TESTED_AS |= dict.fromkeys(gpu_cases.LINEAR_LOSSES, "linear_kl_div")
SMALL_TESTS = "on_a_device or scale_rows"
SANITIZERS = ("memcheck", "racecheck", "synccheck")


@dataclass(frozen=True)
class GpuRow:
    """A time on a GPU; NaN and a reason where there is none. step_us: of `steps` that wait for one
    another, each."""

    date: str
    op: str
    case: str
    variant: str
    direction: str
    dtype: str
    shape: str
    reason: str
    time_us: float
    p20_us: float
    p80_us: float
    samples: int
    step_us: float
    gpu: str
    cuda: str
    torch: str
    commit: str
    dirty: bool


@dataclass
class Outcome:
    """Of a step: "passed", "failed" or "skipped", its last line, and how long it took."""

    status: str
    note: str
    seconds: float


@dataclass(frozen=True)
class Step:
    """`run` gets the seconds that it may take; TimeoutExpired when they were not enough. It waits
    until `after`, another step, has passed, and is skipped where that failed."""

    name: str
    run: Callable[[float], Outcome]
    after: str = ""


class Ledger:
    """Outcomes of steps by name, on disk after each. Those of another commit are left behind."""

    def __init__(self, path: Path, commit: str) -> None:
        self.path, self.commit = path, commit
        self.outcomes: dict[str, Outcome] = {}
        if path.exists():
            known = json.loads(path.read_text())
            if known["commit"] == commit:
                self.outcomes = {n: Outcome(**o) for n, o in known["steps"].items()}

    def add(self, name: str, outcome: Outcome) -> None:
        self.outcomes[name] = outcome
        self.path.parent.mkdir(parents=True, exist_ok=True)
        steps = {name: asdict(outcome) for name, outcome in self.outcomes.items()}
        text = json.dumps({"commit": self.commit, "steps": steps}, indent=1)
        self.path.write_text(text + "\n")


def command(*arguments: str, ok: Sequence[int] = (0,)) -> Callable[[float], Outcome]:
    """A step that is a program; its output goes to the screen when it fails."""

    def run(seconds: float) -> Outcome:
        began = time.monotonic()
        done = subprocess.run(
            arguments,
            cwd=machine.ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
        )
        lines = done.stdout.strip().splitlines() or [""]
        passed = done.returncode in ok
        if not passed:
            print(done.stdout, flush=True)
        return Outcome("passed" if passed else "failed", lines[-1], time.monotonic() - began)

    return run


def skipped(reason: str) -> Callable[[float], Outcome]:
    return lambda seconds: Outcome("skipped", reason, 0.0)


def steps(ops: Sequence[str], folder: Path, here: machine.Machine) -> Iterator[Step]:
    """In the order in which they are done: first what is quick to fail."""
    yield Step("build", command(sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"))
    pytest = ("env", "TRITON_INTERPRET=0", sys.executable, "-m", "pytest", "-q")
    ok = (0, NOTHING_TO_RUN)
    for op in ops:
        files = [str(path) for path in sorted(machine.ROOT.glob(f"tests/test_{op}*.py"))]
        marked = command(*pytest, "-m", "gpu", *files, ok=ok)
        yield Step(f"tests {op}", marked, "build")
        yield Step(f"tests {op} triton", command(*pytest, "-k", "triton", *files, ok=ok), "build")
    if "recurrence" in ops:
        yield Step(
            "tests cuda", command(*pytest, "-m", "gpu", "tests/test_cuda.py", ok=ok), "build"
        )
        for tool in SANITIZERS:
            yield Step(f"compute-sanitizer {tool}", _sanitized(tool, pytest), "tests recurrence")
    for case in gpu_cases.gpu_cases():
        if (op := TESTED_AS.get(case.op, case.op)) in ops:
            yield Step(f"speed {case.id}", _timed(case, folder, here), f"tests {op}")


def _sanitized(tool: str, pytest: Sequence[str]) -> Callable[[float], Outcome]:
    if shutil.which("compute-sanitizer") is None:
        return skipped("compute-sanitizer is not on PATH")
    sanitizer = ("compute-sanitizer", "--target-processes", "all", "--tool", tool)
    files = ("tests/test_recurrence_cuda.py", "tests/test_cuda.py")
    sanitizer += ("--error-exitcode", "1")
    return command(*sanitizer, *pytest, "-m", "gpu", "-k", SMALL_TESTS, *files)


def _timed(case: GpuCase, folder: Path, here: machine.Machine) -> Callable[[float], Outcome]:
    def run(seconds: float) -> Outcome:
        began = time.monotonic()
        found = gpu_cases.measure(case)
        measured = [_row(case, variant, summary, here) for variant, summary in found.items()]
        rows.append(folder / f"{case.op}.csv", measured)
        note = ", ".join(
            f"{row.variant} {row.reason or f'{row.time_us:.5g} us'}"
            + (f", {row.step_us:.3g} a step" if case.steps > 1 and not row.reason else "")
            for row in measured
        )
        ours = measured[0]
        return Outcome("failed" if ours.reason else "passed", note, time.monotonic() - began)

    return run


def _row(case: GpuCase, variant: str, summary: object, here: machine.Machine) -> GpuRow:
    time_us = p20_us = p80_us = rows.NAN
    samples, reason = 0, ""
    if isinstance(summary, str):
        reason = summary
    else:
        time_us, p20_us, p80_us, samples = vars(summary).values()
    return GpuRow(
        *(datetime.now(timezone.utc).isoformat(timespec="seconds"), case.op, case.id, variant),
        *(case.direction, str(case.dtype).removeprefix("torch."), case.shape, reason),
        *(time_us, p20_us, p80_us, samples, time_us / case.steps if case.steps else rows.NAN),
        *(here.name, str(torch.version.cuda), here.torch, here.commit, here.dirty),
    )


def run_steps(todo: Sequence[Step], ledger: Ledger, budget_s: float | None) -> int:
    """Does what is not yet done. OK when all have passed or are skipped, RED when one failed, GO_ON
    when the budget ran out before."""
    deadline = None if budget_s is None else time.monotonic() + budget_s
    for number, step in enumerate(todo, 1):
        if step.name in ledger.outcomes:
            continue
        before = ledger.outcomes.get(step.after)
        left_s = STEP_S if deadline is None else min(STEP_S, deadline - time.monotonic())
        if left_s <= 0:
            print(f"{number - 1} of {len(todo)} steps are done; run it again for the others")
            return GO_ON
        print(f"[{number}/{len(todo)}] {step.name} ...", flush=True)
        if step.after and (before is None or before.status == "failed"):
            outcome = Outcome("skipped", f"{step.after!r} failed", 0.0)
        else:
            try:
                outcome = step.run(left_s)
            except subprocess.TimeoutExpired:
                if left_s < STEP_S:
                    print(f"  not done in {left_s:.0f} s; run it again, with a larger budget")
                    return GO_ON
                outcome = Outcome("failed", f"not done in {left_s:.0f} s", left_s)
        print(f"  {outcome.status} in {outcome.seconds:.1f} s: {outcome.note}", flush=True)
        ledger.add(step.name, outcome)
    failed = [s.name for s in todo if ledger.outcomes[s.name].status == "failed"]
    print("failed: " + ", ".join(failed) if failed else f"all {len(todo)} steps are done")
    return RED if failed else OK


def summary(ledger: Ledger, here: machine.Machine) -> str:
    changed = " (changed)" * here.dirty
    lines = [
        f"# {here.name}\n",
        f"Commit {here.commit}{changed}, torch {here.torch}, CUDA {torch.version.cuda}.\n",
        "| step | outcome | s | |\n| --- | --- | --- | --- |",
    ]
    lines += [
        f"| {name} | {o.status} | {o.seconds:.0f} | {o.note.replace('|', '/')} |"
        for name, o in ledger.outcomes.items()
    ]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    known = sorted({*OPS, *TESTED_AS})
    parser.add_argument("--op", action="append", choices=known, help="these alone")
    parser.add_argument("--budget-s", type=float, metavar="N", help="stop after so many seconds")
    parser.add_argument("--again", action="store_true", help="forget what has been done")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        why = "is built without CUDA" if torch.version.cuda is None else "sees no CUDA device"
        print(f"gpu: torch {torch.__version__} {why}; nothing was run", file=sys.stderr)
        return USAGE
    here = machine.describe(torch.cuda.get_device_name())
    folder = rows.RESULTS / here.folder
    ledger = Ledger(folder / "progress.json", "" if options.again else _state(here))
    ledger.commit = _state(here)
    ops = sorted({TESTED_AS.get(op, op) for op in options.op or OPS})
    result = run_steps(list(steps(ops, folder, here)), ledger, options.budget_s)
    if ledger.outcomes:
        (folder / "summary.md").write_text(summary(ledger, here))
        print(folder / "summary.md")
    return result


def _state(here: machine.Machine) -> str:
    return here.commit + "+" * here.dirty


if __name__ == "__main__":
    sys.exit(main())
