"""What the demo measures once its three models are trained, as plain values for JSON."""

import math
import time
from dataclasses import asdict, dataclass

import torch

from distill.corpus import Corpus, Text
from distill.demo.config import DemoConfig
from distill.demo.evaluate import Scores, agreement, bits_per_byte, bits_per_byte_by_file, score
from distill.demo.model import generate, n_bytes, n_parameters
from distill.demo.speed import Batch, parity, time_steps
from distill.demo.trainer import Stage
from distill.errors import DistillError, Interrupt
from distill.progress import Meter, Reporter

MODELS = ("teacher", "student", "control")
PROMPTS = (
    'def read_config(path):\n    """',
    "class Connection:\n    def __init__(self, ",
    "    try:\n        with open(",
)
SAMPLE_TEMPERATURE = 0.7


def score_models(
    stages: dict[str, Stage], text: Text, reporter: Reporter, interrupt: Interrupt
) -> dict[str, Scores]:
    """Score every model on the whole held-out stream."""
    scores = {}
    for name, stage in stages.items():
        with reporter.meter(f"score {name}", len(text.heldout.tokens_N) - 1) as meter:

            def after_batch(done: int, tokens: int, meter: Meter = meter) -> None:
                interrupt.check()
                meter.update(done, tokens=tokens)

            scores[name] = score(stage.model.eval(), text.heldout.tokens_N, after_batch=after_batch)
    return scores


@dataclass(frozen=True)
class Samples:
    """Text that each model wrote after each prompt, and how fast, in tokens/s one at a time."""

    texts: list[dict[str, str]]
    tokens_per_s: dict[str, float]


def write_samples(stages: dict[str, Stage], text: Text, config: DemoConfig) -> Samples:
    """Let each model continue the prompts."""
    texts: list[dict[str, str]] = [{"prompt": prompt} for prompt in PROMPTS]
    tokens_per_s = {}
    for name, stage in stages.items():
        began = time.perf_counter()
        for sample in texts:
            ids = text.tokenizer.encode(sample["prompt"]).ids
            written = generate(
                stage.model.eval(), ids, config.sample_tokens, SAMPLE_TEMPERATURE, config.seed
            )
            sample[name] = text.decode(written)
        elapsed = time.perf_counter() - began
        tokens_per_s[name] = len(texts) * config.sample_tokens / elapsed
    return Samples(texts, tokens_per_s)


def compare_backends(
    stages: dict[str, Stage], config: DemoConfig, reporter: Reporter, interrupt: Interrupt
) -> dict:
    """Time the student's training step on our kernels and on eager torch, parity first."""
    student, backend = stages["student"].model, config.student.backend
    batch = _speed_batch(stages, config)
    small = (batch[0][:2], batch[1][:2], batch[2][:2])
    worst = parity(student.config, student.state_dict(), config.distill, backend, small)
    interrupt.check()
    if not worst.holds:
        raise DistillError(
            f"speed: backend {backend!r} must agree with 'reference' before it is timed: gradient "
            f"of {worst.parameter} is off by {worst.error:.1e}, allowed {worst.budget:.1e}"
        )
    backends = (backend, "reference")
    n_steps = len(backends) * (config.speed_repeats + 1)
    with reporter.meter("time steps", n_steps) as meter:

        def after_step(done: int) -> None:
            interrupt.check()
            meter.update(done)

        timings = time_steps(
            student.config,
            student.state_dict(),
            config.distill,
            backends,
            batch,
            config.speed_repeats,
            after_step,
        )
    ours, reference = timings
    return {
        "parity": asdict(worst),
        "rows": batch[0].shape[0],
        "length": batch[0].shape[1],
        "ours": {"backend": backend, "step_s": ours.step_s, "tokens_per_s": ours.tokens_per_s},
        "reference": {"step_s": reference.step_s, "tokens_per_s": reference.tokens_per_s},
        "ratio": ours.tokens_per_s / reference.tokens_per_s,
    }


@torch.no_grad()
def _speed_batch(stages: dict[str, Stage], config: DemoConfig) -> Batch:
    inputs_BT, labels_BT = stages["student"].batches.batch(0)
    inputs_BT, labels_BT = inputs_BT[: config.speed_rows], labels_BT[: config.speed_rows]
    teacher_BTV, _ = stages["teacher"].model.eval()(inputs_BT)
    return inputs_BT, labels_BT, teacher_BTV


def describe_corpus(corpus: Corpus, text: Text) -> dict:
    return {
        "root": str(corpus.root),
        "digest": corpus.digest,
        "train_files": len(corpus.train),
        "train_bytes": corpus.train_bytes,
        "train_tokens": len(text.train_N),
        "heldout_files": len(corpus.heldout),
        "heldout_bytes": corpus.heldout_bytes,
        "heldout_tokens": len(text.heldout.tokens_N) - 1,
        "vocab": text.vocab,
    }


def describe_models(
    stages: dict[str, Stage], scores: dict[str, Scores], text: Text, samples: Samples
) -> dict[str, dict]:
    """One row of the results table for each model."""
    heldout_bytes = sum(text.heldout.n_bytes)
    teacher_top_N = scores["teacher"].top_N
    return {
        name: {
            "parameters": n_parameters(stage.model),
            "bytes": n_bytes(stage.model),
            "steps": stage.step,
            "train_tokens": stage.step * stage.tokens_per_step,
            "train_s": stage.train_s,
            "train_tokens_per_s": stage.tokens_per_s,
            "bits_per_byte": bits_per_byte(float(scores[name].nats_N.sum()), heldout_bytes),
            "agreement": agreement(scores[name].top_N, teacher_top_N),
            "score_tokens_per_s": scores[name].tokens_per_s,
            "write_tokens_per_s": samples.tokens_per_s[name],
        }
        for name, stage in stages.items()
    }


def describe_files(corpus: Corpus, text: Text, scores: dict[str, Scores]) -> list[dict]:
    """Bits per byte of each held-out file under each model."""
    by_model = {name: bits_per_byte_by_file(s.nats_N, text.heldout) for name, s in scores.items()}
    return [
        {"path": document.path, "bytes": len(document.text)}
        | {name: values[index] for name, values in by_model.items()}
        for index, document in enumerate(corpus.heldout)
    ]


@dataclass(frozen=True)
class Verdict:
    """Student against control: what the teacher was worth.

    `gain` is in bits per byte (positive: the student is better) with a 95 % interval from
    resampling the held-out files; `gap_closed` is the share of the way from control to teacher.
    """

    gain: float
    low: float
    high: float
    files_better: int
    files: int
    gap_closed: float


def judge(metrics: dict, resamples: int = 2000) -> Verdict:
    """Read the verdict off the metrics."""
    models, files = metrics["models"], metrics["files"]
    size_F = torch.tensor([file["bytes"] for file in files], dtype=torch.float64)
    gain_F = torch.tensor([f["control"] - f["student"] for f in files], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    draw_RF = torch.randint(len(files), (resamples, len(files)), generator=generator)
    gain_R = (gain_F[draw_RF] * size_F[draw_RF]).sum(1) / size_F[draw_RF].sum(1)
    low, high = torch.quantile(gain_R, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    gain = models["control"]["bits_per_byte"] - models["student"]["bits_per_byte"]
    gap = models["control"]["bits_per_byte"] - models["teacher"]["bits_per_byte"]
    better = int((gain_F > 0).sum())
    return Verdict(gain, low, high, better, len(files), gain / gap if gap > 0 else math.nan)
