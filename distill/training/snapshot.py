"""Where training stands, as a folder of safetensors that any number of ranks writes and reads.

A folder is written beside its place and moved there when it is whole; a manifest with the checksum
of each file is in it. Weights that are not trained are not in it: a stage begins with them.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException

from distill.errors import DistillError
from distill.files import file_digest, settings_difference, sync_directory, write_atomically

FORMAT = "xlstm_kernels.training/1"
MANIFEST = "manifest.json"
NAME = "step-{:08d}"
MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW


@dataclass(frozen=True)
class Manifest:
    """`settings`: all that decides the weights. `files`: their checksums."""

    settings: dict[str, Any]
    step: int
    train_s: float
    files: dict[str, str]


def training_state(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What changes in a step, by name; moments that are not there yet are made."""
    state: dict[str, Tensor] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        state[f"model.{name}"] = parameter.detach()
        own = optimizer.state[parameter]
        for key in MOMENTS:
            if key not in own:
                own[key] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state[f"optimizer.{name}.{key}"] = own[key]
        if "step" not in own:
            own["step"] = torch.zeros((), device=parameter.device)
        # The format has no tensors without a dimension.
        state[f"optimizer.{name}.step"] = own["step"].view(1)
    return state


def save(
    folder: Path,
    accelerator: Accelerator,
    state: dict[str, Tensor],
    manifest: Manifest,
    keep: int,
) -> Path:
    """Write a checkpoint below `folder` and remove all but the last `keep`; all ranks call it."""
    path = folder / NAME.format(manifest.step)
    temporary = folder / f".{path.name}"
    failed: BaseException | None = None
    try:
        if accelerator.is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
    except OSError as error:
        failed = error
    _raise_together(accelerator, path, failed)
    try:
        writer = dcp.HuggingFaceStorageWriter(str(temporary), save_distributed=True)
        with _alone():
            dcp.save(state, storage_writer=writer, no_dist=accelerator.num_processes == 1)
    except OSError as error:
        failed = error
    except CheckpointException as error:
        failed = _first_failure(error)
    try:
        checksums = {} if failed else _share_of_checksums(accelerator, temporary)
    except OSError as error:
        failed, checksums = error, {}
    files = dict(item for part in gather_object([checksums]) for item in part.items())
    _raise_together(accelerator, path, failed, temporary)
    try:
        if accelerator.is_main_process:
            whole = {"format": FORMAT, **asdict(manifest), "files": files}
            write_atomically(temporary / MANIFEST, json.dumps(whole, indent=1))
            shutil.rmtree(path, ignore_errors=True)
            temporary.rename(path)
            sync_directory(folder)
            for old in checkpoints(folder)[:-keep]:
                shutil.rmtree(old, ignore_errors=True)
    except (OSError, DistillError) as error:
        failed = error
    _raise_together(accelerator, path, failed, temporary)
    return path


def checkpoints(folder: Path) -> list[Path]:
    """Those below `folder`, the last one last."""
    return sorted(folder.glob("step-*"))


def read_manifest(path: Path, settings: dict[str, Any]) -> Manifest:
    """Of a checkpoint of `settings`; another one, or a damaged one, is refused with the reason."""
    try:
        found = json.loads((path / MANIFEST).read_text())
        if found.pop("format") != FORMAT:
            raise DistillError(f"checkpoint: {path} must have format {FORMAT!r}")
        manifest = Manifest(**found)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DistillError(f"checkpoint: {path} is damaged ({error}); delete it") from error
    if difference := settings_difference(manifest.settings, settings):
        raise DistillError(f"checkpoint: {path} is of other settings ({difference})")
    return manifest


def load(
    path: Path,
    accelerator: Accelerator,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    manifest: Manifest,
) -> None:
    """Read a checkpoint into module and optimizer; nothing is touched unless all of it is whole."""
    wrong = [_damage(path, manifest)] if accelerator.is_main_process else []
    for why in gather_object(wrong):
        if why:
            raise DistillError(f"checkpoint: {path} is damaged ({why}); delete it")
    state = training_state(module, optimizer)
    try:
        reader = dcp.HuggingFaceStorageReader(str(path))
        with _alone():
            dcp.load(state, storage_reader=reader, no_dist=accelerator.num_processes == 1)
    except CheckpointException as error:
        why = " ".join(str(_first_failure(error)).split())
        raise DistillError(f"checkpoint: {path} is of another model: {why}") from error


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Without the warning that one process is one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield


def _first_failure(error: CheckpointException) -> BaseException:
    """What one of the ranks ran into; as text the whole has all of their tracebacks."""
    return next((found for found, _ in error.failures.values()), error)


def _damage(path: Path, manifest: Manifest) -> str | None:
    there = {file.name for file in path.iterdir()} - {MANIFEST}
    if there != manifest.files.keys():
        odd = sorted(there ^ manifest.files.keys())
        return f"{odd[0]} is {'not of it' if odd[0] in there else 'missing'}"
    for name, checksum in manifest.files.items():
        if file_digest(path / name) != checksum:
            return f"wrong checksum of {name}"
    return None


def _share_of_checksums(accelerator: Accelerator, folder: Path) -> dict[str, str]:
    accelerator.wait_for_everyone()
    mine = sorted(folder.iterdir())[accelerator.process_index :: accelerator.num_processes]
    return {file.name: file_digest(file) for file in mine}


def _raise_together(
    accelerator: Accelerator,
    path: Path,
    failed: BaseException | None,
    temporary: Path | None = None,
) -> None:
    """DistillError on all ranks where one of them failed, so that none waits for another."""
    reasons = [why for why in gather_object([str(failed or "")]) if why]
    if not reasons:
        return
    if temporary is not None and accelerator.is_main_process:
        with contextlib.suppress(OSError):
            shutil.rmtree(temporary)
    raise DistillError(f"cannot write {path}: {' '.join(reasons[0].split())}") from failed
