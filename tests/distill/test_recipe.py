"""Recipes: what they hold, and one line for what they do not."""

import pytest

pytest.importorskip("omegaconf", reason="omegaconf is not installed: the extra `distill`")

from distill.errors import DistillError
from distill.losses.module import LossSpec
from distill.training.recipe import PRESETS, Recipe, presets

SMALL = "stages: [{name: a, steps: 3, losses: [{name: ce}]}]"


def read(tmp_path, *overrides, text=SMALL):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return Recipe.load(path, list(overrides))


@pytest.mark.parametrize("name", presets())
def test_presets_are_whole(name, tmp_path):
    recipe = Recipe.load(name)
    for stage in recipe.stages:
        assert [LossSpec(loss.name, loss.weight, loss.args) for loss in stage.losses]
    recipe.save(tmp_path / "recipe.yaml")
    assert Recipe.load(tmp_path / "recipe.yaml") == recipe


def test_the_paper_s_numbers():
    recipe = Recipe.load("linearize-paper")
    align, distil = recipe.stages
    assert (recipe.loop.rows, recipe.data.length) == (64, 4096)
    assert (recipe.student.options["window"], recipe.student.options["sinks"]) == (512, 4)
    assert (recipe.loop.precision, align.weight_decay, distil.weight_decay) == (
        "bfloat16",
        0.1,
        0.1,
    )
    assert (distil.tokens, distil.losses[1].args) == (5_000_000_000, {"k": 256})
    assert (align.trainable, distil.trainable) == (["*mixer*"], ["*"])
    assert (align.lr, align.final_lr, align.tokens) == (1e-2, 1e-5, 655_000_000)
    assert (distil.lr, distil.schedule, distil.clip) == (1e-5, "constant", 1.0)
    assert {loss.name: loss.weight for loss in distil.losses} == {"ce": 0.9, "topk_kl": 0.1}


def test_overrides(tmp_path):
    given = ["stages.0.lr=1e-5", "student.options.window=4", "stages.0.clip=null"]
    given += ["stages.0.losses.0.weight={kind: linear, start: 0.0}", "loop.rows=3"]
    recipe = read(tmp_path, *given)
    stage = recipe.stages[0]
    assert (stage.lr, stage.clip, recipe.loop.rows) == (1e-5, None, 3)
    assert recipe.student.options == {"window": 4}
    assert stage.losses[0].weight == {"kind": "linear", "start": 0.0}


def test_patterns_and_homes_are_taken_as_a_shell_passes_them(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    recipe = read(tmp_path, "data.corpus=~/notes", "data.pattern=*.md", "teacher.path=~/models/a")
    assert (recipe.data.corpus, recipe.data.pattern) == ("/home/someone/notes", "*.md")
    assert recipe.teacher.path == "/home/someone/models/a"


def test_an_override_replaces_options():
    given = ["student.kind=hybridize", "student.options={window: 8}", "stages.0.losses.1.args={}"]
    recipe = Recipe.load("compress-kd", [*given, "student.options.sinks=2"])
    assert recipe.student.options == {"window": 8, "sinks": 2}
    assert recipe.stages[0].losses[1].args == {}


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("stages.0.lrr=1", ["stages.0.lrr", "did you mean lr?"]),
        ("lop.rows=1", ["there is no lop", "did you mean loop?"]),
        ("stages.3.lr=1", ["stages has items 0 to 0, got 3"]),
        ("loop.rows=many", ["loop.rows", "'many'"]),
        ("loop.rows=0", ["loop.rows must be at least 1, got 0"]),
        ("loop.precision=fp16", ["loop.precision must be one of float32, bfloat16"]),
        ("stages.0.tokens=9", ["stages.0 must have one of steps and tokens"]),
        ("stages.0.name=../x", ["stages.0.name", "'../x'"]),
        ("data", ["key=value", "'data'"]),
        ("loop.micro_rows=-2", ["loop.micro_rows must be at least 1, got -2"]),
        ("data.heldout_fraction=1.5", ["data.heldout_fraction must be at least 0 and below 1"]),
        ("stages.0.lr=-1", ["stages.0.lr must be at least 0, got -1"]),
        ("stages.0.lr=nan", ["stages.0.lr", "got nan"]),
        ("stages.0.betas=[0.9]", ["stages.0.betas must be two", "[0.9]"]),
        ("stages.0.betas=[0.9", ["stages[0].betas"]),
        ("stages.0.clip=0", ["stages.0.clip must be above 0"]),
        ("data.corpus=''", ["data.corpus must be a path or null, got ''"]),
        ("stages.0.trainable=[]", ["stages.0.trainable must have one pattern"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_overrides_are_one_line(tmp_path, override, parts):
    with pytest.raises(DistillError) as caught:
        read(tmp_path, override)
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("stages: [{nam: a}]", ["stages.0.nam", "did you mean name?"]),
        ("stages: [{name: a, steps: 1, losses: [{weigth: 1}]}]", ["did you mean weight?"]),
        ("student: {optoins: {}}", ["student.optoins", "did you mean options?"]),
        ("- 1", ["keys and values"]),
        ("a: [", ["is not YAML"]),
        ("{}", ["stages must have one at least"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_files_are_one_line(tmp_path, text, parts):
    with pytest.raises(DistillError) as caught:
        read(tmp_path, text=text)
    for part in parts:
        assert part in str(caught.value)


def test_a_file_that_is_no_text(tmp_path):
    (tmp_path / "model").write_bytes(b"\x80")
    with pytest.raises(DistillError, match="is not YAML"):
        Recipe.load(tmp_path / "model")


def test_a_preset_that_there_is_not():
    with pytest.raises(DistillError, match="did you mean linearize-paper"):
        Recipe.load("linearise-paper")


@pytest.mark.parametrize(("name", "ranks"), [("1-gpu", 1), ("8-gpus", 8), ("2x8-gpus", 16)])
def test_launch_files_are_accelerate_s(name, ranks):
    reason = "accelerate is not installed: the extra `distill`"
    config_args = pytest.importorskip("accelerate.commands.config.config_args", reason=reason)
    file = PRESETS.parent / "launch" / f"{name}.yaml"
    assert config_args.load_config_from_file(str(file)).num_processes == ranks
