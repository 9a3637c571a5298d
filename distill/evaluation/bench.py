"""How fast models read and write, and what they must remember, by the length of what they read.

Models are timed one after another at each length, so that whatever else the machine does falls on
all of them alike. A cache of keys and values is timed both as it grows and of a size fixed before,
which copies less, and the faster counts.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache

from distill.errors import DistillError
from distill.evaluation.scores import require_positions
from distill.hybrid.convert import PREFIX
from distill.machine import describe_machine

# What transformers' models call what they remember.
CACHES = ("past_key_values", "cache_params")
STEPS = 16  # tokens written after a prompt


@torch.no_grad()
def bench(
    models: Mapping[str, Any],
    contexts: Sequence[int],
    *,
    steps: int = STEPS,
    rows: int = 1,
    after_case: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Time models, teacher first and student second, after prompts of `contexts` tokens.

    Args:
        models: causal language models of transformers by name.
        contexts: lengths of the prompts.
        steps: tokens that are written after each, one at a time; the median counts.
        rows: sequences that go on at once from one prompt.

    Returns:
        For JSON: `models`: by name a list of rows (context, prefill_tokens_per_s, decode_ms,
        cache_bytes, peak_bytes where the device counts them), and `crossover`: from which context
        on the second model writes faster than the first, None where it does not.
    """
    if not contexts or min(contexts) < 1:
        raise DistillError(f"bench: contexts must be at least 1, got {list(contexts)}")
    for model in models.values():
        require_contexts(model, contexts, steps)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in models}
    warmed = min(contexts)
    for model in models.values():
        _measure(model.eval(), warmed, 2, rows)
    done, cases = 0, len(contexts) * len(models)
    for context in sorted(contexts):
        for name, model in models.items():
            found[name].append(_measure(model, context, steps, rows))
            done += 1
            after_case(done, cases)
    first = next(iter(models.values()))
    return {
        "rows": rows,
        "steps": steps,
        "dtype": str(first.dtype).removeprefix("torch."),
        "device": str(first.device),
        "machine": describe_machine(),
        "models": found,
        "crossover": crossover(*list(found.values())[:2]) if len(found) > 1 else None,
    }


def require_contexts(model: Any, contexts: Sequence[int], steps: int = STEPS) -> None:
    """Raises DistillError unless a model, or one of this configuration, which has learned its
    positions, has enough for each context and what is written after it."""
    if contexts:
        require_positions("bench", model, max(contexts) + steps)


def crossover(teacher: list[dict[str, Any]], student: list[dict[str, Any]]) -> int | None:
    """The least context from which on, as far as was measured, the student writes faster."""
    since = None
    for theirs, ours in zip(teacher, student, strict=True):
        if ours["decode_ms"] >= theirs["decode_ms"]:
            since = None
        elif since is None:
            since = ours["context"]
    return since


def _measure(model: Any, context: int, steps: int, rows: int) -> dict[str, Any]:
    device = model.device
    generator = torch.Generator().manual_seed(context)
    prompt = torch.randint(model.config.vocab_size, (1, context), generator=generator).to(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    began = _now(device)
    output = model(prompt, use_cache=True, logits_to_keep=1)
    prefill_s = _now(device) - began
    name = next(name for name in CACHES if getattr(output, name, None) is not None)
    state, token = getattr(output, name), output.logits[:, -1:].argmax(dim=-1)
    if rows > 1:
        if not hasattr(state, "batch_repeat_interleave"):
            raise DistillError(
                f"bench: rows must be 1 for a model of type {model.config.model_type}, whose cache"
                f" cannot be repeated, got {rows}"
            )
        state.batch_repeat_interleave(rows)
        token = token.repeat_interleave(rows, dim=0)
    size = held_bytes(state)
    step_s = [_step_s(model, name, state, token, steps)]
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    if _has_keys(model):
        fixed = StaticCache(config=model.config, max_cache_len=context + steps)
        for at, layer in enumerate(state.layers):
            fixed.update(layer.keys[:, :, :context], layer.values[:, :, :context], at)
        step_s.append(_step_s(model, name, fixed, token, steps))
    return {
        "context": context,
        "prefill_tokens_per_s": context / prefill_s,
        "decode_ms": 1e3 * min(step_s),
        # What it needs to remember is what the growing cache holds.
        "cache_bytes": size,
        "peak_bytes": peak,
    }


def _has_keys(model: Any) -> bool:
    model_type = model.config.model_type
    return not model_type.startswith(PREFIX) and model._supports_default_dynamic_cache()


def _step_s(model: Any, name: str, state: Any, token: Tensor, steps: int) -> float:
    """The median time of a token, which goes on from the last one's."""
    times = []
    for _ in range(steps):
        began = _now(model.device)
        output = model(token, use_cache=True, **{name: state})
        state = getattr(output, name)
        token = output.logits[:, -1:].argmax(dim=-1)
        times.append(_now(model.device) - began)
    return statistics.median(times)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def held_bytes(cache: Any) -> int:
    """Of all tensors within an object, each counted once."""
    sizes: dict[int, int] = {}
    seen: set[int] = set()

    def visit(value: Any) -> None:
        if isinstance(value, Tensor):
            sizes[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, Mapping):
            for part in value.values():
                visit(part)
        elif isinstance(value, list | tuple):
            for part in value:
                visit(part)
        elif hasattr(value, "__dict__") and id(value) not in seen:
            seen.add(id(value))
            visit(vars(value))

    visit(cache)
    return sum(sizes.values())
