"""Checkpoints of training: whole or refused, and nothing read from one that is not whole."""

import errno
import json
import os

import pytest
import torch
from run_cases import make_accelerator

from distill.errors import DistillError
from distill.training import snapshot

SETTINGS = {"stages": {"a": {"lr": 1.0}}}


def make():
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    module[0].bias.requires_grad_(False)
    trained = [p for p in module.parameters() if p.requires_grad]
    return module, torch.optim.AdamW(trained, lr=0.1, fused=True)


def train(module, optimizer, steps=1):
    for _ in range(steps):
        optimizer.zero_grad()
        module(torch.ones(5, 3)).square().sum().backward()
        optimizer.step()


@pytest.fixture
def accelerator():
    return make_accelerator()


@pytest.fixture
def saved(tmp_path, accelerator):
    """A model after two steps, and its checkpoint."""
    module, optimizer = make()
    train(module, optimizer, 2)
    manifest = snapshot.Manifest(SETTINGS, 2, 1.5, {})
    state = snapshot.training_state(module, optimizer)
    return module, optimizer, snapshot.save(tmp_path / "c", accelerator, state, manifest, keep=2)


def read(path, accelerator):
    module, optimizer = make()
    manifest = snapshot.read_manifest(path, SETTINGS)
    snapshot.load(path, accelerator, module, optimizer, manifest)
    return module, optimizer, manifest


def test_training_goes_on_to_the_same_bits(saved, accelerator):
    module, optimizer, path = saved
    again, its_optimizer, manifest = read(path, accelerator)
    assert (manifest.step, manifest.train_s) == (2, 1.5)
    for each in ((module, optimizer), (again, its_optimizer)):
        train(*each, 3)
    assert all(map(torch.equal, module.parameters(), again.parameters()))
    assert {file.suffix for file in path.iterdir()} == {".json", ".safetensors"}


@pytest.mark.parametrize("damage", ["flip", "cut", "missing", "more", "manifest", "no manifest"])
def test_damage_is_refused_and_nothing_is_read(saved, accelerator, damage):
    path = saved[2]
    (file,) = path.glob("*.safetensors")
    data = bytearray(file.read_bytes())
    if damage == "flip":
        data[-3] ^= 1
        file.write_bytes(data)
    elif damage == "cut":
        file.write_bytes(data[:-8])
    elif damage == "missing":
        file.unlink()
    elif damage == "more":
        (path / "other.safetensors").write_bytes(data)
    elif damage == "manifest":
        (path / "manifest.json").write_text('{"format": ')
    else:
        (path / "manifest.json").unlink()
    module, optimizer = make()
    before = [p.clone() for p in module.parameters()]
    with pytest.raises(DistillError, match=r"step-00000002 is damaged \(.*\); delete it"):
        manifest = snapshot.read_manifest(path, SETTINGS)
        snapshot.load(path, accelerator, module, optimizer, manifest)
    assert all(map(torch.equal, module.parameters(), before)) and not optimizer.state


def test_other_settings_are_refused(saved):
    with pytest.raises(DistillError, match=r"stages.a.lr 1.0 there, 2.0 here"):
        snapshot.read_manifest(saved[2], {"stages": {"a": {"lr": 2.0}}})


def test_a_full_disk_leaves_the_last_one(saved, accelerator, monkeypatch):
    module, optimizer, path = saved

    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.fsync", fail)
    state = snapshot.training_state(module, optimizer)
    with pytest.raises(DistillError, match=r"cannot write .*00003: .*No space left on device"):
        manifest = snapshot.Manifest(SETTINGS, 3, 1.5, {})
        snapshot.save(path.parent, accelerator, state, manifest, keep=2)
    assert [x.name for x in path.parent.iterdir()] == [path.name]
    monkeypatch.undo()
    read(path, accelerator)


def test_a_file_that_the_system_cuts_short_is_one_line(saved, accelerator, file_limit):
    module, optimizer, path = saved
    state = snapshot.training_state(module, optimizer)
    manifest = snapshot.Manifest(SETTINGS, 3, 1.5, {})
    with file_limit(64), pytest.raises(DistillError, match=r"cannot write .*00003: ") as caught:
        snapshot.save(path.parent, accelerator, state, manifest, keep=2)
    assert "File too large" in str(caught.value) and "Traceback" not in str(caught.value)
    read(path, accelerator)


def test_the_last_ones_are_kept(saved, accelerator):
    module, optimizer, path = saved
    for step in (3, 4):
        manifest = snapshot.Manifest(SETTINGS, step, 1.5, {})
        state = snapshot.training_state(module, optimizer)
        snapshot.save(path.parent, accelerator, state, manifest, keep=2)
    found = snapshot.checkpoints(path.parent)
    assert [json.loads((x / "manifest.json").read_text())["step"] for x in found] == [3, 4]
