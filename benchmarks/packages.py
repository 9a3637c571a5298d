"""Packages of other projects that cases are compared with: called as they are, never a dependency.

They stand in a folder of their own, beside the torch that is here, so that they run in the process
that times ours, in turn with ours. `python -m benchmarks peers` fills it.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
from types import ModuleType

from .machine import ROOT
from .problem import UnavailableError

FOLDER = ROOT / ".peers"
# Without what they depend on, torch among it; what else they import is here or in the list.
PACKAGES = ("transformers==5.23.0", "regex", "mlstm_kernels==2.0.6", "einops")


def install() -> None:
    """Puts PACKAGES into FOLDER; CalledProcessError where pip fails."""
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--upgrade", "--target"]
    subprocess.run([*pip, str(FOLDER), *PACKAGES], check=True)


def load(module: str) -> ModuleType:
    """A module of one of PACKAGES, from FOLDER where it is there."""
    if str(FOLDER) not in sys.path:
        sys.path.insert(0, str(FOLDER))
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise UnavailableError(
            f"{package} cannot be imported ({error}); `python -m benchmarks peers` installs it"
        ) from error
