"""What a run is made of, as dataclasses, and how they are read from YAML and a command line.

A key that no dataclass has is an error that names the nearest one that there is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from distill.data.corpus import Source
from distill.data.tokens import Plan
from distill.errors import DistillError, nearest
from distill.files import write_atomically

# As `accelerate` names them.
PRECISIONS = {"float32": "no", "bfloat16": "bf16"}
PRESETS = files("distill") / "presets"


@dataclass
class StudentConfig:
    """`kind`: "hybridize" or "compress" the teacher, with `options` of those functions, or "load"
    what `save_pretrained` wrote to `path`.

    calibration_rows: of the training data. With them `compress` goes by activations, and
        `hybridize` sets gates from the teacher's attention (`stages.calibrate_gates`).
    """

    kind: str = "hybridize"
    path: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    calibration_rows: int = 0


@dataclass
class TeacherConfig:
    """`path`: what `save_pretrained` wrote, with its tokenizer. `cache`: of `distill cache`; then
    the losses on the teacher's words read it and the teacher itself does not run."""

    path: str | None = None
    cache: str | None = None
    dtype: str = "float32"


@dataclass
class DataConfig:
    """The files below `corpus` that match `pattern`, as rows of `length` tokens. Folders with names
    such as tests, site-packages and encodings are left out (`distill.data.corpus.SKIPPED_DIRS`).

    boundaries: attention, state and positions begin anew with each document (`cu_seqlens`), and no
        word is predicted from the document before it.
    heldout_fraction: of the documents; at most `heldout_bytes` of them are scored, half of these
        along the way and to choose by (validation), the others at the end (test).
    text_key: of documents in .jsonl, .jsonl.gz and .parquet files, which have one a line or row.
    tokens: a folder to keep the tokens in; None is one in the run's.
    """

    corpus: str | None = None
    pattern: str = "*.txt"
    length: int = 512
    boundaries: bool = False
    heldout_fraction: float = 0.05
    heldout_bytes: int = 1 << 18
    text_key: str = "text"
    tokens: str | None = None

    def plan(self) -> Plan:
        if self.corpus is None:
            raise DistillError("recipe: data.corpus must be a folder of text, got none")
        source = Source(Path(self.corpus), self.pattern, self.text_key)
        return Plan(source, self.heldout_fraction, self.heldout_bytes)


@dataclass
class LossConfig:
    """A registered loss. `weight`: a number, or a schedule as `distill.losses` has them."""

    name: str = ""
    weight: Any = 1.0
    args: dict[str, Any] = field(default_factory=dict)


@dataclass
class StageConfig:
    """One of `steps` and `tokens` is its budget.

    trainable: patterns of parameters' names; what matches none is frozen.
    schedule: of the learning rate after `warmup` steps of linear rise: "cosine" or "linear" down to
        `final_lr`, or "constant".
    clip: of the gradient's norm; None does not clip.
    """

    name: str = ""
    losses: list[LossConfig] = field(default_factory=list)
    trainable: list[str] = field(default_factory=lambda: ["*"])
    steps: int | None = None
    tokens: int | None = None
    lr: float = 1e-4
    final_lr: float = 0.0
    schedule: str = "cosine"
    warmup: int = 0
    weight_decay: float = 0.1
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    clip: float | None = 1.0

    def steps_of(self, tokens_per_step: int) -> int:
        return self.steps or math.ceil((self.tokens or 0) / tokens_per_step)


@dataclass
class LoopConfig:
    """rows: of a step, over all ranks. micro_rows: that a rank computes at once; None is all its.
    parallel: what ranks do, "ddp" or "fsdp2". precision: of products, "float32" or "bfloat16";
    weights and their gradients stay in float32.
    keep: so many checkpoints of a stage stay. 0 of an interval is never.
    """

    rows: int = 8
    micro_rows: int | None = None
    seed: int = 1
    precision: str = "float32"
    parallel: str = "ddp"
    activation_checkpointing: bool = False
    checkpoint_every: int = 100
    keep: int = 2
    heldout_every: int = 100


@dataclass
class EvaluationConfig:
    """Of the finished student beside its teacher, on the files held out: scores.json, report.html
    and report.md, unless `report` is false. `rows` windows of `data.length` are read at once.

    needle, contexts: lengths, as the flags of `eval` with these names; none is left out.
    """

    report: bool = True
    rows: int = 8
    needle: list[int] = field(default_factory=list)
    contexts: list[int] = field(default_factory=list)


