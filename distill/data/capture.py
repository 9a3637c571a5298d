"""`distill cache`: a teacher of transformers reads a corpus, and words that it expects stay."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn

from distill.data.corpus import Corpus
from distill.data.rows import Rows
from distill.data.teacher import CacheWriter, TeacherCache, model_digest
from distill.data.tokens import Tokens, encoded
from distill.data.words import Drawn, Kind
from distill.errors import DistillError, Interrupt
from distill.evaluation.scores import require_positions
from distill.files import replace_folder
from distill.losses.module import packed_inputs
from distill.losses.taps import HEAD_ROWS, Run, require_documents
from distill.progress import Reporter

# What transformers raises for files that are missing, damaged or of something else.
UNREADABLE = (OSError, ValueError, KeyError, RuntimeError, SafetensorError, StrictDataclassError)


@dataclass(frozen=True)
class CaptureConfig:
    """Windows of `length` tokens, one after the other, `rows` of them at a time.

    boundaries: a document's words come from that document alone, as `DataConfig` has it.
    """

    kind: Kind
    length: int
    rows: int
    max_tokens: int | None
    boundaries: bool = False


def load_teacher(path: Path, dtype: Any = "auto") -> tuple[Any, Any]:
    """Model and tokenizer from a folder, from safetensors alone; no code beside them is run.

    The model may be a student of `hybridize`. The folder of one without a tokenizer is refused.
    """
    return load_model(path, dtype), load_tokenizer(path)


def load_tokenizer(path: Path) -> Any:
    """Of a folder that `save_pretrained` wrote."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except UNREADABLE as error:
        raise DistillError(f"tokenizer: none in {path}: {error}") from error


def load_config(path: Path) -> Any:
    """Its configuration alone, which takes no time to read."""
    from transformers import PretrainedConfig

    if not path.is_dir():
        raise DistillError(f"model: {path} is not a folder that `save_pretrained` wrote")
    try:
        settings, _ = PretrainedConfig.get_config_dict(path)
        return PretrainedConfig.from_dict(settings)
    except UNREADABLE as error:
        raise DistillError(f"model: cannot load {path}: {error}") from error


def load_model(path: Path, dtype: Any = "auto") -> Any:
    """What `save_pretrained` wrote, of a causal language model or a student of `hybridize`."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from distill.hybrid.convert import is_student, load_student

    logging.disable_progress_bar()
    settings = load_config(path)
    try:
        if is_student(settings.model_type):
            return load_student(path, dtype=dtype).eval()
        options: dict[str, Any] = {"use_safetensors": True, "dtype": dtype}
        # Of remote code, None would ask on the terminal.
        options |= {"output_loading_info": True, "trust_remote_code": False}
        loaded: Any = AutoModelForCausalLM.from_pretrained(path, **options)
        model, found = loaded
    except UNREADABLE as error:
        raise DistillError(f"model: cannot load {path}: {error}") from error
    if found["missing_keys"]:  # transformers would draw them at random
        missing = sorted(found["missing_keys"])
        raise DistillError(f"model: {path} lacks {len(missing)} of its weights, as {missing[0]}")
    return model.eval()


def save_model(path: Path, model: Any, tokenizer: Any, **options: Any) -> None:
    """What `load_teacher` reads, whole or not at all."""

    def write(to: Path) -> None:
        model.save_pretrained(to, **options)
        tokenizer.save_pretrained(to)

    replace_folder(path, write)


def first_tokens(corpus: Corpus, tokenizer: Any, most: int) -> Tensor:
    """Of the documents that are trained on, each closed by the tokenizer's end of text."""
    parts, found = [], 0
    for _, ids in encoded(corpus.train, tokenizer):
        parts.append(torch.from_numpy(ids).long())
        found += len(ids)
        if found >= most:
            break
    return torch.cat(parts)[:most]


