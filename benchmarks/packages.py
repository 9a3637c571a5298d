"""Packages of other projects that cases are compared with: called as they are, never a dependency.

They stand in a folder of their own, beside the torch that is here, so that they run in the process
that times ours, in turn with ours. `python -m benchmarks peers` fills it.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import ModuleType

from .machine import ROOT
from .problem import UnavailableError

FOLDER = ROOT / ".peers"
# Without what they depend on, torch among it; what else they import is here or in the list.
PACKAGES = ("transformers==5.23.0", "regex", "mlstm_kernels==2.0.6", "einops")
# transformers would build its xLSTM of xlstm, where it finds that when it is first imported.
APART = FOLDER / "apart"
PACKAGES_APART = ("xlstm==2.0.6",)
TRANSFORMERS_XLSTM = "transformers.models.xlstm.modeling_xlstm"


def install() -> None:
    """Puts PACKAGES into FOLDER, those apart into theirs; CalledProcessError where pip fails."""
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--upgrade", "--target"]
    for folder, packages in ((FOLDER, PACKAGES), (APART, PACKAGES_APART)):
        subprocess.run([*pip, str(folder), *packages], check=True)


def load(module: str) -> ModuleType:
    """A module of one of PACKAGES or PACKAGES_APART, from its folder where it is there."""
    _look_in(FOLDER)
    package = module.partition(".")[0]
    if package == "xlstm":
        with suppress(UnavailableError):
            load(TRANSFORMERS_XLSTM)
        _look_in(APART)
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UnavailableError(
            f"{package} cannot be imported ({error}); `python -m benchmarks peers` installs it"
        ) from error


def _look_in(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
