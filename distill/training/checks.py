"""What is looked at before the first step of a stage, and said."""

from __future__ import annotations

import math
from typing import Any

import torch

from distill.data.rows import Rows
from distill.errors import DistillError
from distill.losses.module import DistillModule, LossSpec
from distill.progress import Reporter
from distill.training.trainer import Stage, parameter_groups

GB = 1e9


def require_same_tokenizer(teacher: Any, student: Any) -> None:
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if ours == theirs:
        return
    odd = next(word for word in [*theirs, *ours] if theirs.get(word) != ours.get(word))
    raise DistillError(
        f"tokenizers: the student's must be the teacher's, but {odd!r} is {ours.get(odd)} there and"
        f" {theirs.get(odd)} here; take a teacher of the same family, or a student made from this"
        " one (student.kind=hybridize or compress)"
    )


def require_same_vocabulary(teacher: Any | None, student: Any, tokenizer: Any) -> None:
    """Both may be padded, to different widths: losses look at the words that both have."""
    words = max(tokenizer.get_vocab().values()) + 1
    for name, model in (("teacher", teacher), ("student", student)):
        if model is not None and model.config.vocab_size < words:
            raise DistillError(
                f"vocabulary: the {name}'s must have the tokenizer's {words} words at least, got"
                f" {model.config.vocab_size}; its tokenizer is another one's"
            )


def say(reporter: Reporter, stage: Stage) -> None:
    """Sizes, parameter groups and memory."""
    if not stage.accelerator.is_main_process:
        return
    module, config = stage.module, stage.config
    budget = f"{stage.steps} steps of {stage.tokens_per_step} tokens"
    losses = ", ".join(spec.name for spec in module.specs)
    reporter.say(f"{config.name}: {budget}, {losses}")
    for group in parameter_groups(module, config.weight_decay):
        count = sum(parameter.numel() for parameter in group["params"])
        decay = group["weight_decay"]
        reporter.say(f"  trained  {count:,} in {len(group['params'])} tensors, decay {decay:g}")
    frozen = sum(p.numel() for p in module.parameters() if not p.requires_grad)
    if frozen:
        reporter.say(f"  frozen   {frozen:,}")
    parts = memory_bytes(stage)
    shown = ", ".join(f"{name} {size / GB:.2f}" for name, size in parts.items())
    reporter.say(f"  memory   {sum(parts.values()) / GB:.2f} GB a rank: {shown}")
    if stage.rows.cache is not None:
        cache = stage.rows.cache
        reporter.say(f"  cache    {len(cache)} tokens, {cache.size_bytes / GB:.2f} GB")


def memory_bytes(stage: Stage) -> dict[str, int]:
    """An estimate, of one rank. Activations: what a layer's products read, or one row a layer where
    they are computed again; logits are never all there."""
    module, loop = stage.module, stage.loop
    ranks = stage.accelerator.num_processes if loop.parallel == "fsdp2" else 1
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    weights = sum(p.numel() * p.itemsize for p in module.parameters())
    teacher = 0
    if module.teacher is not None:
        teacher = sum(p.numel() * p.itemsize for p in module.teacher.parameters())
    rows = min(loop.micro_rows or loop.rows, loop.rows // stage.accelerator.num_processes)
    config = module.student.config
    width = config.hidden_size
    inner = 2 * width if loop.activation_checkpointing else 12 * width + 3 * _inner(config)
    each = 2 if loop.precision == "bfloat16" else 4
    tokens = rows * stage.rows.length
    return {
        "weights": weights // ranks,
        "gradients": 4 * trained // ranks,
        "optimizer": 8 * trained // ranks,
        "teacher": teacher // ranks,
        "activations": tokens * config.num_hidden_layers * inner * each,
    }


def _inner(config: Any) -> int:
    return getattr(config, "intermediate_size", None) or 4 * config.hidden_size


@torch.no_grad()
def say_teacher(reporter: Reporter, teacher: Any, rows: Rows) -> None:
    """A wrong teacher, or a wrong tokenizer, shows as a loss no better than chance."""
    batch = rows.batch(rows.windows_of(0)[:1]).to(teacher.device)
    losses = DistillModule(teacher, None, [LossSpec("ce")])
    value, count = losses(batch.input_ids, batch.labels, cu_seqlens=batch.cu_seqlens)["ce"]
    nats, chance = (value / count).item(), math.log(teacher.config.vocab_size)
    if not math.isfinite(nats):
        raise DistillError(f"teacher: its cross-entropy on the first row is {nats}")
    warning = "; WARNING: no better than chance, is it the tokenizer's?" if nats > chance else ""
    reporter.say(f"teacher  {nats:.3f} nats a word on the first row, chance {chance:.3f}{warning}")
