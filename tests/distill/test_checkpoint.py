"""A file is whole or it is the old one, and what differs is named."""

import errno
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from distill.errors import DistillError
from distill.files import (
    file_digest,
    replace_folder,
    require_place,
    settings_difference,
    write_atomically,
)

SETTINGS = {"stage": {"steps": 4, "lr": 0.1}, "seed": 1}


def test_difference_names_what_changed():
    assert settings_difference(SETTINGS, dict(SETTINGS)) is None
    other = {"stage": {"steps": 9, "lr": 0.1}, "seed": 1}
    assert settings_difference(SETTINGS, other) == "stage.steps 4 there, 9 here"


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
        "from distill.files import write_atomically\n"
        "from distill.errors import DistillError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try: write_atomically(Path(sys.argv[1]), bytes(1 << 20))\n"
        "except DistillError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True)
    assert done.stdout == f"cannot write {path}: File too large\n", done.stderr
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


@pytest.mark.parametrize("kind", ["weights", "copy"])
def test_folder_that_the_system_cuts_short_keeps_the_old_one(tmp_path, file_limit, kind):
    source, path = tmp_path / "source", tmp_path / "model"
    for folder in (source, path):
        folder.mkdir()
        save_file({"w": torch.zeros(1000)}, folder / "a.safetensors")

    def write(to):
        if kind == "copy":
            shutil.copytree(source, to)
        else:
            to.mkdir()
            save_file({"w": torch.ones(1000)}, to / "a.safetensors")

    before = file_digest(path / "a.safetensors")
    with file_limit(64), pytest.raises(DistillError, match=r"cannot write .*model: ") as caught:
        replace_folder(path, write)
    assert "File too large" in str(caught.value) and "[(" not in str(caught.value)
    assert file_digest(path / "a.safetensors") == before
    assert {place.name for place in tmp_path.iterdir()} == {"source", "model"}


def test_a_model_replaces_a_model_alone(tmp_path):
    mine, model, empty = (tmp_path / name for name in ("mine", "model", "empty"))
    for folder in (mine, model, empty):
        folder.mkdir()
    (mine / "notes.md").write_text("mine")
    (model / "config.json").write_text("{}")
    for place in (tmp_path / "new", empty, model):
        require_place(place, mine)
    for place in (mine, mine / "notes.md"):
        with pytest.raises(DistillError, match="must be a new folder or one of a model"):
            require_place(place, model)
    with pytest.raises(DistillError, match="must be another folder than what is read"):
        require_place(tmp_path / "empty" / ".." / "model", model)
