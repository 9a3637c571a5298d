"""Tasks of lm-eval-harness, for the report: an extra, imported when asked for.

Requests go one at a time, since a batch of them would be padded, which hybrid models refuse.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distill.errors import DistillError
from distill.evaluation.assessment import GENERATION, TEXT, task


def harness_tasks(
    models: Mapping[str, Any],
    tokenizer: Any,
    names: Sequence[str],
    *,
    folder: Path | None = None,
    limit: int | None = None,
) -> list[dict[str, Any]]:
    """Scores of models on tasks of the harness, as those of `assess`.

    Args:
        models: causal language models of transformers by name.
        tokenizer: that of all models.
        names: of tasks.
        folder: of tasks of your own, in the harness's YAML.
        limit: of examples a task.

    Raises:
        DistillError: lm_eval is not installed, or a task has no score of which more is better.
    """
    require_harness()
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=None if folder is None else str(folder))
    scores: dict[str, dict[str, float]] = {}
    kinds: dict[str, str] = {}
    for model_name, model in models.items():
        wrapped = HFLM(pretrained=model.eval(), tokenizer=tokenizer, batch_size=1)
        found = simple_evaluate(
            model=wrapped,
            tasks=list(names),
            task_manager=manager,
            limit=limit,
            bootstrap_iters=0,
            log_samples=False,
        )
        for name, config in found["configs"].items():
            metrics, better = found["results"][name], found["higher_is_better"][name]
            scores.setdefault(name, {})[model_name] = _first(name, metrics, better)
            writes = config["output_type"] == "generate_until"
            kinds[name] = GENERATION if writes else TEXT
    return [task(name, kinds[name], each) for name, each in scores.items()]


def require_harness() -> None:
    """Raises DistillError unless lm_eval is installed, which is better known before hours of it."""
    try:
        import lm_eval.models.huggingface  # noqa: F401 - only whether it is there
    except ImportError as error:
        raise DistillError(
            f"harness: lm_eval must be installed ({error}); pip install 'lm_eval[hf]'"
        ) from error


def _first(name: str, metrics: Mapping[str, Any], better: Mapping[str, Any]) -> float:
    """The first metric of which more is better; keys are as "acc,none"."""
    for key, value in metrics.items():
        if better.get(key.partition(",")[0]) and isinstance(value, int | float):
            return float(value)
    raise DistillError(f"harness: {name} must have a score of which more is better, got none")
