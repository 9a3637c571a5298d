"""The demo: a teacher, hybrids and small students of it, and what each is to be compared with.

    teacher        a transformer over the bytes of the text
    hybrid         the teacher with an mLSTM and a window for attention, aligned, then distilled
    teacher on     the teacher, trained on for as many steps as the hybrid's second stage has
    small          half of the teacher's layers, distilled
    small, labels  the same, from the same weights on the same text, without the teacher

hybrids and small students once for each seed, each in a run folder of its own.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from distill.data.capture import save_model
from distill.data.corpus import Corpus
from distill.data.rows import byte_tokenizer
from distill.data.tokens import Tokens
from distill.demo.config import DemoConfig, Recipes, Sizes
from distill.errors import DistillError, Interrupt
from distill.files import settings_difference
from distill.progress import Reporter, Within
from distill.training.recipe import Recipe
from distill.training.runs import run as run_recipe

PARTS: dict[str, Callable[[Recipes, int], Recipe]] = {
    "hybrid": Recipes.hybrid,
    "teacher on": Recipes.trained_on,
    "small": Recipes.small,
    "small, labels": Recipes.small_from_labels,
}
ONCE = ("teacher on",)  # of which the first seed is enough


def seeds_of(part: str, seeds: Sequence[int]) -> Sequence[int]:
    """Those of `seeds` that a part is trained with."""
    return seeds[:1] if part in ONCE else seeds


@dataclass
class Demo:
    """Call `run()`. With `resume` what is unfinished goes on, else it starts over; a finished
    teacher is taken as it is."""

    config: DemoConfig
    corpus: Corpus
    folder: Path
    resume: bool
    reporter: Reporter
    interrupt: Interrupt = field(default_factory=Interrupt)

    def run(self) -> dict[str, list[Path]]:
        """Train everything; folders of the models by what they are, one for each seed."""
        began = time.perf_counter()
        self.reporter.say(
            f"corpus   {self.corpus.root}: {len(self.corpus.train)} files,"
            f" {self.corpus.train.size_bytes / 1e6:.1f} MB to train on; {len(self.corpus.heldout)},"
            f" {self.corpus.heldout_bytes / 1e3:.0f} kB, held out"
        )
        self.tokens = Tokens.of_bytes(self.corpus.train, byte_tokenizer().eos_token_id)
        self.interrupt.check()
        recipes = Recipes(self.config, self.folder / "teacher" / "student")
        start = self.folder / "start"
        self._require_own(start)
        write_start(start, self.config.sizes)
        found = {"teacher": [self._train("teacher", recipes.of_teacher(start))]}
        for part, recipe_of in PARTS.items():
            found[part] = [
                self._train(f"{part} {seed}", recipe_of(recipes, seed))
                for seed in seeds_of(part, self.config.seeds)
            ]
        self.trained_s = time.perf_counter() - began
        return found

    def _folder(self, name: str) -> Path:
        return self.folder / name.replace(", ", "-").replace(" ", "-")

    def _require_own(self, start: Path) -> None:
        """What the demo would start over must be an earlier demo's, which began with `start`."""
        names = ["teacher", *(f"{part} {seed}" for part in PARTS for seed in self.config.seeds)]
        others = [path for path in map(self._folder, names) if path.exists()]
        if others and not start.exists():
            raise DistillError(f"demo: {others[0]} is no demo's; pass another --run-dir")

    def _train(self, name: str, recipe: Recipe) -> Path:
        """The student of a run folder, which goes on, starts over or is there already."""
        folder = self._folder(name)
        if (folder / "recipe.yaml").exists():
            before = Recipe.load(folder / "recipe.yaml")
            difference = settings_difference(before.as_dict(), recipe.as_dict())
            finished = (folder / "student").exists()
            if self.resume and difference:
                raise DistillError(f"{name}: {folder} was trained otherwise ({difference})")
            if finished and not difference and (self.resume or name == "teacher"):
                self.reporter.say(f"{name}: trained before, {folder}")
                return folder / "student"
            if not self.resume:
                shutil.rmtree(folder)
        within = Within(self.reporter, name)
        return run_recipe(
            recipe, folder, within, self.interrupt, resume=self.resume, tokens=self.tokens
        )


def write_start(folder: Path, sizes: Sizes) -> None:
    """A teacher of random weights and its tokenizer, the same whenever it is written."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=sizes.width,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.heads,
        intermediate_size=sizes.ffn,
        max_position_embeddings=1 << 17,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    save_model(folder, model, tokenizer)
