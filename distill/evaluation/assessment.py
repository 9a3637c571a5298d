"""What a run's scores.json holds: every model on the same text, tasks, needles, gates and speed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from distill.data.corpus import Document
from distill.errors import DistillError
from distill.evaluation.bench import bench
from distill.evaluation.probes import mean_gates, needle
from distill.evaluation.scores import Scores, encode, evaluate

GENERATION = "generation"
TEXT = "text"
GATE_TOKENS = 512


@dataclass(frozen=True)
class Plan:
    """What to measure. Contexts and lengths that are empty are left out; `sequences` are read and
    written at once after each context."""

    length: int = 512
    rows: int = 8
    overlap: int = 0
    needle_lengths: Sequence[int] = ()
    contexts: Sequence[int] = ()
    sequences: int = 1


def assess(
    models: Mapping[str, Any],
    tokenizer: Any,
    documents: Sequence[Document],
    plan: Plan | None = None,
    *,
    validation: Sequence[Document] = (),
    say: Callable[[str], None] = lambda message: None,
    after_batch: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Measure models on text that none was trained on.

    Args:
        models: by name; the first is the teacher, the second the student, all others are controls.
        tokenizer: that of all models, or None where ids are bytes.
        documents: those in one folder are a task of the win-and-tie curve: its score is the
            accuracy of the next token. Where there are no folders, each document is one.
        validation: those that scores along the way are of, for the teacher's place among them.
        say, after_batch: told what begins, and how far `evaluate` has come.

    Returns:
        For JSON: `teacher` and `student` (names), `models` (scores and sizes by name),
        `validation` (bits per byte of the teacher), `tasks` (name, kind, scores by model),
        `needle` (share found by length, by model), `gates` (mean output gate by layer and head) and
        `bench`. Who repeats a run with other seeds may add `seeds`, bits per byte by model for
        each, which the report then shows.
    """
    plan = plan or Plan()
    if len(models) < 2:
        raise DistillError(f"assess: models must be a teacher and a student, got {len(models)}")
    teacher_name, student_name, *_ = models
    teacher = models[teacher_name]
    options: dict[str, Any] = {"length": plan.length, "rows": plan.rows, "after_batch": after_batch}

    def score(model: Any, texts: Sequence[Document], **more: Any) -> Scores:
        return evaluate(model, tokenizer, texts, **options, **more)

    found: dict[str, Any] = {}
    for name in models:  # which may hold but one of them beside the teacher
        say(f"score    {name}")
        scores = score(models[name], documents, teacher=teacher, overlap=plan.overlap)
        found[name] = sizes(models[name]) | scores.as_dict()
    aside = {}
    if validation:
        say(f"score    {teacher_name}, validation")
        aside[teacher_name] = score(teacher, validation).bits_per_byte
    tasks = text_tasks(found)
    needles: dict[str, dict[int, float]] = {}
    for name in models if plan.needle_lengths else ():
        say(f"needle   {name}")
        needles[name] = needle(models[name], tokenizer, plan.needle_lengths)
    for length in plan.needle_lengths:
        scores_by_model = {name: shares[length] for name, shares in needles.items()}
        tasks.append(task(f"needle in {length} tokens", GENERATION, scores_by_model))
    student, timing = models[student_name], None
    if plan.contexts:
        say("speed    teacher and student")
        pair = {teacher_name: teacher, student_name: student}
        timing = bench(pair, plan.contexts, rows=plan.sequences)
    longest = max(documents, key=lambda document: len(document.text))
    ids = encode(tokenizer, longest)[0][:GATE_TOKENS]
    return {
        "teacher": teacher_name,
        "student": student_name,
        "models": found,
        "validation": aside,
        "tasks": tasks,
        "needle": needles,
        "gates": mean_gates(student, torch.tensor([ids])),
        "bench": timing,
    }


def sizes(model: Any) -> dict[str, int]:
    """Parameters that a model has, tied ones once, and their bytes."""
    parameters = list(model.parameters())
    return {
        "parameters": sum(p.numel() for p in parameters),
        "bytes": sum(p.numel() * p.element_size() for p in parameters),
    }


def task(name: str, kind: str, scores: Mapping[str, float]) -> dict[str, Any]:
    """One benchmark: `kind` is GENERATION where the model has to write what is asked for."""
    return {"name": name, "kind": kind, "scores": dict(scores)}


def text_tasks(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Accuracy of the next token by folder, or else by document, where there are several."""
    first = next(iter(found.values()))
    part = "groups" if len(first["groups"]) > 1 else "documents"
    return [
        task(name, TEXT, {model: scores[part][name]["accuracy"] for model, scores in found.items()})
        for name in first[part]
        if len(first[part]) > 1
    ]
