"""A recipe from its teacher to a student on disk, stage after stage, in one run folder."""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from rich.console import Console

from distill.data.capture import load_model, load_teacher, require_finite, save_model
from distill.data.corpus import Document, halves_of
from distill.data.rows import Rows
from distill.data.teacher import TeacherCache, model_digest, require_same
from distill.data.tokens import TOKENS, Text, Tokens, stored_text
from distill.data.words import Drawn, Kind, Likeliest, settings
from distill.errors import DistillError, Interrupt
from distill.evaluation.bench import require_contexts
from distill.evaluation.probes import require_needles
from distill.evaluation.scores import evaluate, require_positions
from distill.files import replace_folder, write_atomically
from distill.hybrid.convert import hybridize
from distill.hybrid.stages import calibrate_gates
from distill.losses.module import DistillModule, LossSpec
from distill.machine import describe_machine
from distill.models.compression import compress
from distill.progress import Reporter, Within
from distill.report.run_folder import CONTROLS
from distill.training import checks, parallel, scoring, snapshot
from distill.training.controls import controls_of
from distill.training.recipe import Recipe, StageConfig
from distill.training.trainer import Metrics, Stage

# What a run writes besides its recipe, which is there before.
RESULTS = ("student", "checkpoints", "metrics.jsonl", *scoring.OUTCOME)