@dataclass
class LogConfig:
    """trackers: names that `accelerate` knows, as tensorboard, wandb, mlflow."""

    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])
    every: int = 10


@dataclass
class Recipe:
    """A teacher, a student, data, and the stages that lead from one to the other; and the names of
    what the student is to be compared with (`distill.training.controls`)."""

    student: StudentConfig = field(default_factory=StudentConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    data: DataConfig = field(default_factory=DataConfig)
    stages: list[StageConfig] = field(default_factory=list)
    loop: LoopConfig = field(default_factory=LoopConfig)
    log: LogConfig = field(default_factory=LogConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    controls: list[str] = field(default_factory=list)

    @classmethod
    def load(cls, source: str | Path, overrides: list[str] | None = None) -> Recipe:
        """A preset by name or a YAML file, with overrides as `stages.1.lr=1e-5`.

        Raises:
            DistillError: a key is unknown, or a value does not fit.
        """
        config = OmegaConf.merge(OmegaConf.structured(cls), {})
        given = _read(source)
        try:
            _require_known(cls(), given, "")
            config = OmegaConf.merge(config, given)
            for override in overrides or []:
                _override(config, override)
            recipe = OmegaConf.to_object(config)
        except OmegaConfBaseException as error:
            why = str(error).splitlines()[0]
            raise DistillError(f"recipe: {error.full_key or source}: {why}") from error
        assert isinstance(recipe, cls)
        recipe.check()
        recipe.expand_home()
        return recipe

    def expand_home(self) -> None:
        """Put the user's folder for ~ in paths: a shell does not, within KEY=~/notes."""
        for key in ("student.path", "data.corpus", "data.tokens", "teacher.path", "teacher.cache"):
            section, name = key.split(".")
            part = getattr(self, section)
            path = getattr(part, name)
            if path == "":  # which Path takes for the current folder
                raise DistillError(f"recipe: {key} must be a path or null, got ''")
            if path is not None:
                setattr(part, name, str(Path(path).expanduser()))

    def save(self, path: Path) -> None:
        write_atomically(path, OmegaConf.to_yaml(OmegaConf.structured(self)))

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        plain = OmegaConf.to_container(OmegaConf.structured(self))
        assert isinstance(plain, dict)
        return {str(key): value for key, value in plain.items()}

    def check(self) -> None:
        """Raise DistillError for values that do not go together."""
        choices = {
            "student.kind": (self.student.kind, ("hybridize", "compress", "load")),
            "teacher.dtype": (self.teacher.dtype, tuple(PRECISIONS)),
            "loop.parallel": (self.loop.parallel, ("ddp", "fsdp2")),
            "loop.precision": (self.loop.precision, tuple(PRECISIONS)),
        }
        least: dict[str, tuple[float, float]] = {"loop.rows": (self.loop.rows, 1)}
        least["data.length"] = (self.data.length, 2)
        least |= {"loop.keep": (self.loop.keep, 1), "log.every": (self.log.every, 1)}
        least |= {"student.calibration_rows": (self.student.calibration_rows, 0)}
        least["evaluation.rows"] = (self.evaluation.rows, 1)
        for name in ("needle", "contexts"):
            lengths = getattr(self.evaluation, name)
            least[f"evaluation.{name}"] = (min(lengths, default=1), 1)
        if self.loop.micro_rows is not None:
            least["loop.micro_rows"] = (self.loop.micro_rows, 1)
        if not 0 <= self.data.heldout_fraction < 1:
            raise DistillError(
                "recipe: data.heldout_fraction must be at least 0 and below 1, got"
                f" {self.data.heldout_fraction}"
            )
        if not self.stages:
            raise DistillError("recipe: stages must have one at least")
        for at, stage in enumerate(self.stages):
            where = f"stages.{at}"
            choices[f"{where}.schedule"] = (stage.schedule, ("cosine", "linear", "constant"))
            if not stage.name or not stage.name.replace("-", "_").isidentifier():
                raise DistillError(
                    f"recipe: {where}.name must be letters, digits and -, got {stage.name!r}"
                )
            if (stage.steps is None) == (stage.tokens is None):
                raise DistillError(f"recipe: {where} must have one of steps and tokens")
            least[f"{where}.budget"] = (stage.steps or stage.tokens or 0, 1)
            least |= _stage_least(where, stage)
            if not stage.losses:
                raise DistillError(f"recipe: {where}.losses must have one at least")
        for key, (value, allowed) in choices.items():
            if value not in allowed:
                raise DistillError(
                    f"recipe: {key} must be one of {', '.join(allowed)}, got {value!r}"
                )
        for key, (number, lowest) in least.items():
            if not lowest <= number < math.inf:
                raise DistillError(f"recipe: {key} must be at least {lowest}, got {number}")
        if len({stage.name for stage in self.stages}) < len(self.stages):
            raise DistillError("recipe: stages must have names of their own")


def _stage_least(where: str, stage: StageConfig) -> dict[str, tuple[float, float]]:
    """Numbers of a stage and what they must be at least; raises for those with other bounds."""
    if stage.clip is not None and not stage.clip > 0:
        raise DistillError(f"recipe: {where}.clip must be above 0, got {stage.clip}")
    if len(stage.betas) != 2 or not all(0 <= beta < 1 for beta in stage.betas):
        raise DistillError(
            f"recipe: {where}.betas must be two from 0 to below 1, got {stage.betas}"
        )
    if not stage.trainable:
        raise DistillError(f"recipe: {where}.trainable must have one pattern at least")
    names = ("lr", "final_lr", "warmup", "weight_decay")
    return {f"{where}.{name}": (getattr(stage, name), 0) for name in names}


def presets() -> list[str]:
    """Names of the recipes that come with the package."""
    found = (Path(entry.name) for entry in PRESETS.iterdir())
    return sorted(path.stem for path in found if path.suffix == ".yaml")


def _read(source: str | Path) -> DictConfig:
    path = Path(source)
    try:
        if str(source) in presets():
            text = (PRESETS / f"{source}.yaml").read_text()
        else:
            text = path.read_text()
        given = OmegaConf.create(text)
    except OSError as error:
        near = nearest(str(source), presets())
        raise DistillError(
            f"recipe: {source} is neither a file ({error.strerror}) nor a preset{near};"
            f" presets are {', '.join(presets())}"
        ) from error
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise DistillError(f"recipe: {source} is not YAML: {error}") from error
    if not isinstance(given, DictConfig):
        raise DistillError(f"recipe: {source} must have keys and values at its top")
    return given


def _require_known(example: Any, given: Any, at: str) -> None:
    """Walk what was given beside the dataclasses, whose free dicts take any key."""
    if not isinstance(given, DictConfig):
        return
    names = list(example.__dataclass_fields__)
    for name, value in given.items():
        key = str(name)
        if key not in names:
            raise DistillError(
                f"recipe: there is no {at}{key}{nearest(key, names)};"
                f" {at.rstrip('.') or 'the top'} has {', '.join(names)}"
            )
        inner = getattr(example, key)
        if hasattr(inner, "__dataclass_fields__"):
            _require_known(inner, value, f"{at}{key}.")
        elif isinstance(value, ListConfig) and key in _ITEMS:
            for index, item in enumerate(value):
                _require_known(_ITEMS[key](), item, f"{at}{key}.{index}.")


_ITEMS: dict[str, Any] = {"stages": StageConfig, "losses": LossConfig}


def _override(config: Any, text: str) -> None:
    key, equals, value = text.partition("=")
    if not equals:
        raise DistillError(f"recipe: an override must be key=value, got {text!r}")
    node, at, parts = config, "", key.split(".")
    for depth, part in enumerate(parts):
        if isinstance(node, ListConfig):
            if not part.isdecimal() or int(part) >= len(node):
                raise DistillError(f"recipe: {at[:-1]} has items 0 to {len(node) - 1}, got {part}")
        elif isinstance(node, DictConfig) and OmegaConf.get_type(node) is not dict:
            if part not in node:
                names = [str(name) for name in node]
                raise DistillError(
                    f"recipe: there is no {at}{part}{nearest(part, names)};"
                    f" {at.rstrip('.') or 'the top'} has {', '.join(names)}"
                )
        else:
            break  # a free dict, or nothing yet
        at += f"{part}."
        if depth < len(parts) - 1:
            node = node[int(part)] if isinstance(node, ListConfig) else node[part]
    try:
        given = OmegaConf.from_dotlist([f"x={value}"]).x
    except YAMLError:
        given = value  # as data.pattern=*.py
    there = OmegaConf.select(config, key)
    # A free dict is replaced: what a preset has in it could not be taken out otherwise.
    free = isinstance(there, DictConfig) and OmegaConf.get_type(there) is dict
    OmegaConf.update(config, key, given, merge=not free, force_add=True)
