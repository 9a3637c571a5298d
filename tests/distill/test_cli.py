"""The command line: what a user sees when it goes well, and one line when it does not."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from distill.__main__ import main, resume_command

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def run_main(capsys, *argv) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a command in this process."""
    try:
        status = main([str(arg) for arg in argv])
    except SystemExit as stop:
        status = stop.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def assert_one_line(err: str, *parts: str) -> None:
    assert err.count("\n") == 1 and err.endswith("\n"), err
    assert "Traceback" not in err
    for part in parts:
        assert part in err


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["demo", "--stepz", "3"], ["unrecognized arguments: --stepz"]),
        (["demo", "--steps-scale", "0"], ["--steps-scale", "above 0", "'0'"]),
        (["demo", "--steps-scale", "nan"], ["--steps-scale", "'nan'"]),
        (["demo", "--threads", "none"], ["--threads", "at least 1", "'none'"]),
        (["demo", "--threads", "9" * 5000], ["--threads", "at most 4096"]),
        (["demo", "--seed", "-1"], ["--seed"]),
        (["demo", "--seed", str(2**32)], ["--seed", "at most 4294967293"]),
        (["demo", "--backend", "tpu"], ["--backend", "'tpu'"]),
        (["demo", "--corpus", ""], ["--corpus", "must be a path, got ''"]),
        (["run", "linearize-paper", "--run-dir="], ["--run-dir", "must be a path, got ''"]),
        (["demolish"], ["'demolish'", "demo"]),
        ([], ["COMMAND"]),
    ],
    ids=lambda value: "_".join(value)[:40] if isinstance(value, list) else None,
)
def test_bad_flags_are_one_line(capsys, argv, parts):
    status, out, err = run_main(capsys, *argv)
    assert (status, out) == (2, "")
    assert_one_line(err, "--help", *parts)


@pytest.mark.parametrize("kind", ["missing", "empty", "file"])
def test_bad_corpus_is_one_line(capsys, tmp_path, kind):
    corpus = tmp_path / "corpus"
    if kind == "empty":
        corpus.mkdir()
    elif kind == "file":
        corpus.write_text("x = 1\n")
    status, out, err = run_main(
        capsys, "demo", "--corpus", corpus, "--run-dir", tmp_path / "run", "--quick"
    )
    assert (status, out) == (1, "")
    assert_one_line(err, "distill: corpus:", str(corpus))
    assert not (tmp_path / "run").exists()


def test_full_disk_is_one_line(capsys, corpus_dir, tmp_path, tiny_preset, monkeypatch):
    def fail(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.fsync", fail)
    status, _, err = run_main(
        capsys, "demo", "--corpus", corpus_dir, "--run-dir", tmp_path, "--quick"
    )
    assert status == 1
    assert_one_line(err, "cannot write", str(tmp_path), "No space left on device")
    assert not (tmp_path / "teacher").exists()


def test_run_dir_that_is_a_file_is_one_line(capsys, corpus_dir, tmp_path, tiny_preset):
    run_dir = tmp_path / "run"
    run_dir.write_text("mine")
    status, _, err = run_main(
        capsys, "demo", "--corpus", corpus_dir, "--run-dir", run_dir, "--quick"
    )
    assert status == 1
    assert_one_line(err, "distill:", str(run_dir))
    assert run_dir.read_text() == "mine"


@pytest.mark.slow
def test_demo_ends_with_a_table_and_a_report(capsys, corpus_dir, tmp_path, tiny_preset):
    status, out, _ = run_main(
        capsys, "demo", "--corpus", corpus_dir, "--run-dir", tmp_path, "--quick"
    )
    assert status == 0
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", out)  # plain, where it is no terminal
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    for models in metrics["parts"].values():
        assert f"{models[0]['parameters']:,}" in out
    assert f"{metrics['training']['ratio']:.1f} times" in out
    assert str(tmp_path / "report.html") in out
    folders = {p.name for p in tmp_path.iterdir() if p.is_dir()}
    assert folders == {
        *("start", "teacher", "teacher-on-1"),
        *(f"{part}-{seed}" for part in ("hybrid", "small", "small-labels") for seed in (1, 2, 3)),
    }
    again, out, _ = run_main(
        capsys, "demo", "--corpus", corpus_dir, "--run-dir", tmp_path, "--quick", "--resume"
    )
    assert again == 0
    assert out.count("trained before") == 1 + 1 + 3 * 3


def test_help_explains_itself_without_loading_torch():
    code = (
        "import sys\nfrom distill.__main__ import main\n"
        "try: main(['demo', '--help'])\nfinally: assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    for word in ("--corpus", "--resume", "--steps-scale", "Controls", "hybrid", "report.html"):
        assert word in done.stdout


def test_resume_command_repeats_the_flags():
    assert (
        resume_command(["demo", "--corpus", "my files", "--quick"])
        == "python -m distill demo --corpus 'my files' --quick --resume"
    )
    assert resume_command(["demo", "--resume"]) == "python -m distill demo --resume"


def test_resume_command_is_the_launcher_s():
    given = ["run", "my recipe.yaml"]
    launch = ["launch", "--config_file", "8-gpus.yaml", "-m", "distill", *given]
    want = "accelerate launch --config_file 8-gpus.yaml -m distill run 'my recipe.yaml' --resume"
    for before in (["/v/bin/python", "/v/bin/accelerate"], ["/v/bin/python3.11", "accelerate"]):
        assert resume_command(given, [*before, *launch]) == want
    launch = ["/v/bin/python", "-m", "torch.distributed.run", "-m", "distill", *given]
    want = "python -m torch.distributed.run -m distill run 'my recipe.yaml' --resume"
    assert resume_command(given, launch) == want


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_signal_leaves_a_checkpoint_and_says_how_to_go_on(corpus_dir, tmp_path, signum):
    command = [sys.executable, "-m", "distill", "demo", "--quick", "--corpus", str(corpus_dir)]
    command += ["--run-dir", str(tmp_path), "--steps-scale", "900", "--threads", "1"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    try:
        for line in process.stdout:
            if line.startswith("teacher"):
                break
        time.sleep(0.2)
        process.send_signal(signum)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 128 + signum
    assert_one_line(err, "stopped; continue with: python -m distill demo", "--resume")
    assert list((tmp_path / "teacher" / "checkpoints" / "train").glob("step-*"))