@dataclass
class Run:
    """What all stages share. `teacher` is read once, and only where something needs it."""

    recipe: Recipe
    folder: Path
    reporter: Reporter
    interrupt: Interrupt = field(default_factory=Interrupt)
    given: Tokens | None = None
    heldout: tuple[Document, ...] = ()  # beside what is given; else they are read

    def __post_init__(self) -> None:
        recipe = self.recipe
        self.controls = controls_of(recipe)
        self.accelerator: Accelerator = parallel.make_accelerator(
            recipe.loop, recipe.log, self.folder
        )
        self.specs = {stage.name: loss_specs(stage) for stage in recipe.stages}
        self.teacher, self.tokenizer = self._read_teacher()
        # Other weights in the same folder show in a part of them, which takes no time to read.
        self.weights = None if self.teacher is None else model_digest(self.teacher, stride=61)
        data, evaluation = recipe.data, recipe.evaluation
        require_positions("data", self.teacher, data.length)
        require_needles(self.tokenizer, evaluation.needle)
        require_positions("needle", self.teacher, max(evaluation.needle, default=0))
        require_contexts(self.teacher, evaluation.contexts)
        if self.accelerator.num_processes > 1:
            parallel.alone(self.accelerator, self._read_text)  # the first may have to write it
        self.tokens, self.heldout = self._read_text()
        self.halves = halves_of(self.heldout)
        if self.accelerator.is_main_process:
            self.reporter.say(self.halves.describe())
        self.rows = Rows(
            self.tokens,
            recipe.loop.rows,
            data.length,
            recipe.loop.seed,
            data.boundaries,
            self._read_cache(),
        )
        if self.teacher is not None and self.accelerator.is_main_process:
            checks.say_teacher(self.reporter, self.teacher.to(self.accelerator.device), self.rows)

    def _read_teacher(self) -> tuple[Any, Any]:
        teacher = self.recipe.teacher
        if teacher.path is not None:
            return load_teacher(Path(teacher.path), getattr(torch, teacher.dtype))
        if self.recipe.student.kind != "load" or self.recipe.student.path is None:
            raise DistillError(
                "recipe: teacher.path must be a folder, or student.kind=load with student.path,"
                " got neither"
            )
        _, tokenizer = load_teacher(Path(self.recipe.student.path))
        return None, tokenizer

    def _read_text(self) -> Text:
        data, plan = self.recipe.data, self.recipe.data.plan()
        if self.given is not None:
            return Text(self.given, self.heldout or plan.corpus().heldout)
        folder = self.folder / TOKENS if data.tokens is None else Path(data.tokens)
        return stored_text(plan, self.tokenizer, folder, self.reporter, self.interrupt)

    def _read_cache(self) -> TeacherCache | None:
        if self.recipe.teacher.cache is None:
            return None
        cache = TeacherCache(Path(self.recipe.teacher.cache))
        expected = dict(cache.index.fingerprint)
        expected |= self.tokens.fingerprint(self.recipe.data.length, self.recipe.data.boundaries)
        if self.teacher is not None:
            expected["model"] = model_digest(self.teacher)
            if expected["model"] != cache.index.fingerprint.get("model"):
                # `distill cache` reads a teacher in the dtype that it has on disk.
                expected["model"] = model_digest(load_model(Path(self.recipe.teacher.path or "")))
        require_same(cache.folder, cache.index.fingerprint, expected)
        for spec in chain(*self.specs.values()):
            asked = asked_words(spec)
            if asked is not None:
                require_same(cache.folder, settings(cache.kind), settings(asked))
        return cache

    def first_student(self) -> Any:
        """What the first stage begins with, as the recipe says; from the teacher's weights as they
        are stored, however they are rounded where it teaches."""
        chosen = self.recipe.student
        if chosen.kind == "load":
            if chosen.path is None:
                raise DistillError("recipe: student.path must be a folder, got none")
            student, tokenizer = load_teacher(Path(chosen.path), torch.float32)
            checks.require_same_tokenizer(self.tokenizer, tokenizer)
            return student
        teacher, inputs = self.teacher, None
        if teacher.dtype != torch.float32:
            teacher = load_model(Path(self.recipe.teacher.path or ""), torch.float32)
        if chosen.calibration_rows:
            first = torch.arange(min(chosen.calibration_rows, self.rows.windows))
            inputs = self.rows.plain(first).to(teacher.device)
            require_finite(teacher, [inputs])
        try:
            if chosen.kind == "compress":
                return compress(teacher, inputs=inputs, **chosen.options).student.float()
            options = {**chosen.options, "copy_weights": True}
            student = hybridize(teacher, **options).float()
        except TypeError as error:
            raise DistillError(f"recipe: student.options: {error}") from error
        if inputs is not None:
            calibrate_gates(student, inputs)
        return student

    def stage(self, config: StageConfig, student: Any) -> Stage:
        """Ready to run. The teacher takes part where a loss needs it beside the cache."""
        specs = self.specs[config.name]
        words = any("words" in spec.needs for spec in specs)
        cached = self.rows.cache is not None
        beside = any(spec.needs_teacher for spec in specs) or (words and not cached)
        if beside and self.teacher is None:
            raise DistillError(f"recipe: teacher.path must be a folder for stage {config.name}")
        checks.require_same_vocabulary(self.teacher, student, self.tokenizer)
        require_positions("data", student, self.rows.length)
        return Stage(
            config,
            self.recipe.loop,
            self.recipe.log,
            DistillModule(student, self.teacher if beside else None, specs),
            self.rows.of_stage(self._first_step(config), words and cached),
            self.accelerator,
            self.folder / "checkpoints" / config.name,
            self.settings(config),
            Metrics(self.folder / "metrics.jsonl", self.accelerator),
            self._heldout,
            interrupt=self.interrupt,
        )

    def _first_step(self, config: StageConfig) -> int:
        """Steps of the stages before: a stage reads on where the last one stopped."""
        names = [stage.name for stage in self.recipe.stages]
        before = self.recipe.stages[: names.index(config.name)]
        return sum(stage.steps_of(self.rows.rows * self.rows.length) for stage in before)

    def _heldout(self, wrapped: parallel.Wrapped) -> dict[str, float]:
        """Of the files held out. Where the teacher is a cache, it is not there to agree with."""
        teacher = self.teacher if self.recipe.teacher.cache is None else None
        if teacher is not None and teacher.device != self.accelerator.device:
            teacher.to(self.accelerator.device)
        data = self.recipe.data
        options: dict[str, Any] = {"teacher": teacher, "length": data.length}
        # What is seen along the way is what one chooses by; the report is on other files.
        documents = self.halves.validation or self.halves.test
        scores = wrapped.run(
            lambda student: evaluate(student, self.tokenizer, documents, **options)
        )
        found = {name: getattr(scores, name) for name in ("bits_per_byte", "accuracy", "agreement")}
        return {name: value for name, value in found.items() if value is not None}

    def settings(self, config: StageConfig) -> dict[str, Any]:
        """All that decides the weights of a stage."""
        whole = self.recipe.as_dict()
        stages = whole.pop("stages")
        at = [stage["name"] for stage in stages].index(config.name)
        kept = {"stages": {stage["name"]: _by_name(stage) for stage in stages[: at + 1]}}
        del whole["log"], whole["evaluation"], whole["controls"]
        for name in ("checkpoint_every", "keep", "heldout_every"):
            del whole["loop"][name]
        for name in ("corpus", "text_key", "tokens"):
            del whole["data"][name]
        whole["teacher"] |= {"path": None, "weights": self.weights}
        if first_step := self._first_step(config):
            whole["data"]["first_step"] = first_step
        return whole | kept | {"tokens": self.tokens.digest()}


