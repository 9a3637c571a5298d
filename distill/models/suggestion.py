"""Which teacher may teach which student, and which shapes of student a teacher can become.

Only configurations and tokenizers are read: models are made without memory, to count.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from distill.data.capture import UNREADABLE
from distill.errors import DistillError
from distill.evaluation.assessment import sizes
from distill.hybrid.convert import FAMILIES as HYBRIDIZED
from distill.hybrid.convert import PREFIX, RECURRENT, hybridize, student_classes
from distill.hybrid.options import HybridOptions
from distill.models.compression import compress
from distill.models.families import FAMILIES

WINDOW = 512


@dataclass(frozen=True)
class Candidate:
    """A model, or one that a teacher could become: what it costs to keep and to run.

    tokenizer: a digest of its words and their ids; state_bytes: what it remembers of one sequence.
    """

    name: str
    model_type: str
    parameters: int
    state_bytes: int
    tokenizer: str


@dataclass(frozen=True)
class Pair:
    """`flop`: of training the student on the tokens, with the teacher's own pass over them."""

    teacher: Candidate
    student: Candidate
    flop: float

    @property
    def same_tokenizer(self) -> bool:
        return self.teacher.tokenizer == self.student.tokenizer

    @property
    def share(self) -> float:
        """Of the teacher's parameters."""
        return self.student.parameters / self.teacher.parameters


def suggest(
    folders: Iterable[str | Path],
    *,
    tokens: float = 1e9,
    context: int = 4096,
    max_parameters: int | None = None,
    max_state_bytes: int | None = None,
    on_unknown: Callable[[DistillError], None] | None = None,
) -> list[Pair]:
    """All pairs of a teacher and a smaller student, or one it can become, the most fitting first.

    Those with one tokenizer come first, as words can then be compared one to one; within them those
    that cost least to train, a parameter of either at 6 and 2 operations a token.

    Args:
        folders: of models, each with a configuration and a tokenizer.
        tokens: to train on.
        context: at which states are sized.
        max_parameters, max_state_bytes: of students; those above are left out.
        on_unknown: told of a folder that cannot be read as a model, which is left out; None raises.
    """
    pairs = []
    read = []
    for folder in map(Path, folders):
        try:
            read.append((describe(folder, context), folder))
        except DistillError as error:
            if on_unknown is None:
                raise
            on_unknown(error)
    for teacher, folder in read:
        smaller = [other for other, _ in read if other.parameters < teacher.parameters]
        for student in [*smaller, *shapes(folder, teacher, context)]:
            fits = (max_parameters is None or student.parameters <= max_parameters) and (
                max_state_bytes is None or student.state_bytes <= max_state_bytes
            )
            if fits:
                flop = tokens * (6.0 * student.parameters + 2.0 * teacher.parameters)
                pairs.append(Pair(teacher, student, flop))
    return sorted(pairs, key=lambda pair: (not pair.same_tokenizer, pair.flop))


def folders_of(path: Path) -> list[Path]:
    """Those that a YAML list names, relative to it; or those below a folder that hold models."""
    if path.is_dir():
        return sorted(file.parent for file in path.rglob("config.json"))
    try:
        listed = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise DistillError(f"suggest: cannot read {path}: {error}") from error
    if not isinstance(listed, list) or not all(isinstance(entry, str) for entry in listed):
        raise DistillError(f"suggest: {path} must be a list of folders, got {listed!r}")
    return [path.parent / entry for entry in listed]


def describe(folder: Path, context: int) -> Candidate:
    """A model on disk, by its configuration and tokenizer."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except UNREADABLE as error:
        raise DistillError(f"suggest: cannot read {folder}: {error}") from error
    words = json.dumps(sorted(tokenizer.get_vocab().items())).encode()
    digest = hashlib.sha256(words).hexdigest()
    return _candidate(folder.name, _without_memory(folder), context, digest)


def shapes(folder: Path, teacher: Candidate, context: int) -> Iterator[Candidate]:
    """Students that `hybridize` and `compress` make of a teacher."""
    if teacher.model_type not in FAMILIES:
        return
    model = _without_memory(folder)
    layers = model.config.num_hidden_layers
    made: list[tuple[str, Any]] = []
    if layers > 1:
        made.append(("every second layer", compress(model, layers="every-2").student))
    if teacher.model_type in HYBRIDIZED:
        made.append(("hybrid", hybridize(model, window=WINDOW)))
        if layers > 1:
            made.append(("hybrid, every second layer", hybridize(made[0][1], window=WINDOW)))
    for name, student in made:
        yield _candidate(f"{teacher.name}: {name}", student, context, teacher.tokenizer)


def _without_memory(folder: Path) -> Any:
    try:
        settings = json.loads((folder / "config.json").read_text())
        model_type = settings.get("model_type", "")
        if model_type == RECURRENT:
            import distill.models.recurrent  # noqa: F401 - makes the type known
        elif model_type.startswith(PREFIX) and model_type.removeprefix(PREFIX) in HYBRIDIZED:
            student_classes(model_type.removeprefix(PREFIX))
        elif model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            raise DistillError(
                f"suggest: {folder} must be a causal language model, got type {model_type!r}"
            )
        with torch.device("meta"):
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except UNREADABLE as error:
        raise DistillError(f"suggest: cannot read {folder}: {error}") from error


def _candidate(name: str, model: Any, context: int, tokenizer: str) -> Candidate:
    config = model.config
    parameters = sizes(model)["parameters"]
    return Candidate(name, config.model_type, parameters, state_bytes(config, context), tokenizer)


def state_bytes(config: Any, context: int) -> int:
    """What a model remembers of one sequence of `context` tokens; keys and values in its own dtype,
    states of mLSTM and sLSTM in float32.
    """
    layers, heads = config.num_hidden_layers, getattr(config, "num_attention_heads", 0)
    dtype = getattr(torch, str(config.dtype or "float32").removeprefix("torch."))
    if config.model_type == RECURRENT:
        return layers * 4 * config.hidden_size * 4
    if config.model_type == "xlstm":
        K, V = config.qk_head_dim, config.v_head_dim
        return layers * config.num_heads * (K * V + K + 1) * 4
    if not heads:
        raise DistillError(f"suggest: the state of models of type {config.model_type} is not known")
    D = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    each = 2 * kv_heads * D * dtype.itemsize
    if not config.model_type.startswith(PREFIX):
        return layers * each * context
    options = HybridOptions.from_dict(config.hybrid)
    mixers = len(options.replaced(layers))
    K = options.features(D)
    state = options.states(heads, kv_heads) * (K * D + K + 1) * 4 + each * (
        options.window + options.sinks
    )
    return mixers * state + (layers - mixers) * each * context


def table(pairs: Sequence[Pair]) -> tuple[list[str], list[list[str]]]:
    """Heads and rows."""
    heads = ["teacher", "student", "tokenizer", "parameters", "of teacher's", "state, MB", "EFLOP"]
    return heads, [
        [
            pair.teacher.name,
            pair.student.name,
            "same" if pair.same_tokenizer else "another",
            f"{pair.student.parameters:,}",
            f"{pair.share:.0%}",
            f"{pair.student.state_bytes / 1e6:,.2f}",
            f"{pair.flop / 1e18:,.3g}",
        ]
        for pair in pairs
    ]
