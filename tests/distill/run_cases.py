"""Recipes small enough to run in a second, and their teachers, corpora and runs."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

for package in ("transformers", "accelerate", "omegaconf", "tensorboard"):
    pytest.importorskip(package, reason=f"{package} is not installed: the extra `distill`")

import transformers  # noqa: E402
from accelerate import Accelerator  # noqa: E402
from rich.console import Console  # noqa: E402

from distill.data.capture import load_model  # noqa: E402
from distill.data.rows import byte_tokenizer  # noqa: E402
from distill.errors import Interrupt  # noqa: E402
from distill.progress import Reporter  # noqa: E402
from distill.training import runs  # noqa: E402 - they import it
from distill.training.recipe import Recipe  # noqa: E402

ROOT = Path(__file__).parents[2]
RECIPE = """
student: {options: {window: 8}}
data: {pattern: '*.py', length: 24}
loop: {rows: 8, checkpoint_every: 2, heldout_every: 3}
log: {trackers: [], every: 1}
evaluation: {report: false}
stages:
- {name: align, trainable: ['*mixer*'], losses: [{name: mixer_mse}], steps: 3, lr: 1.0e-2}
- name: distill
  losses: [{name: ce, weight: 0.9}, {name: topk_kl, weight: 0.1, args: {k: 8}}]
  steps: 5
  lr: 3.0e-3
"""
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "bos_token_id": 256,
    "eos_token_id": 256,
}


def make_accelerator():
    return Accelerator(cpu=True)


def write_teacher(folder, family="Llama", **changes):
    """Of bytes, the vocabulary padded; weights large enough that words differ."""
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(vocab_size=264, **SIZES | changes)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def make_recipe(tmp_path, teacher, corpus, *overrides):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    given = [f"teacher.path={teacher}", f"data.corpus={corpus}", *overrides]
    return Recipe.load(path, given)


def do(recipe, folder, resume=False, interrupt=None):
    """Its output; the student is in folder/student."""
    output = io.StringIO()
    reporter = Reporter(Console(file=output))
    runs.run(recipe, folder, reporter, interrupt or Interrupt(), resume=resume)
    return output.getvalue()


def quiet_run(recipe, folder):
    return runs.Run(recipe, folder, Reporter(Console(quiet=True)))


def first_stage(recipe, folder):
    """Of a recipe, ready to step."""
    shared = quiet_run(recipe, folder)
    stage = shared.stage(recipe.stages[0], shared.first_student())
    stage.prepare()
    return stage


def steps_on_rank(rank, ranks, recipe, folder, count):
    """Losses of each step, and the weights after them, whole."""
    if ranks > 1:
        own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        os.environ |= {name: str(value) for name, value in own.items()} | {"OMP_NUM_THREADS": "1"}
    stage = first_stage(recipe, folder)
    losses = []
    for _ in range(count):
        losses.append(stage._train_step()[0])
        stage.step += 1
    return losses, stage.wrapped.weights()


def weights(folder):
    return load_model(folder, torch.float32).state_dict()


def assert_same(got, want):
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], x) for name, x in want.items())


class StopAt(Interrupt):
    """A signal that comes after so many looks at it, two a step."""

    def __init__(self, looks):
        self.looks, self.got = looks, None

    @property
    def requested(self):
        self.looks -= 1
        return 15 if self.looks < 0 else self.got

    @requested.setter
    def requested(self, value):
        self.got = value


def tool(tmp_path, *arguments, ranks=1):
    """The command in processes of its own."""
    launch = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    given = [str(x) for x in ("run", tmp_path / "recipe.yaml", *arguments)]
    own = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "MASTER_ADDR": "127.0.0.1"}
    return subprocess.Popen(
        [sys.executable, *launch, "-m", "distill", *given],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | own,
    )