def run(
    recipe: Recipe,
    folder: str | Path,
    reporter: Reporter | None = None,
    interrupt: Interrupt | None = None,
    *,
    resume: bool = False,
    tokens: Tokens | None = None,
) -> Path:
    """Train the recipe's student and its controls, write scores and report into `folder`.

    Returns:
        The folder of the finished student, `folder`/student; on ranks but the first when the first
        has written the report.

    Args:
        tokens: those of the training files, where they have been read before.
        resume: go on with what `folder` holds, to the bits that an uninterrupted run would have.

    Raises:
        DistillError: an input does not fit, or a number is not finite.
        Interrupted: a signal came; a checkpoint is there.
    """
    folder, reporter = Path(folder), reporter or Reporter(Console(highlight=False))
    for path in (folder, *(folder / CONTROLS / name for name in recipe.controls)):
        if (path / "recipe.yaml").exists():
            if not resume:
                raise DistillError(f"run: {path} holds a run; pass --resume, or another --run-dir")
        elif others := [name for name in RESULTS if (path / name).exists()]:
            raise DistillError(
                f"run: {path / others[0]} is of no run and would be replaced; move it, or pass"
                " another --run-dir"
            )
    shared = Run(recipe, folder, reporter, interrupt or Interrupt(), tokens)
    accelerator = shared.accelerator
    if not accelerator.is_main_process:
        shared.reporter = Reporter(Console(quiet=True))
    with _claimed(folder, accelerator):
        trained = _run_stages(shared, resume, reported=folder)
        shared.reporter.say(f"student  {folder / 'student'}")
        shared.teacher = None  # which may be sharded, and is read again
        for name in shared.controls:
            trained |= _run_control(shared, name, resume)
        if recipe.evaluation.report and (trained or not scoring.is_scored(folder)):
            parallel.alone(
                accelerator,
                lambda: scoring.score(
                    recipe,
                    folder,
                    shared.halves,
                    accelerator.device,
                    shared.reporter.say,
                    shared.interrupt,
                ),
            )
    return folder / "student"


def _run_control(shared: Run, name: str, resume: bool) -> bool:
    """In a folder of its own; whether there was something left to train."""
    folder, reporter = shared.folder / CONTROLS / name, Within(shared.reporter, name)
    text = shared.tokens, shared.heldout
    control = Run(shared.controls[name], folder, reporter, shared.interrupt, *text)
    with _claimed(folder, control.accelerator):
        trained = _run_stages(control, resume, reported=shared.folder)
    shared.reporter.say(f"control  {folder / 'student'}")
    return trained


