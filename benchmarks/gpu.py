"""Everything that only a GPU can show: `make gpu`, or for a part of it

    python -m benchmarks.gpu --op slstm --budget-s 540

builds, runs every operation's tests natively, then small ones under compute-sanitizer where that is
installed, and times the cases of operations whose tests pass. A step that is done is not done again
for the same sources: a call that runs out of its budget says so and exits with 75, and the next
goes on from there. A step for which all of a call's budget is too little, or twice what the build
leaves of it, has failed: it may hang.
Results: benchmarks/results/<gpu>/<op>.csv and summary.md.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch

from . import gpu_cases, machine, rows
from .gpu_cases import GpuCase
from .timing import Summary

OK, RED, USAGE, GO_ON = 0, 1, 2, 75
NOTHING_TO_RUN = 5  # pytest's
# What a step may take where there is no budget; a hang would otherwise be for ever.
STEP_S = 1800.0
ALL_OF_IT = 0.9  # of some time: a step that has had so much of it would not end in the rest
# After so many seconds in one test pytest says where it stands.
FAULT_HANDLER = ("-o", "faulthandler_timeout=120")
OPS = sorted(path.parent.name for path in machine.ROOT.glob("xlstm_kernels/ops/*/op.py"))
# The operation whose tests a case's speed waits for, where it has another name.
TESTED_AS = {"slstm": "recurrence", "lstm": "recurrence"}
TESTED_AS |= dict.fromkeys(gpu_cases.LINEAR_LOSSES, "linear_kl_div")
# All but those of 70 sequences, whose reference takes the CPU long.
SMALL_TESTS = "on_a_device and not 70 or scale_rows"
# Variants of a case that are no peer's.
OURS = ("cuda", "triton")
# What a step's outcome depends on.
SOURCES = ("setup.py", "csrc", "xlstm_kernels", "benchmarks", "tests")
SUFFIXES = (".py", ".h", ".cpp", ".cu")
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
    for the steps `after`, and is skipped where one of them failed or none passed. `always`: also
    where it is done, as what it made need not be on this machine."""

    name: str
    run: Callable[[float], Outcome]
    after: tuple[str, ...] = ()
    always: bool = False


class Ledger:
    """Outcomes of steps by name, on disk after each. Those of other sources are left behind."""

    def __init__(self, path: Path, sources: str) -> None:
        self.path, self.sources = path, sources
        self.outcomes: dict[str, Outcome] = {}
        if path.exists():
            known = json.loads(path.read_text())
            if known.get("sources") == sources:
                self.outcomes = {n: Outcome(**o) for n, o in known["steps"].items()}

    def add(self, name: str, outcome: Outcome) -> None:
        self.outcomes[name] = outcome
        self.path.parent.mkdir(parents=True, exist_ok=True)
        steps = {name: asdict(outcome) for name, outcome in self.outcomes.items()}
        text = json.dumps({"sources": self.sources, "steps": steps}, indent=1)
        self.path.write_text(text + "\n")


