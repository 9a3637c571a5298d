"""Command line of the benchmarks: `python -m benchmarks --help` lists what it can do."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from subprocess import CalledProcessError

import torch
from rich.console import Console

from . import ceilings, errors, machine, models, packages, report, rows, scaling
from .cases import OPS, select
from .problem import Case
from .runner import Run, run_case
from .table import duration, size, terminal_table

OK, RED, USAGE, INTERRUPTED = 0, 1, 2, 130
PEERS = packages.FOLDER.relative_to(machine.ROOT)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Speed of the operations, correct results only."
    )
    commands = parser.add_subparsers(dest="command", required=True)

    run = commands.add_parser("run", help="compare with the float64 reference, then time")
    listing = commands.add_parser("list", help="print the id of every case")
    accuracy = commands.add_parser(
        "errors", help="print those of every result, ours and the peers'"
    )
    commands.add_parser("peers", help=f"install what cases are compared with into {PEERS}")
    for command in (run, listing, accuracy):
        command.add_argument("--op", action="append", default=[], help=", ".join(OPS))
        command.add_argument("--case", default="", help="only ids that contain this")
        command.add_argument("--quick", action="store_true", help="tiny shapes, no torch.compile")
    run.add_argument("--budget-s", type=float, metavar="N", help="seconds of timing a case (10)")

    over_T = commands.add_parser("scaling", help="time and memory of the mLSTM over T")
    over_T.add_argument("--longest", type=int, default=scaling.LENGTHS[-1], metavar="T")
    over_T.add_argument("--quick", action="store_true", help="tiny sequences")
    for command in (run, over_T):
        command.add_argument(
            "--save",
            action=argparse.BooleanOptionalAction,
            default=None,
            help="append to the results (default: yes, with --quick no)",
        )
        command.add_argument("--threads", type=int, metavar="N", help="torch.set_num_threads(N)")

    write = commands.add_parser("report", help="plots and the README's tables from the last runs")
    write.add_argument("--readme", type=Path, default=machine.ROOT / "README.md", metavar="FILE")
    for command in (run, over_T, write):
        command.add_argument("--results", type=Path, default=rows.RESULTS, metavar="DIR")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        if options.command == "report":
            for path in report.write(options.results, options.readme):
                print(path)
            return OK
        if options.command == "peers":
            packages.install()
            return OK
        if options.command == "scaling":
            return _scale(options)
        chosen = _chosen(options)
        if options.command == "list":
            print("\n".join(case.id for case in chosen))
            return OK
        if options.command == "errors":
            for case in chosen:
                _screen().print(errors.terminal_table(case))
            return OK
        return _run(options, chosen)
    except _UsageError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return USAGE
    except (OSError, ValueError, RuntimeError, CalledProcessError) as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return RED
    except KeyboardInterrupt:
        print("benchmarks: interrupted; the operation under way is not saved", file=sys.stderr)
        return INTERRUPTED


class _UsageError(Exception):
    pass


def _chosen(options: argparse.Namespace) -> list[Case]:
    known = f"known: {', '.join(OPS)}"
    for op in options.op:
        if op not in OPS:
            raise _UsageError(f"unknown --op {op!r}; {known}")
    chosen = select(options.op, options.case, options.quick)
    if not chosen:
        raise _UsageError(f"no case has {options.case!r} in its id; see `list`")
    return chosen


def _run(options: argparse.Namespace, chosen: list[Case]) -> int:
    _set_threads(options)
    budget_s = options.budget_s if options.budget_s is not None else (0.2 if options.quick else 10)
    save = options.save if options.save is not None else not options.quick
    screen = _screen()
    here = machine.describe()
    with screen.status("ceilings: copy bandwidth and sgemm rate"):
        roof = ceilings.measure(options.quick)
    screen.print(
        f"{here.device} {here.name}, {here.threads} threads, kernels {here.isa},"
        f" torch {here.torch}, load {here.load}\n"
        f"copy {roof.copy_gb_s:.3g} GB/s, sgemm {roof.sgemm_gflop_s:.3g} GFLOP/s,"
        f" clone into fresh pages {roof.fresh_clone_gb_s:.3g} GB/s",
        highlight=False,
    )
    for reason in models.left_out() if "replace" in {case.op for case in chosen} else ():
        screen.print(f"models left out: {reason}", highlight=False)
    run = Run(
        date=_now(),
        machine=here,
        ceilings=roof,
        complete=not options.case and not options.quick,
        budget_s=budget_s,
        quick=options.quick,
    )
    every: list[rows.Row] = []
    for op in dict.fromkeys(case.op for case in chosen):
        measured = _run_op(screen, run, [case for case in chosen if case.op == op])
        if save:
            path = options.results / here.folder / f"{op}.csv"
            rows.append(path, measured)
            screen.print(f"appended {len(measured)} rows to {path}", highlight=False)
        every += measured
    return RED if any(row.ours and not row.measured for row in every) else OK


def _scale(options: argparse.Namespace) -> int:
    _set_threads(options)
    screen, here = _screen(), machine.describe()
    points = []
    for point in scaling.measure(_now(), here, options.longest, options.quick):
        points.append(point)
        screen.print(
            f"T {point.T} {point.direction} {point.backend}: {duration(point.time_us)},"
            f" peak {size(point.peak_bytes)}, error {point.error:.1e} / {point.budget:.1e}",
            highlight=False,
        )
    if options.save if options.save is not None else not options.quick:
        path = options.results / here.folder / f"{scaling.NAME}.csv"
        rows.append(path, points)
        screen.print(f"appended {len(points)} rows to {path}", highlight=False)
    return OK if all(point.passes for point in points) else RED


def _set_threads(options: argparse.Namespace) -> None:
    if options.threads is not None:
        if options.threads < 1:
            raise _UsageError(f"--threads must be at least 1, got {options.threads}")
        torch.set_num_threads(options.threads)


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _screen() -> Console:
    screen = Console()
    return screen if screen.is_terminal else Console(width=170)


def _run_op(screen: Console, run: Run, chosen: list[Case]) -> list[rows.Row]:
    measured: list[rows.Row] = []
    with screen.status("") as status:
        for case in chosen:
            measured += run_case(run, case, lambda what, id=case.id: status.update(f"{id}: {what}"))
    screen.print(terminal_table(measured))
    for row in measured:
        if row.reason:
            screen.print(f"not timed: {row.case} {row.backend}: {row.reason}", markup=False)
    return measured


if __name__ == "__main__":
    sys.exit(main())
