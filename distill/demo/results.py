"""What the demo measures once its models are trained, as plain values for JSON."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from distill.data.capture import load_model
from distill.data.rows import byte_tokenizer
from distill.demo.config import Recipes
from distill.demo.run import PARTS, Demo, seeds_of
from distill.demo.speed import compare_backends, reading_rates
from distill.evaluation.assessment import Plan, assess
from distill.machine import describe_machine

PROMPTS = (
    'def read_config(path):\n    """',
    "class Connection:\n    def __init__(self, ",
    "    try:\n        with open(",
)
SAMPLE_TEMPERATURE = 0.7


def measure(demo: Demo) -> dict[str, Any]:
    """Train, score, time and sample; all that the report shows."""
    began = time.perf_counter()
    folders = demo.run()
    names = model_names(folders, demo.config.seeds)
    demo.reporter.say(f"scoring  {len(names)} models on {demo.corpus.heldout_bytes / 1e3:.0f} kB")
    models = {name: load_model(path, torch.float32) for name, path in names.items()}
    config = demo.config
    plan = Plan(config.length, config.rows, contexts=config.contexts, sequences=config.sequences)

    def say(message: str) -> None:
        demo.interrupt.check()
        if not message.startswith("score"):
            demo.reporter.say(message)

    scores = assess(models, byte_tokenizer(), demo.corpus.heldout, plan, say=say)
    writers = _writers(models, demo)
    return {
        "machine": describe_machine(),
        "config": {**asdict(demo.config), "corpus": str(demo.config.corpus)},
        "corpus": {
            "digest": demo.corpus.digest,
            "train_bytes": demo.corpus.train.size_bytes,
            "train_files": len(demo.corpus.train),
            "heldout_bytes": demo.corpus.heldout_bytes,
            "heldout_files": len(demo.corpus.heldout),
        },
        "parts": parts_of(scores["models"], demo.config.seeds),
        "scores": scores,
        "reading": reading_rates(writers, training_ids(demo), config.speed_repeats),
        "training": time_training(demo, folders),
        "samples": write_samples(writers, demo.config.sample_tokens),
        "run": str(folders["hybrid"][0].parent),
        "trained_s": demo.trained_s,
        "wall_s": time.perf_counter() - began,
    }


def model_names(folders: Mapping[str, Sequence[Path]], seeds: Sequence[int]) -> dict[str, Path]:
    """By part and seed; the teacher has none."""
    (teacher,) = folders["teacher"]
    return {"teacher": teacher} | {
        f"{part} {seed}": path
        for part in PARTS
        for seed, path in zip(seeds_of(part, seeds), folders[part], strict=True)
    }


def _writers(models: Mapping[str, Any], demo: Demo) -> dict[str, Any]:
    """The teacher, and of each part the first seed's model."""
    first = demo.config.seeds[0]
    return {"teacher": models["teacher"]} | {part: models[f"{part} {first}"] for part in PARTS}


def parts_of(models: Mapping[str, Any], seeds: Sequence[int]) -> dict[str, list[dict[str, Any]]]:
    """Of each part the scores, in the order of seeds."""
    kept = ("bits_per_byte", "accuracy", "agreement", "parameters", "bytes")
    named = {"teacher": ["teacher"]}
    for part in PARTS:
        named[part] = [f"{part} {seed}" for seed in seeds_of(part, seeds)]
    return {
        part: [{key: models[name][key] for key in kept} for name in names]
        for part, names in named.items()
    }


@dataclass(frozen=True)
class Verdict:
    """What came of it. change: of the hybrid's bits per byte against the teacher's, as a share;
    agreement: with the teacher; on: the same change of the teacher trained on; gains: by seed, bits
    per byte of the small student against its control; decode: how many times as fast as the teacher
    the hybrid writes after the longest context; cache: its bytes after the first and the last."""

    change: float
    agreement: float
    on: float
    gains: tuple[float, ...]
    context: int
    decode: float
    cache: tuple[int, int]

    @property
    def better(self) -> int:
        return sum(gain > 0 for gain in self.gains)


def judge(metrics: Mapping[str, Any]) -> Verdict:
    """Read the verdict off the metrics; means are over seeds."""
    parts = metrics["parts"]

    def mean(part: str, key: str) -> float:
        return sum(model[key] for model in parts[part]) / len(parts[part])

    bits = {part: mean(part, "bits_per_byte") for part in parts}
    pairs = zip(parts["small, labels"], parts["small"], strict=True)
    teacher, hybrid = list(metrics["scores"]["bench"]["models"].values())
    return Verdict(
        change=bits["hybrid"] / bits["teacher"] - 1,
        agreement=mean("hybrid", "agreement"),
        on=bits["teacher on"] / bits["teacher"] - 1,
        gains=tuple(control["bits_per_byte"] - own["bits_per_byte"] for control, own in pairs),
        context=teacher[-1]["context"],
        decode=teacher[-1]["decode_ms"] / hybrid[-1]["decode_ms"],
        cache=(hybrid[0]["cache_bytes"], hybrid[-1]["cache_bytes"]),
    )


def training_ids(demo: Demo) -> torch.Tensor:
    """(rows, length): as many tokens as a training step takes."""
    shape = demo.config.rows, demo.config.length
    return torch.from_numpy(demo.tokens.ids_N[: math.prod(shape)].astype("int64")).view(shape)


def time_training(demo: Demo, folders: Mapping[str, Sequence[Path]]) -> dict[str, Any]:
    """The hybrid's step of the second stage, on our kernels and on eager torch."""
    config, teacher = demo.config, folders["teacher"][0]
    stage = Recipes(config, teacher).hybrid(config.seeds[0]).stages[-1]
    with demo.reporter.meter("time steps", 2 * (config.speed_repeats + 1)) as meter:

        def after_step(done: int) -> None:
            demo.interrupt.check()
            meter.update(done)

        return compare_backends(
            folders["hybrid"][0],
            teacher,
            stage,
            config.backend,
            training_ids(demo),
            config.speed_repeats,
            after_step,
        )


@torch.no_grad()
def write_samples(models: Mapping[str, Any], count: int) -> list[dict[str, str]]:
    """What each model writes after each prompt."""
    tokenizer = byte_tokenizer()
    samples = [{"prompt": prompt} for prompt in PROMPTS]
    for sample in samples:
        prompt = tokenizer(sample["prompt"], return_tensors="pt").input_ids
        for name, model in models.items():
            torch.manual_seed(1)
            written = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                pad_token_id=tokenizer.eos_token_id,
                max_new_tokens=count,
                do_sample=True,
                temperature=SAMPLE_TEMPERATURE,
                top_k=0,
            )
            sample[name] = tokenizer.decode(written[0, prompt.shape[1] :], skip_special_tokens=True)
    return samples
