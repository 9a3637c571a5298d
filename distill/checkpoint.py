"""Whole or not at all: files replaced in one move, and training states as safetensors."""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from distill.errors import DistillError

FORMAT = "xlstm_kernels.distill/1"


def write_atomically(path: Path, data: bytes | str) -> None:
    """Replace `path` by `data` in one move; if anything fails, the old file is still there."""
    data = data.encode() if isinstance(data, str) else data
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        sync_directory(path.parent)
    except OSError as error:
        raise DistillError(f"cannot write {path}: {error.strerror or error}") from error


def replace_folder(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a folder beside `path` and put it there, whole or not at all."""
    temporary = path.with_name(f".{path.name}")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        write(temporary)
        shutil.rmtree(path, ignore_errors=True)
        temporary.rename(path)
        sync_directory(path.parent)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise DistillError(f"cannot write {path}: {error.strerror or error}") from error


def file_digest(path: Path) -> str:
    """SHA-256 of a file of any size."""
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            sha.update(chunk)
    return sha.hexdigest()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def sync_directory(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@dataclass
class Checkpoint:
    """A stage after `step` steps: weights, optimizer moments, generator, and what has been logged.

    `settings` is everything that decides the weights; a checkpoint is only good for the same ones.
    `history` has one dict per logged point; `train_s` is the time spent in training steps.
    """

    settings: dict
    step: int
    train_s: float
    history: list[dict]
    tensors: dict[str, torch.Tensor]

    def save(self, path: Path) -> None:
        tensors = {name: tensor.contiguous() for name, tensor in self.tensors.items()}
        metadata = {
            "format": FORMAT,
            "settings": json.dumps(self.settings),
            "step": str(self.step),
            "train_s": repr(self.train_s),
            "history": json.dumps(self.history),
        }
        metadata["sha256"] = _digest(tensors, metadata)
        write_atomically(path, save(tensors, metadata))

    @classmethod
    def load(cls, path: Path) -> "Checkpoint":
        """Read a checkpoint; a damaged or foreign file is refused with the reason."""
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except OSError as error:
            raise DistillError(f"checkpoint: cannot read {path}: {error}") from error
        except SafetensorError as error:
            raise DistillError(f"checkpoint: {path} is damaged ({error}); delete it") from error
        if metadata.get("format") != FORMAT:
            raise DistillError(
                f"checkpoint: {path} must have format {FORMAT!r}, got {metadata.get('format')!r}"
            )
        if metadata.pop("sha256", None) != _digest(tensors, metadata):
            raise DistillError(f"checkpoint: {path} is damaged (wrong checksum); delete it")
        return cls(
            settings=json.loads(metadata["settings"]),
            step=int(metadata["step"]),
            train_s=float(metadata["train_s"]),
            history=json.loads(metadata["history"]),
            tensors=tensors,
        )

    def difference(self, settings: dict) -> str | None:
        """None if `settings` are those of the checkpoint, else the first few that differ."""
        return settings_difference(self.settings, settings)


def settings_difference(there: dict, here: dict) -> str | None:
    """None if they are the same, else the first few that differ."""
    there, here = _flat(there), _flat(here)
    changed = [
        f"{key} {there.get(key)!r} there, {here.get(key)!r} here"
        for key in sorted(there.keys() | here.keys())
        if there.get(key) != here.get(key)
    ]
    return "; ".join(changed[:3]) or None


def _digest(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> str:
    sha = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(tensors):
        sha.update(name.encode())
        sha.update(tensors[name].numpy().data)
    return sha.hexdigest()


def _flat(settings: dict, prefix: str = "") -> dict:
    """Nested settings with dotted keys."""
    flat: dict[str, object] = {}
    for key, value in settings.items():
        nested = isinstance(value, dict)
        flat |= _flat(value, f"{prefix}{key}.") if nested else {prefix + key: value}
    return flat


def training_tensors(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, torch.Tensor]:
    """Weights as model.*, optimizer state as optimizer.<parameter>.*, torch's generator as rng."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{name}.{key}"] = value
    tensors["rng"] = torch.get_rng_state()
    return tensors


def restore_training(
    tensors: dict[str, torch.Tensor], model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """The inverse of `training_tensors`."""
    restore_model(tensors, model)
    for name, parameter in model.named_parameters():
        prefix = f"optimizer.{name}."
        state = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        if state:
            optimizer.state[parameter] = state
    torch.set_rng_state(tensors["rng"])


def restore_model(tensors: dict[str, torch.Tensor], model: torch.nn.Module) -> None:
    """Load the weights alone."""
    weights = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
    model.load_state_dict(weights)
