"""Distil a larger language model into a smaller recurrent one on the kernels of xlstm_kernels."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distill import stages
    from distill.compression import Compressed, compress
    from distill.evaluation import evaluate
    from distill.hybrid import hybridize, load_student, new_parameters
    from distill.losses import DistillModule, LossSpec, register_loss
    from distill.merging import merge
    from distill.recipe import Recipe
    from distill.runs import run
    from distill.teacher import TeacherCache
    from distill.tuning import tune

# Imported when asked for: the command line's --help does not wait for torch and transformers.
_MODULES = {
    "Compressed": "distill.compression",
    "DistillModule": "distill.losses",
    "LossSpec": "distill.losses",
    "Recipe": "distill.recipe",
    "TeacherCache": "distill.teacher",
    "compress": "distill.compression",
    "evaluate": "distill.evaluation",
    "hybridize": "distill.hybrid",
    "load_student": "distill.hybrid",
    "merge": "distill.merging",
    "new_parameters": "distill.hybrid",
    "register_loss": "distill.losses",
    "run": "distill.runs",
    "tune": "distill.tuning",
}

__all__ = [
    "Compressed",
    "DistillModule",
    "LossSpec",
    "Recipe",
    "TeacherCache",
    "compress",
    "evaluate",
    "hybridize",
    "load_student",
    "merge",
    "new_parameters",
    "register_loss",
    "run",
    "stages",
    "tune",
]


def __getattr__(name: str) -> Any:
    if name == "stages":
        return import_module("distill.stages")
    if name not in _MODULES:
        raise AttributeError(f"module 'distill' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
