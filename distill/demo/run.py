"""The demo: a teacher, a student distilled from it, and a control that has no teacher."""

import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from distill.checkpoint import Checkpoint, write_atomically
from distill.corpus import Batches, Corpus, Text, tokenize
from distill.demo import results
from distill.demo.config import DemoConfig
from distill.demo.evaluate import bits_per_byte, score
from distill.demo.losses import Distillation, hard_labels
from distill.demo.model import LanguageModel, n_parameters, seeded_model
from distill.demo.trainer import Stage
from distill.errors import DistillError, Interrupt
from distill.machine import describe_machine
from distill.progress import Reporter

MAX_STUDENT_SHARE = 0.40


@dataclass
class Demo:
    """One run; call `run()`.  With `resume` unfinished stages continue, else they start over."""

    config: DemoConfig
    corpus: Corpus
    run_dir: Path
    resume: bool
    reporter: Reporter
    interrupt: Interrupt

    def run(self) -> dict:
        """Train, score, time and sample; returns the metrics that the report shows."""
        began = time.perf_counter()
        self.train()
        scores = results.score_models(self.stages, self.text, self.reporter, self.interrupt)
        timing = results.compare_backends(self.stages, self.config, self.reporter, self.interrupt)
        samples = results.write_samples(self.stages, self.text, self.config)
        return {
            "machine": describe_machine(),
            "config": asdict(self.config),
            "corpus": results.describe_corpus(self.corpus, self.text),
            "models": results.describe_models(self.stages, scores, self.text, samples),
            "files": results.describe_files(self.corpus, self.text, scores),
            "curves": {name: stage.history for name, stage in self.stages.items()},
            "speed": timing,
            "samples": samples.texts,
            "wall_s": time.perf_counter() - began,
        }

    def train(self) -> None:
        """Bring all three models to the end of their budgets; they are in `stages` then."""
        self.text = self._tokenize()
        self.stages: dict[str, Stage] = {}
        for name in results.MODELS:
            self.stages[name] = self._stage(name)
            self._train(self.stages[name])

    def _tokenize(self) -> Text:
        corpus = self.corpus
        self.reporter.say(
            f"corpus   {corpus.root}: {len(corpus.train)} files, {corpus.train_bytes / 1e6:.1f} MB "
            f"to train on; {len(corpus.heldout)} files, {corpus.heldout_bytes / 1e3:.0f} kB held "
            "out"
        )
        text = tokenize(corpus, self.config.vocab_size)
        write_atomically(self.run_dir / "tokenizer.json", text.tokenizer.to_str())
        self.interrupt.check()
        self.reporter.say(
            f"tokens   byte-level BPE, {text.vocab} entries: {len(text.train_N) / 1e6:.2f} M "
            f"tokens to train on, {corpus.train_bytes / len(text.train_N):.2f} bytes each"
        )
        return text

    def _stage(self, name: str) -> Stage:
        config, is_teacher = self.config, name == "teacher"
        sizes = replace(config.teacher if is_teacher else config.student, vocab=self.text.vocab)
        budget = config.teacher_stage if is_teacher else config.student_stage
        # Student and control share their seed: the same initial weights and the same batches.
        seed = config.seed * 1000 + (0 if is_teacher else 1)
        settings = {
            "corpus": self.corpus.digest[:16],
            "vocab_size": config.vocab_size,
            "model": asdict(sizes),
            "stage": asdict(budget),
            "rows": config.rows,
            "length": config.length,
            "seed": seed,
        }
        model, loss = seeded_model(sizes, seed), hard_labels
        if name == "student":
            teacher = self.stages["teacher"]
            require_small(model, teacher.model)
            settings |= {"distill": asdict(config.distill), "teacher": teacher.settings}
            loss = Distillation(teacher.model, config.distill, config.student.backend)
        return Stage(
            name=name,
            config=budget,
            model=model,
            loss=loss,
            batches=Batches(self.text.train_N, config.rows, config.length, seed),
            path=self.run_dir / "checkpoints" / f"{name}.safetensors",
            settings=settings,
            seed=seed,
            probe=self._probe,
            interrupt=self.interrupt,
        )

    def _train(self, stage: Stage) -> None:
        self._restore(stage)
        if stage.finished:
            self.reporter.say(f"{stage.name:8} trained before: {stage.path}, {stage.step} steps")
            return
        if stage.step:
            self.reporter.say(f"{stage.name:8} continues after step {stage.step}")
        with self.reporter.meter(stage.name, stage.config.steps, stage.step) as meter:
            stage.run(meter)

    def _restore(self, stage: Stage) -> None:
        """Take up what an earlier run left: any stage on --resume, a finished teacher always."""
        if not stage.path.exists():
            return
        if self.resume:
            stage.restore()
        elif stage.name == "teacher":
            before = Checkpoint.load(stage.path)
            if difference := before.difference(stage.settings):
                self.reporter.say(f"teacher  on disk is another one ({difference}): training anew")
            elif before.step < stage.config.steps:
                self.reporter.say(
                    f"teacher  on disk is unfinished ({before.step} of {stage.config.steps} "
                    "steps): training anew; --resume would continue it"
                )
            else:
                stage.restore()

    @torch.no_grad()
    def _probe(self, model: LanguageModel) -> dict[str, float]:
        """Bits per byte of the first held-out tokens: cheap enough to follow the training with."""
        part_N = self.text.heldout.tokens_N[: self.config.probe_tokens + 1]
        n_bytes = int(self.text.sizes_V[part_N[1:]].sum())
        nats = float(score(model.eval(), part_N).nats_N.sum())
        return {"heldout_bits_per_byte": bits_per_byte(nats, n_bytes)}


def require_small(student: LanguageModel, teacher: LanguageModel) -> None:
    """Refuse a student that is not much smaller than its teacher: the demo would show nothing."""
    share = n_parameters(student) / n_parameters(teacher)
    if share > MAX_STUDENT_SHARE:
        raise DistillError(
            f"student: must have at most {MAX_STUDENT_SHARE:.0%} of the teacher's parameters, "
            f"got {share:.0%}"
        )