def _run_stages(shared: Run, resume: bool, reported: Path) -> bool:
    """Whether there was something left to train; `reported` is the folder of the report that tells
    of it."""
    recipe, folder, accelerator = shared.recipe, shared.folder, shared.accelerator
    if accelerator.is_main_process and not (folder / "recipe.yaml").exists():
        environment = describe_machine() | {"ranks": accelerator.num_processes}
        write_atomically(folder / "environment.json", json.dumps(environment, indent=1))
        recipe.save(folder / "recipe.yaml")
    accelerator.wait_for_everyone()
    accelerator.init_trackers("distill")
    start: Callable[[], Any] = shared.first_student
    trained = False
    for config in recipe.stages:
        done = folder / "checkpoints" / config.name / "student"
        if done.exists():
            for last in snapshot.checkpoints(done.parent)[-1:]:
                snapshot.read_manifest(last, shared.settings(config))
        else:
            trained = True
            if accelerator.is_main_process:
                scoring.forget(reported)
            stage = shared.stage(config, start())
            checks.say(shared.reporter, stage)
            _train(stage, done, shared, resume)
        start = partial(load_model, done, torch.float32)
    if accelerator.is_main_process:
        recipe.save(folder / "recipe.yaml")  # what decides no weights may have changed
        replace_folder(folder / "student", lambda to: shutil.copytree(done, to))
    accelerator.wait_for_everyone()
    # Not `end_training`, which ends what the ranks have in common as well.
    for tracker in accelerator.trackers:
        tracker.finish()
    return trained


@contextmanager
def _claimed(folder: Path, accelerator: Accelerator) -> Iterator[None]:
    """Refuse a folder that a run writes to: ranks may outlive a launcher that was killed. The
    system gives the lock up when its process ends, however it ends."""
    reason = ""
    with ExitStack() as stack:
        if accelerator.is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context((folder / ".lock").open("w"))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                reason = f"run: another process is writing to {folder}; wait for it, or end it"
            except OSError:
                pass  # a file system without locks
        if found := [why for why in gather_object([reason]) if why]:
            raise DistillError(found[0])
        yield


def describe(recipe: Recipe, folder: Path, reporter: Reporter) -> None:
    """Say what `run` would train, and write nothing."""
    with TemporaryDirectory() as scratch:
        data = replace(recipe.data, tokens=recipe.data.tokens or scratch)
        shared = Run(replace(recipe, data=data), folder, reporter)
        student = shared.first_student()
        for config in recipe.stages:
            checks.say(reporter, shared.stage(config, student))
        for name, control in shared.controls.items():
            reporter.say(f"control  {name}: {', '.join(stage.name for stage in control.stages)}")


def _train(stage: Stage, done: Path, shared: Run, resume: bool) -> None:
    stage.prepare()
    if stage.wrapped.shards and shared.teacher is not None:
        parallel.shard_teacher(shared.teacher, shared.accelerator)
    if resume:
        stage.restore()
        if shared.accelerator.is_main_process:
            shared.recipe.save(shared.folder / "recipe.yaml")  # stages to come may have changed
    with shared.reporter.meter(stage.config.name, stage.steps, stage.step) as meter:
        stage.run(meter)
    weights = stage.wrapped.weights()
    if shared.accelerator.is_main_process:
        save_model(done, stage.module.student, shared.tokenizer, state_dict=weights)
    shared.accelerator.wait_for_everyone()
    shared.accelerator.free_memory()


def asked_words(spec: LossSpec) -> Kind | None:
    """The teacher's words that a loss's own arguments name; None: those that a cache has."""
    if "words" not in spec.needs:
        return None
    if spec.args.get("samples") is not None:
        return Drawn(spec.options["samples"], spec.options["seed"])
    return Likeliest(spec.args["k"]) if "k" in spec.args else None


def loss_specs(stage: StageConfig) -> list[LossSpec]:
    return [LossSpec(loss.name, loss.weight, loss.args) for loss in stage.losses]


def _by_name(stage: dict[str, Any]) -> dict[str, Any]:
    return stage | {"losses": {loss["name"]: loss for loss in stage["losses"]}}
