"""The steps of `make gpu`: what is done, what is remembered, and what is said without a GPU."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("rich", reason="the extra `bench` is not installed")

import xlstm_kernels.compat.flashrnn
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


def step(name: str, done: list[str], status: str = "passed", after: tuple[str, ...] = ()) -> Step:
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
    assert run_steps(todo[:1], Ledger(tmp_path / "p.json", "other sources"), None) == OK
    assert done == ["a", "b", "a"]


def test_what_waits_for_a_failure_is_skipped(tmp_path: Path) -> None:
    done: list[str] = []
    todo = [step("a", done, "failed"), step("b", done, after=("c", "a")), step("c", done)]
    todo += [step("d", done, "skipped"), step("e", done, after=("d",))]
    todo += [step("f", done, after=("d", "c"))]
    ledger = Ledger(tmp_path / "p.json", "abc")
    assert run_steps(todo, ledger, None) == RED
    assert done == ["a", "c", "d", "f"]
    assert ledger.outcomes["b"] == Outcome("skipped", "'a' failed", 0.0)
    assert ledger.outcomes["e"] == Outcome("skipped", "no 'd' passed", 0.0)
    text = gpu.summary(ledger, HERE)
    assert "NVIDIA H200" in text and "| b | skipped |" in text


def test_what_was_skipped_is_done_when_it_can_be(tmp_path: Path) -> None:
    """As where nvcc was not found, and is by the next call."""
    done: list[str] = []
    build = replace(step("build", done, "failed"), always=True)
    after = step("a", done, after=("build",))
    assert run_steps([build, after], Ledger(tmp_path / "p.json", "abc"), None) == RED
    built = replace(step("build", done), always=True)
    for _ in range(2):
        assert run_steps([built, after], Ledger(tmp_path / "p.json", "abc"), None) == OK
    assert done == ["build", "build", "a", "build"]


def test_what_is_built_is_built_in_every_call(tmp_path: Path) -> None:
    """What is remembered may come from a machine that is gone."""
    done: list[str] = []
    todo = [replace(step("build", done), always=True), step("a", done)]
    for _ in range(2):
        assert run_steps(todo, Ledger(tmp_path / "p.json", "abc"), None) == OK
    assert done == ["build", "a", "build"]
    built = [each.name for each in gpu.steps(["recurrence"], tmp_path, HERE) if each.always]
    assert built == ["build"]


def test_a_program_that_takes_too_long_is_done_later(tmp_path: Path) -> None:
    def wait(seconds: float) -> Outcome:
        time.sleep(0.3)
        return Outcome("passed", "", 0.3)

    slow = command(sys.executable, "-c", "import time; time.sleep(60)")
    todo = [
        Step("first", wait),
        Step("sleep", slow),
        Step("last", lambda s: Outcome("passed", "", s)),
    ]
    ledger = Ledger(tmp_path / "p.json", "abc")
    assert run_steps(todo, ledger, 0.6) == GO_ON
    assert list(ledger.outcomes) == ["first", "sleep"]
    assert ledger.outcomes["sleep"].status == "unfinished"
    # All of a call was not enough: the next has to be spared it.
    assert run_steps(todo, ledger, 0.4) == GO_ON
    assert ledger.outcomes["sleep"].status == "failed"
    assert run_steps(todo, ledger, 60.0) == RED
    assert list(ledger.outcomes) == ["first", "sleep", "last"]


def test_a_step_that_hangs_after_a_long_build_has_failed(tmp_path: Path) -> None:
    """On a machine where nothing is built yet, as each may be, no call gives it more."""

    def build(seconds: float) -> Outcome:
        time.sleep(0.5)
        return Outcome("passed", "", 0.5)

    hang = command(sys.executable, "-c", "import time; time.sleep(60)")
    todo = [Step("build", build, always=True), Step("hang", hang)]
    # The second call says so, or one more where this machine was busy meanwhile.
    assert any(run_steps(todo, Ledger(tmp_path / "p.json", "abc"), 1.0) == RED for _ in range(4))


def test_a_programs_children_end_with_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alive = tmp_path / "alive"
    child = f"""import time
for _ in range(200):
    open({str(alive)!r}, 'a').write('.')
    time.sleep(0.05)
