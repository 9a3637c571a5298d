"""The steps of `make gpu`: what is done, what is remembered, and what is said without a GPU."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("rich", reason="the extra `bench` is not installed")

from benchmarks import gpu, gpu_cases
from benchmarks.gpu import GO_ON, OK, RED, USAGE, Ledger, Outcome, Step, command, run_steps
from benchmarks.machine import Machine
from xlstm_kernels.backends import CUDA_EMULATOR, UNAVAILABLE, Backend

# By variant, why it cannot run here.
WHY_NOT = {"liger": "liger_kernel"} if importlib.util.find_spec("liger_kernel") is None else {}
if CUDA_EMULATOR is None:
    WHY_NOT["cuda"] = "cuda"
if why := UNAVAILABLE[Backend.TRITON]:
    WHY_NOT["triton"] = why
HERE = Machine("GPU", "NVIDIA H200", 2, "avx2", "2.13.0", "3.12.0", "abc", False, 0.1)


def step(name: str, done: list[str], status: str = "passed", after: str = "") -> Step:
    def run(seconds: float) -> Outcome:
        done.append(name)
        return Outcome(status, "", 0.0)

    return Step(name, run, after)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([]) == USAGE
    assert capsys.readouterr().err.startswith(f"gpu: torch {torch.__version__} ")


def test_what_is_done_is_not_done_again(tmp_path: Path) -> None:
    done: list[str] = []
    todo = [step("a", done), step("b", done)]
    assert run_steps(todo, Ledger(tmp_path / "p.json", "abc"), -1.0) == GO_ON
    assert run_steps(todo[:1], Ledger(tmp_path / "p.json", "abc"), None) == OK
    assert run_steps(todo, Ledger(tmp_path / "p.json", "abc"), 60.0) == OK
    assert done == ["a", "b"]
    assert run_steps(todo[:1], Ledger(tmp_path / "p.json", "another commit"), None) == OK
    assert done == ["a", "b", "a"]


def test_what_waits_for_a_failure_is_skipped(tmp_path: Path) -> None:
    done: list[str] = []
    todo = [step("a", done, "failed"), step("b", done, after="a"), step("c", done)]
    ledger = Ledger(tmp_path / "p.json", "abc")
    assert run_steps(todo, ledger, None) == RED
    assert done == ["a", "c"] and ledger.outcomes["b"] == Outcome("skipped", "'a' failed", 0.0)
    text = gpu.summary(ledger, HERE)
    assert "NVIDIA H200" in text and "| b | skipped |" in text


def test_a_program_that_takes_too_long_is_done_later(tmp_path: Path) -> None:
    todo = [Step("sleep", command(sys.executable, "-c", "import time; time.sleep(60)"))]
    ledger = Ledger(tmp_path / "p.json", "abc")
    assert run_steps(todo, ledger, 0.2) == GO_ON
    assert not ledger.outcomes
    [outcome] = [command(sys.executable, "-c", "print('a'); raise SystemExit(3)")(9.0)]
    assert (outcome.status, outcome.note) == ("failed", "a")


def test_every_case_waits_for_tests_that_are_there(tmp_path: Path) -> None:
    todo = list(gpu.steps(gpu.OPS, tmp_path, HERE))
    names = [step.name for step in todo]
    assert len(set(names)) == len(names)
    for at, each in enumerate(todo):
        assert not each.after or each.after in names[:at], each.name
    ops = {case.op for case in gpu_cases.gpu_cases()}
    assert ops >= {"slstm", "lstm", "mlstm", "kl_div", "topk_kl_div", *gpu_cases.LINEAR_LOSSES}


@pytest.mark.parametrize("backward", [False, True])
def test_calls_of_the_losses_run(backward: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In small, on the CPU, where its backends are emulated; what is missing says so."""
    monkeypatch.setattr(gpu_cases, "DEVICE", "cpu")
    monkeypatch.setattr(torch, "compile", lambda function: function)
    cases = [gpu_cases._kl_div(3, 50, backward), gpu_cases._topk_kl_div(3, 50, 4, backward)]
    if backward:
        cases += [gpu_cases._linear_loss(op, 3, 8, 50, 4) for op in gpu_cases.LINEAR_LOSSES]
    for case in cases:
        calls = case.calls()
        assert list(calls)[:2] == ["cuda", "triton"]
        for variant, call in calls.items():
            if (why := WHY_NOT.get(variant)) is None:
                call()
            else:
                with pytest.raises((ImportError, NotImplementedError), match=why):
                    call()
