"""A file is whole or it is the old one, and what is damaged is refused by name."""

import errno
import os
import subprocess
import sys

import pytest
import torch

from distill.checkpoint import (
    Checkpoint,
    restore_training,
    training_tensors,
    write_atomically,
)
from distill.errors import DistillError

SETTINGS = {"stage": {"steps": 4, "lr": 0.1}, "seed": 1}


@pytest.fixture
def checkpoint() -> Checkpoint:
    tensors = {"model.weight": torch.randn(3, 4), "rng": torch.get_rng_state()}
    return Checkpoint(SETTINGS, 3, 1.25, [{"step": 2, "loss": 0.1 + 0.2}], tensors)


def test_round_trip(checkpoint, tmp_path):
    path = tmp_path / "deep" / "down" / "a.safetensors"
    checkpoint.save(path)
    loaded = Checkpoint.load(path)
    assert (loaded.settings, loaded.step, loaded.train_s) == (SETTINGS, 3, 1.25)
    assert loaded.history == checkpoint.history
    assert loaded.tensors.keys() == checkpoint.tensors.keys()
    assert all(torch.equal(loaded.tensors[k], v) for k, v in checkpoint.tensors.items())
    assert [p.name for p in path.parent.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize("damage", ["truncated", "flipped-header", "empty", "text"])
def test_damaged_file_is_refused(checkpoint, tmp_path, damage):
    path = tmp_path / "a.safetensors"
    checkpoint.save(path)
    data = path.read_bytes()
    path.write_bytes(
        {
            "truncated": data[:-100],
            "flipped-header": bytes([data[0] ^ 0x55]) + data[1:],
            "empty": b"",
            "text": b"not a checkpoint",
        }[damage]
    )
    with pytest.raises(DistillError, match=r"a\.safetensors is damaged"):
        Checkpoint.load(path)


@pytest.mark.parametrize("what", ["weight", "step"])
def test_flipped_bit_is_refused(checkpoint, tmp_path, what):
    path = tmp_path / "a.safetensors"
    checkpoint.save(path)
    data = bytearray(path.read_bytes())
    data[-20 if what == "weight" else data.index(b'"step":"3"') + 8] ^= 1
    path.write_bytes(data)
    with pytest.raises(DistillError, match=r"a\.safetensors is damaged"):
        Checkpoint.load(path)


def test_foreign_safetensors_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"x": torch.ones(1)}, tmp_path / "a.safetensors")
    with pytest.raises(DistillError, match="must have format"):
        Checkpoint.load(tmp_path / "a.safetensors")


def test_difference_names_what_changed(checkpoint):
    assert checkpoint.difference(SETTINGS) is None
    other = {"stage": {"steps": 9, "lr": 0.1}, "seed": 1}
    assert checkpoint.difference(other) == "stage.steps 4 there, 9 here"


def test_training_state_round_trip_continues_bit_for_bit():
    def make():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.5))
        return model, torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)

    def step(model, optimizer):
        optimizer.zero_grad()
        model(torch.ones(2, 4)).square().sum().backward()
        optimizer.step()

    model, optimizer = make()
    step(model, optimizer)
    saved = {k: v.clone() for k, v in training_tensors(model, optimizer).items()}
    step(model, optimizer)
    again, optimizer_again = make()
    restore_training(saved, again, optimizer_again)
    step(again, optimizer_again)
    for name, tensor in training_tensors(model, optimizer).items():
        assert torch.equal(tensor, training_tensors(again, optimizer_again)[name]), name


@pytest.mark.parametrize("where", ["os.fsync", "os.replace"])
def test_full_disk_keeps_the_old_file(tmp_path, monkeypatch, where):
    path = tmp_path / "a.bin"
    write_atomically(path, b"old")

    def fail(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(where, fail)
    with pytest.raises(DistillError, match=r"cannot write .*a\.bin: No space left on device"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


def test_write_that_the_system_cuts_short_keeps_the_old_file(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    code = (
        "import resource, sys; from pathlib import Path\n"
        "from distill.checkpoint import write_atomically\n"
        "from distill.errors import DistillError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try: write_atomically(Path(sys.argv[1]), bytes(1 << 20))\n"
        "except DistillError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True)
    assert done.stdout == f"cannot write {path}: File too large\n", done.stderr
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]
