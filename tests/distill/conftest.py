"""A corpus and a demo small enough to run in a second."""

import io
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from distill.corpus import load_corpus
from distill.demo import config as presets
from distill.demo.config import DemoConfig
from distill.demo.model import ModelConfig
from distill.demo.run import Demo
from distill.demo.trainer import StageConfig
from distill.errors import Interrupt
from distill.progress import Reporter

STAGE = StageConfig(steps=6, lr=1e-2, warmup=2, log_every=2, probe_every=3, checkpoint_every=4)
TINY = replace(
    presets.QUICK,
    teacher=ModelConfig(presets.UNKNOWN_VOCAB, width=32, layers=2, heads=2, ffn=32),
    student=ModelConfig(presets.UNKNOWN_VOCAB, width=16, layers=1, heads=2, ffn=16),
    teacher_stage=STAGE,
    student_stage=STAGE,
    vocab_size=300,
    rows=4,
    length=16,
    heldout_bytes=2_000,
    probe_tokens=64,
    speed_repeats=1,
    sample_tokens=4,
)


@pytest.fixture(autouse=True)
def one_thread():
    # Tensors this small are slower on several threads.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def corpus_dir(tmp_path_factory) -> Path:
    """Twelve Python files with a little regularity to learn."""
    root = tmp_path_factory.mktemp("corpus")
    draw = random.Random(0)
    words = ["path", "name", "value", "count", "größe", "line"]
    for index in range(12):
        lines = [
            f"def {draw.choice(words)}_{n}(self, {draw.choice(words)}):\n    return self.{n}\n"
            for n in range(25)
        ]
        path = root / ("pkg" if index % 3 else ".") / f"module_{index}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join(lines), encoding="utf-8")
    return root


@pytest.fixture
def tiny_preset(monkeypatch) -> DemoConfig:
    """`--quick` of the command line means TINY within a test."""
    monkeypatch.setattr(presets, "QUICK", TINY)
    return TINY


@pytest.fixture
def make_demo(corpus_dir):
    """make(run_dir, resume=False, **changes) -> a demo whose output goes to `demo.output`."""

    def make(run_dir: Path, resume: bool = False, **changes) -> Demo:
        config = replace(TINY, **changes)
        corpus = load_corpus(corpus_dir, heldout_bytes=config.heldout_bytes)
        output = io.StringIO()
        demo = Demo(config, corpus, run_dir, resume, Reporter(Console(file=output)), Interrupt())
        demo.output = output
        return demo

    return make


@pytest.fixture(scope="session")
def session_dir(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")
