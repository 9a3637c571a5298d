"""Whole or not at all: files that are replaced in one move; and how settings differ."""

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from distill.errors import DistillError


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
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        write(temporary)
        shutil.rmtree(path, ignore_errors=True)
        temporary.rename(path)
        sync_directory(path.parent)
    except shutil.Error as error:  # of several files, each with its reason
        raise DistillError(f"cannot write {path}: {error.args[0][0][-1]}") from error
    except SafetensorError as error:  # which the system's own are wrapped in
        raise DistillError(f"cannot write {path}: {error}") from error
    except OSError as error:
        raise DistillError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def require_place(path: Path, *sources: Path) -> None:
    """Raises DistillError unless a model may be put at `path`: in a new folder, an empty one, or in
    the place of another model that is none of those it is made from."""
    if path.resolve() in [source.resolve() for source in sources]:
        raise DistillError(f"--out: must be another folder than what is read, got {path}")
    if not path.exists() or (path / "config.json").is_file():
        return
    if not path.is_dir() or any(path.iterdir()):
        raise DistillError(f"--out: must be a new folder or one of a model, {path} is neither")


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


def settings_difference(there: dict, here: dict) -> str | None:
    """None if they are the same, else the first few that differ."""
    there, here = _flat(there), _flat(here)
    changed = [
        f"{key} {there.get(key)!r} there, {here.get(key)!r} here"
        for key in sorted(there.keys() | here.keys())
        if there.get(key) != here.get(key)
    ]
    return "; ".join(changed[:3]) or None


def _flat(settings: dict, prefix: str = "") -> dict:
    """Nested settings with dotted keys."""
    flat: dict[str, object] = {}
    for key, value in settings.items():
        nested = isinstance(value, dict)
        flat |= _flat(value, f"{prefix}{key}.") if nested else {prefix + key: value}
    return flat
