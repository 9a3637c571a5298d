"""A corpus and a demo small enough to run in a second."""

import io
import random
import resource
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from rich.console import Console

from distill.data.corpus import load_corpus
from distill.demo import config as presets
from distill.demo.config import Budget, DemoConfig, Sizes
from distill.demo.run import Demo
from distill.errors import Interrupt
from distill.progress import Reporter

TINY = {
    **presets.QUICK,
    "sizes": Sizes(width=16, layers=2, heads=2, ffn=16),
    "budget": Budget(teacher=3, align=2, distill=2, small=2),
    "length": 16,
    "window": 4,
    "sinks": 1,
    "rows": 2,
    "heldout_bytes": 2_000,
    "contexts": (8, 16),
    "sample_tokens": 4,
}


@contextmanager
def _limit_files(most_bytes):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def file_limit():
    """A context in which files grow to so many bytes and no further, as on a full disk."""
    return _limit_files


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
def tiny_preset(monkeypatch):
    """`--quick` of the command line means TINY within a test."""
    monkeypatch.setattr(presets, "QUICK", TINY)


@pytest.fixture(scope="session")
def make_demo(corpus_dir):
    """make(run_dir, resume=False, **changes) -> a demo whose output goes to `demo.output`."""

    def make(run_dir: Path, resume: bool = False, **changes) -> Demo:
        config = DemoConfig(corpus_dir, **{**TINY, "seeds": (1, 2), **changes})
        corpus = load_corpus(corpus_dir, heldout_bytes=config.heldout_bytes)
        output = io.StringIO()
        reporter = Reporter(Console(file=output, width=200))
        demo = Demo(config, corpus, run_dir, resume, reporter, Interrupt())
        demo.output = output
        return demo

    return make


@pytest.fixture(scope="session")
def session_dir(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")
