"""`python -m xlstm_kernels`, `available_backends()`, and the instruction set that is asked for."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

import xlstm_kernels as xk
from xlstm_kernels.__main__ import main
from xlstm_kernels.backends import OPS, Backend, load_cpu


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def test_every_function_and_backend_has_a_verdict() -> None:
    table = xk.available_backends()
    functions = {f for op in OPS.values() for f in op.functions or (op.name,)}
    assert set(table) == functions >= {"slstm", "lstm"}
    for verdicts in table.values():
        assert list(verdicts) == [b.value for b in Backend if b is not Backend.AUTO]
        assert verdicts["reference"] == verdicts["cpu"] == "ok"
        assert all(verdicts.values())


def test_report_says_what_runs_here() -> None:
    run = python("-m", "xlstm_kernels", "--json")
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout)
    assert report["xlstm_kernels"] == xk.__version__
    assert report["torch"] == torch.__version__
    assert report["operations"] == xk.available_backends()
    assert report["_cpu"]["instruction_sets"] == load_cpu().supported_isas()
    assert report["_cpu"]["thread_pool"] == "torch"
    text = python("-m", "xlstm_kernels").stdout
    for word in ("_cpu", "_cuda", "instruction_set", "slstm", "reference", torch.__version__):
        assert word in text


def test_launch_table_has_every_launch(capsys, monkeypatch) -> None:
    given = ["--launch-table", "--json", "--batch", "9", "--heads", "3"]
    monkeypatch.setattr(sys, "argv", ["xlstm_kernels", *given])
    assert main() == 0
    rows = json.loads(capsys.readouterr().out)
    ways = {(row["backend"], row[""]) for row in rows}
    assert ways == {(b, w) for b in ("cuda", "triton") for w in ("forward", "backward", "step")}
    steps = [row for row in rows if row[""] == "step" and row["D"] == "512"]
    # Two tiles of sequences, three heads, four units a block.
    assert {row["blocks"] for row in steps} == {"768 of 128"}


@pytest.mark.medium
@pytest.mark.parametrize("isa", load_cpu().supported_isas())
def test_instruction_set_is_the_one_asked_for(isa: str) -> None:
    report = json.loads(python("-m", "xlstm_kernels", "--json", XLSTM_CPU_ISA=isa).stdout)
    assert report["_cpu"]["instruction_set"] == isa


@pytest.mark.medium
def test_unknown_instruction_set_is_named_at_first_use() -> None:
    use = (
        "import torch as t, xlstm_kernels as xk; xk.lstm(t.ones(1, 1, 4, 1, 1), t.ones(4, 1, 1, 1))"
    )
    run = python("-c", use, XLSTM_CPU_ISA="mmx")
    choices = ", ".join(load_cpu().supported_isas())
    expected = f"XLSTM_CPU_ISA: instruction set must be one of {choices} on this CPU, got 'mmx'"
    assert run.returncode != 0
    assert f"ValueError: {expected}" in run.stderr
    report = python("-m", "xlstm_kernels", XLSTM_CPU_ISA="mmx")
    assert report.returncode == 1
    assert expected in report.stdout


def test_number_of_threads_is_torchs() -> None:
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            assert load_cpu().num_threads() == threads
    finally:
        torch.set_num_threads(before)
