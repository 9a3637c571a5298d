"""An interrupted demo, continued, ends with the very same weights."""

import os
import signal

import pytest
import torch

from distill.checkpoint import Checkpoint
from distill.demo.trainer import Stage
from distill.errors import DistillError, Interrupted

STAGES = ("teacher", "student", "control")


def weights(run_dir) -> dict[str, torch.Tensor]:
    return {
        f"{stage}.{name}": tensor
        for stage in STAGES
        for name, tensor in Checkpoint.load(
            run_dir / "checkpoints" / f"{stage}.safetensors"
        ).tensors.items()
    }


def histories(run_dir) -> list:
    paths = [run_dir / "checkpoints" / f"{stage}.safetensors" for stage in STAGES]
    return [Checkpoint.load(path).history for path in paths]


def train(demo) -> None:
    """The training part of a demo, under its interrupt; torch's generator starts anywhere."""
    torch.seed()
    with demo.interrupt:
        demo.train()


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    return tmp_path_factory.mktemp("whole")


@pytest.fixture
def uninterrupted(whole_run, make_demo):
    if not (whole_run / "checkpoints").exists():
        train(make_demo(whole_run))
    return whole_run


@pytest.fixture
def signal_after(monkeypatch):
    """signal_after(n, signum): the process gets the signal within its n-th training step."""

    def arrange(steps: int, signum: int = signal.SIGINT) -> None:
        count, original = 0, STEP

        def step(self):
            nonlocal count
            count += 1
            if count == steps:
                os.kill(os.getpid(), signum)
            return original(self)

        monkeypatch.setattr(Stage, "_train_step", step)

    return arrange


STEP = Stage._train_step


@pytest.mark.parametrize(
    "stops",
    [(1,), (6,), (7,), (10,), (17,), (2, 3, 8)],
    ids=lambda stops: "stop-" + "-".join(map(str, stops)),
)
def test_resumed_weights_are_bit_identical(
    stops, uninterrupted, make_demo, signal_after, monkeypatch, tmp_path
):
    for index, steps in enumerate(stops):
        signal_after(steps)
        with pytest.raises(Interrupted) as stop:
            train(make_demo(tmp_path, resume=index > 0))
        assert stop.value.signum == signal.SIGINT
    monkeypatch.setattr(Stage, "_train_step", STEP)
    train(make_demo(tmp_path, resume=True))

    want, got = weights(uninterrupted), weights(tmp_path)
    assert want.keys() == got.keys()
    different = [name for name in want if not torch.equal(want[name], got[name])]
    assert different == []
    assert histories(tmp_path) == histories(uninterrupted)


def test_sigterm_is_honoured_after_the_step(make_demo, signal_after, tmp_path):
    signal_after(3, signal.SIGTERM)
    with pytest.raises(Interrupted) as stop:
        train(make_demo(tmp_path))
    assert stop.value.signum == signal.SIGTERM
    assert Checkpoint.load(tmp_path / "checkpoints" / "teacher.safetensors").step == 3


def test_finished_teacher_is_used_again_and_the_rest_is_not(make_demo, uninterrupted, monkeypatch):
    trained = []
    monkeypatch.setattr(Stage, "_train_step", lambda self: trained.append(self.name) or STEP(self))
    demo = make_demo(uninterrupted)
    train(demo)
    assert set(trained) == {"student", "control"}
    assert "teacher  trained before" in demo.output.getvalue()


def test_teacher_of_other_settings_is_trained_anew_with_a_word(make_demo, uninterrupted, tmp_path):
    train(make_demo(tmp_path))
    demo = make_demo(tmp_path, seed=7)
    train(demo)
    assert "seed 1000 there, 7000 here" in demo.output.getvalue()
    assert (
        Checkpoint.load(tmp_path / "checkpoints" / "teacher.safetensors").settings["seed"] == 7000
    )


def test_resume_with_other_settings_is_refused(make_demo, uninterrupted):
    with pytest.raises(DistillError, match=r"other settings.*rows 4 there, 8 here"):
        train(make_demo(uninterrupted, resume=True, rows=8))


def test_resume_from_nothing_starts_from_the_beginning(make_demo, tmp_path, uninterrupted):
    train(make_demo(tmp_path, resume=True))
    want, got = weights(uninterrupted), weights(tmp_path)
    assert all(torch.equal(want[name], got[name]) for name in want)


def test_damaged_checkpoint_is_refused_on_resume(make_demo, signal_after, tmp_path):
    signal_after(3)
    with pytest.raises(Interrupted):
        train(make_demo(tmp_path))
    path = tmp_path / "checkpoints" / "teacher.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(DistillError, match=r"teacher\.safetensors is damaged"):
        train(make_demo(tmp_path, resume=True))