"""
    parent = (
        "import subprocess, sys; print('begun', flush=True); print('why', file=sys.stderr);"
        " null = {'stdout': subprocess.DEVNULL, 'stderr': subprocess.DEVNULL};"
        f" subprocess.run([sys.executable, '-c', {child!r}], **null)"
    )
    with pytest.raises(subprocess.TimeoutExpired):
        gpu.finished((sys.executable, "-c", parent), 2.0, subprocess.PIPE)
    assert capsys.readouterr().out == "begun\n\nwhy\n\n"
    written = alive.stat().st_size
    time.sleep(0.5)
    assert alive.stat().st_size == written > 0


def test_what_a_program_says_at_its_end() -> None:
    def outcome(text: str, code: int) -> tuple[str, str]:
        program = f"print('a'); print({text!r}); raise SystemExit({code})"
        done = command(sys.executable, "-c", program, ok=(0, gpu.NOTHING_TO_RUN))(9.0)
        return done.status, done.note

    assert outcome("b", 3) == ("failed", "b")
    assert outcome("2 passed, 1 skipped in 3s", 0)[0] == "passed"
    assert outcome("3 skipped, 4 deselected in 5s", 0)[0] == "skipped"
    assert outcome("4 deselected in 5s", gpu.NOTHING_TO_RUN)[0] == "skipped"


def test_sources_are_known_by_what_is_in_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu.machine, "ROOT", tmp_path)
    (tmp_path / "csrc").mkdir()
    (tmp_path / "setup.py").write_text("a")
    before = gpu.sources()
    (tmp_path / "csrc" / "progress.json").write_text("{}")
    assert gpu.sources() == before
    (tmp_path / "csrc" / "kernel.cu").write_text("b")
    assert gpu.sources() != before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.medium
def test_a_case_is_timed_in_a_process_of_its_own(tmp_path: Path) -> None:
    """This one may have been there before what is timed was built."""
    case = gpu_cases._recurrence("lstm", torch.float32, 1, 2, 1, 4, False)
    known = next(c for c in gpu_cases.gpu_cases() if c.op == "lstm")
    outcome = gpu._timed(known, tmp_path, HERE)(60.0)
    assert outcome.status == "failed" and re.search("CUDA|NVIDIA", outcome.note)
    assert gpu._timed(case, tmp_path, HERE)(60.0).note.startswith("ValueError")  # it is not known


def test_times_are_written_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(c for c in gpu_cases.gpu_cases() if c.op == "lstm")
    times = {"time_us": 3.0, "p20_us": 2.0, "p80_us": 4.0, "samples": 30}
    said = "a warning\n" + json.dumps({"cuda": times, "nn.LSTM": "ImportError: none"})

    def finished(arguments, *_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(arguments, 0, said, "")

    monkeypatch.setattr(gpu, "finished", finished)
    outcome = gpu._timed(case, tmp_path, HERE)(9.0)
    assert outcome.status == "passed"
    ours, peer = gpu.rows.read(tmp_path / "lstm.csv", gpu.GpuRow)
    assert (ours.time_us, ours.samples, ours.reason) == (3.0, 30, "")
    assert peer.reason == "ImportError: none"
    said = json.dumps({"cuda": times, "triton": "RuntimeError: no"})
    assert gpu._timed(case, tmp_path, HERE)(9.0).status == "failed"


def test_an_error_in_a_step_ends_that_step_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done: list[str] = []
    todo = [Step("a", lambda _: json.loads("no JSON")), step("b", done), step("c", done, "skipped")]
    ledger = Ledger(tmp_path / "p.json", "abc")
    assert run_steps(todo, ledger, None) == RED and done == ["b", "c"]
    assert ledger.outcomes["a"].note.startswith("JSONDecodeError: ")
    assert "all 3 steps are done, 1 of them skipped\nfailed: a\n" in capsys.readouterr().out


def test_every_case_waits_for_tests_that_are_there(tmp_path: Path) -> None:
    todo = list(gpu.steps(gpu.OPS, tmp_path, HERE))
    names = [step.name for step in todo]
    assert len(set(names)) == len(names)
    for at, each in enumerate(todo):
        assert set(each.after) <= set(names[:at]), each.name
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


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("op", ["slstm", "lstm"])
def test_calls_of_the_recurrence_run(
    op: str, backward: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In small, on the CPU; flashrnn's place is taken by our stand-in for it."""
    monkeypatch.setattr(gpu_cases, "DEVICE", "cpu")
    monkeypatch.setitem(sys.modules, "flashrnn", xlstm_kernels.compat.flashrnn)
    calls = gpu_cases._recurrence(op, torch.bfloat16, 16, 2, 1, 4, backward).calls()
    peers = ["flashrnn cuda_fused", "flashrnn cuda", *["nn.LSTM"] * (op == "lstm")]
    assert list(calls) == ["cuda", "triton", *peers]
    for variant, call in calls.items():
        if (why := WHY_NOT.get(variant)) is None:
            call()
        else:
            with pytest.raises(NotImplementedError, match=why):
                call()