@torch.no_grad()
def require_finite(model: Any, batches: Iterable[Tensor]) -> None:
    """Raises DistillError unless all that the model computes of `batches`, (B, T) ids, is finite.

    It names the first module to give something else, and that of its weights which is the cause.
    """

    def look(name: str, module: nn.Module, args: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output
        if not isinstance(first, Tensor) or first.isfinite().all():
            return
        bad = [key for key, x in module.named_parameters(name) if not x.isfinite().all()]
        cause = f", since {bad[0]} is not finite" if bad else ""
        got = "nan" if first.isnan().any() else "inf"
        raise DistillError(
            f"teacher: {name} must give finite numbers on the text, got {got}{cause}"
        )

    hooks = [
        module.register_forward_hook(partial(look, name)) for name, module in model.named_modules()
    ]
    head = model.get_output_embeddings()
    try:
        for ids_BT in batches:
            hidden_BTE = model.base_model(ids_BT.to(model.device), use_cache=False)[0]
            for hidden_NE in hidden_BTE.flatten(0, 1).split(HEAD_ROWS):
                head(hidden_NE)
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def capture(
    model: Any,
    tokens: Tokens,
    out: Path,
    config: CaptureConfig,
    reporter: Reporter,
    interrupt: Interrupt,
    dry_run: bool = False,
) -> None:
    """Writes the cache, or goes on with one of the same teacher, tokens and sizes.

    Row r of it is what follows token r: of the tokens that fill windows.
    """
    vocabulary = model.config.vocab_size
    tokens = tokens.cut(config.max_tokens)
    count = len(tokens.ids_N)
    require_positions("cache", model, config.length)
    if count < config.length:
        raise DistillError(f"corpus: one window takes {config.length} tokens, got {count}")
    if int(tokens.ids_N.max()) >= vocabulary:
        raise DistillError(
            f"teacher: its tokenizer must have ids below the model's vocabulary of {vocabulary},"
            f" got {int(tokens.ids_N.max())}"
        )
    if config.boundaries:
        require_documents(model)
    rows = Rows(tokens, 1, config.length, 0, config.boundaries)
    _say_sizes(reporter, rows.windows, config, vocabulary)
    if dry_run:
        return
    fingerprint = tokens.fingerprint(config.length, config.boundaries)
    fingerprint["model"] = model_digest(model)
    with CacheWriter(out, fingerprint, config.kind, vocabulary) as writer:
        start = len(writer) // config.length
        if start == rows.windows:
            reporter.say(f"cache    {out} is complete")
            return
        with reporter.meter("cache", rows.windows, start) as meter:
            for begin in range(start, rows.windows, config.rows):
                end = min(begin + config.rows, rows.windows)
                batch = rows.batch(torch.arange(begin, end)).to(model.device)
                packed = batch.cu_seqlens
                inputs = {} if packed is None else packed_inputs(packed, batch.input_ids)
                run = Run(model, batch.input_ids, inputs)
                words = run.words(config.kind, batch.positions)
                if words.logprobs.isnan().any():  # the error says where that begins
                    require_finite(model, rows.plain(torch.arange(begin, end)).split(1))
                writer.append(words)
                meter.update(end, tokens=batch.input_ids.numel())
                if interrupt.requested is not None:
                    writer.flush()
                interrupt.check()
    written = TeacherCache(out)
    each = written.size_bytes / len(written)
    reporter.say(
        f"cache    {out}: {each:.1f} bytes a token, 1/{2 * vocabulary / each:.0f} of all logits in"
        " two bytes"
    )


def _say_sizes(reporter: Reporter, windows: int, config: CaptureConfig, vocabulary: int) -> None:
    each, tokens = config.kind.most_bytes(vocabulary), windows * config.length
    most = "at most " if isinstance(config.kind, Drawn) else ""
    reporter.say(
        f"cache    {tokens} tokens, {windows} windows of {config.length}: {most}{each} bytes a"
        f" token, {each * tokens / 1e6:.1f} MB; all logits in two bytes would be"
        f" {2 * vocabulary} bytes a token"
    )
