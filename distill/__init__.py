"""Distil language models into hybrid or smaller ones on the kernels of xlstm_kernels."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distill.data.teacher import TeacherCache
    from distill.evaluation.scores import evaluate
    from distill.hybrid import stages
    from distill.hybrid.convert import hybridize, load_student, new_parameters
    from distill.hybrid.options import HybridOptions
    from distill.losses.module import DistillModule, LossSpec, register_loss
    from distill.models.compression import Compressed, compress
    from distill.models.merging import merge
    from distill.models.recurrent import SLSTMForCausalLM
    from distill.training.recipe import Recipe
    from distill.training.runs import run
    from distill.training.tuning import tune

# Imported when asked for: the command line's --help does not wait for torch and transformers.
_MODULES = {
    "Compressed": "distill.models.compression",
    "DistillModule": "distill.losses.module",
    "HybridOptions": "distill.hybrid.options",
    "LossSpec": "distill.losses.module",
    "Recipe": "distill.training.recipe",
    "SLSTMForCausalLM": "distill.models.recurrent",
    "TeacherCache": "distill.data.teacher",
    "compress": "distill.models.compression",
    "evaluate": "distill.evaluation.scores",
    "hybridize": "distill.hybrid.convert",
    "load_student": "distill.hybrid.convert",
    "merge": "distill.models.merging",
    "new_parameters": "distill.hybrid.convert",
    "register_loss": "distill.losses.module",
    "run": "distill.training.runs",
    "tune": "distill.training.tuning",
}

__all__ = [
    "Compressed",
    "DistillModule",
    "HybridOptions",
    "LossSpec",
    "Recipe",
    "SLSTMForCausalLM",
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
        return import_module("distill.hybrid.stages")
    if name not in _MODULES:
        raise AttributeError(f"module 'distill' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