def finished(
    arguments: Sequence[str], seconds: float, stderr: int = subprocess.STDOUT
) -> subprocess.CompletedProcess[str]:
    """A program's end and output. Where its time is up its children are ended too, which would hold
    the GPU or go on compiling, and what it had said is shown: that tells where it hangs."""
    with subprocess.Popen(
        arguments,
        cwd=machine.ROOT,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            output, errors = process.communicate(timeout=seconds)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            print(*filter(None, process.communicate()), sep="\n", flush=True)
            raise
    return subprocess.CompletedProcess(arguments, process.returncode, output, errors)


def command(*arguments: str, ok: Sequence[int] = (0,)) -> Callable[[float], Outcome]:
    """A step that is a program; its output goes to the screen when it fails."""

    def run(seconds: float) -> Outcome:
        began = time.monotonic()
        done = finished(arguments, seconds)
        last = (done.stdout.strip().splitlines() or [""])[-1]
        status = "passed"
        if done.returncode not in ok:
            status = "failed"
            print(done.stdout, flush=True)
        elif done.returncode == NOTHING_TO_RUN or ("skipped" in last and "passed" not in last):
            status = "skipped"  # pytest is content when there was nothing that it could run
        return Outcome(status, last, time.monotonic() - began)

    return run


def skipped(reason: str) -> Callable[[float], Outcome]:
    return lambda seconds: Outcome("skipped", reason, 0.0)


def steps(ops: Sequence[str], folder: Path, here: machine.Machine) -> Iterator[Step]:
    """In the order in which they are done: first what is quick to fail."""
    build = command(sys.executable, "setup.py", "--quiet", "build_ext", "--inplace")
    yield Step("build", build, always=True)
    alone, pytest = _pytest(1), _pytest(min(8, (os.cpu_count() or 1) // 2))
    ok, built = (0, NOTHING_TO_RUN), ("build",)
    for op in ops:
        files = [
            str(path)
            for path in sorted(machine.ROOT.glob(f"tests/test_{op}*.py"))
            if not path.stem.endswith("_compile")  # for chips that are not here
        ]
        marked = command(*pytest, "-m", "gpu", *files, ok=ok)
        yield Step(f"tests {op}", marked, built)
        yield Step(f"tests {op} triton", command(*pytest, "-k", "triton", *files, ok=ok), built)
    if "recurrence" in ops:
        yield Step("tests cuda", command(*pytest, "-m", "gpu", "tests/test_cuda.py", ok=ok), built)
        for tool in SANITIZERS:
            yield Step(f"compute-sanitizer {tool}", _sanitized(tool, alone), ("tests recurrence",))
    for case in gpu_cases.gpu_cases():
        if (op := TESTED_AS.get(case.op, case.op)) in ops:
            tests = (f"tests {op}", f"tests {op} triton")
            yield Step(f"speed {case.id}", _timed(case, folder, here), tests)


def _pytest(workers: int) -> tuple[str, ...]:
    """As a program. Most of the time goes into compiling Triton's kernels, one after another, and
    into references on the CPU: several workers take it side by side."""
    program = (sys.executable, "-m", "pytest", "-q", *FAULT_HANDLER)
    if workers < 2 or importlib.util.find_spec("xdist") is None:
        return "env", "TRITON_INTERPRET=0", *program
    side_by_side = ("-n", str(workers), "--dist", "loadgroup")
    return "env", "TRITON_INTERPRET=0", "OMP_NUM_THREADS=2", *program, *side_by_side


def _sanitized(tool: str, pytest: Sequence[str]) -> Callable[[float], Outcome]:
    if shutil.which("compute-sanitizer") is None:
        return skipped("compute-sanitizer is not on PATH")
    sanitizer = ("compute-sanitizer", "--target-processes", "all", "--tool", tool)
    files = ("tests/test_recurrence_cuda.py", "tests/test_cuda.py")
    sanitizer += ("--error-exitcode", "1")
    return command(*sanitizer, *pytest, "-m", "gpu", "-k", SMALL_TESTS, *files)


def _timed(case: GpuCase, folder: Path, here: machine.Machine) -> Callable[[float], Outcome]:
    """In a process of its own: this one was there before what the build made, and a kernel that
    faults or hangs takes no other case along."""

    def run(seconds: float) -> Outcome:
        began = time.monotonic()
        program = (sys.executable, "-m", "benchmarks.gpu_cases", case.id)
        done = finished(program, seconds, subprocess.PIPE)
        if done.returncode:
            print(done.stderr, flush=True)
            last = (done.stderr.strip().splitlines() or [""])[-1]
            return Outcome("failed", last, time.monotonic() - began)
        answer = json.loads(done.stdout.splitlines()[-1])
        found = {k: v if isinstance(v, str) else Summary(**v) for k, v in answer.items()}
        measured = [_row(case, variant, summary, here) for variant, summary in found.items()]
        rows.append(folder / f"{case.op}.csv", measured)
        note = ", ".join(
            f"{row.variant} {row.reason or f'{row.time_us:.5g} us'}"
            + (f", {row.step_us:.3g} a step" if case.steps > 1 and not row.reason else "")
            for row in measured
        )
        failed = any(row.reason for row in measured if row.variant in OURS)
        return Outcome("failed" if failed else "passed", note, time.monotonic() - began)

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
        if _is_done(step, ledger):
            continue
        left_s = STEP_S if deadline is None else min(STEP_S, deadline - time.monotonic())
        if left_s <= 0:
            print(f"{number - 1} of {len(todo)} steps are done; run it again for the others")
            return GO_ON
        print(f"[{number}/{len(todo)}] {step.name} ...", flush=True)
        if why := _waits_in_vain(step, ledger):
            outcome = Outcome("skipped", why, 0.0)
        else:
            try:
                outcome = step.run(left_s)
            except subprocess.TimeoutExpired:
                hangs = left_s >= ALL_OF_IT * min(STEP_S, budget_s or STEP_S)
                hangs = hangs or _had_s(step, ledger) >= ALL_OF_IT * left_s
                status = "failed" if hangs else "unfinished"
                outcome = Outcome(status, f"not done in {left_s:.0f} s", left_s)
            except Exception as error:  # the other steps are not to wait for another call
                traceback.print_exc()
                why = f"{type(error).__name__}: {error}".splitlines()[0]
                outcome = Outcome("failed", why, 0.0)
        print(f"  {outcome.status} in {outcome.seconds:.1f} s: {outcome.note}", flush=True)
        ledger.add(step.name, outcome)
        if outcome.status == "unfinished":
            print("  run it again for this and the others")
            return GO_ON
    failed = [s.name for s in todo if ledger.outcomes[s.name].status == "failed"]
    skipped = sum(ledger.outcomes[s.name].status == "skipped" for s in todo)
    print(f"all {len(todo)} steps are done" + f", {skipped} of them skipped" * bool(skipped))
    if failed:
        print("failed: " + ", ".join(failed))
    return RED if failed else OK


def _is_done(step: Step, ledger: Ledger) -> bool:
    """What was skipped unrun is not: what it waited for may be there by now."""
    was = ledger.outcomes.get(step.name)
    if was is None or step.always or was.status == "unfinished":
        return False
    return was.status != "skipped" or was.seconds > 0


def _had_s(step: Step, ledger: Ledger) -> float:
    """The seconds that a call before gave the step, which were not enough."""
    was = ledger.outcomes.get(step.name)
    return was.seconds if was and was.status == "unfinished" else 0.0


def _waits_in_vain(step: Step, ledger: Ledger) -> str:
    """Why the step cannot be done, or ""."""
    before = {name: ledger.outcomes[name].status for name in step.after if name in ledger.outcomes}
    if failed := [name for name, status in before.items() if status == "failed"]:
        return f"{failed[0]!r} failed"
    return "" if not step.after or "passed" in before.values() else f"no {step.after[0]!r} passed"


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
    ledger = Ledger(folder / "progress.json", "" if options.again else sources())
    ledger.sources = sources()
    ops = sorted({TESTED_AS.get(op, op) for op in options.op or OPS})
    result = run_steps(list(steps(ops, folder, here)), ledger, options.budget_s)
    if ledger.outcomes:
        (folder / "summary.md").write_text(summary(ledger, here))
        print(folder / "summary.md")
    return result


def sources() -> str:
    """A digest of them: where there is no git, or what is tried is not committed yet, the commit
    says too little."""
    digest = hashlib.sha256()
    for top in map(machine.ROOT.joinpath, SOURCES):
        for path in sorted(top.rglob("*")) if top.is_dir() else [top]:
            if path.suffix in SUFFIXES:
                digest.update(f"{path.relative_to(machine.ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


if __name__ == "__main__":
    sys.exit(main())
