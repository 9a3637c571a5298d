"""Steps of a stage: the same ones however rows are shared, and numbers that end them."""

import pytest
import torch
from ranks import run_on_ranks
from rich.console import Console
from run_cases import first_stage, make_recipe, steps_on_rank, write_teacher

from distill.__main__ import main
from distill.errors import DistillError
from distill.progress import Reporter
from distill.training.recipe import StageConfig
from distill.training.runs import Run
from distill.training.trainer import lr_at
from xlstm_kernels.testing import relative_error


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return write_teacher(tmp_path_factory.mktemp("teacher"))


layouts = pytest.mark.parametrize(
    "boundaries",
    [pytest.param(False, marks=pytest.mark.slow, id="rows"), pytest.param(True, id="documents")],
)
# Each has a loss of its own count, and (as text has no equal documents) unequal micro-batches.
LOSSES = (
    "stages.0.losses=[{name: ce, weight: 0.5}, {name: kl, weight: 0.5},"
    " {name: hidden_mse, args: {tokens: all}}]"
)
WHOLE = ("stages.0.trainable=['*']", LOSSES, "stages.0.lr=1e-3")


def assert_same_steps(got, want):
    for got_losses, want_losses in zip(got[0], want[0], strict=True):
        # The divergence is told from the cross-entropy by subtraction: digits of the larger one.
        assert got_losses == pytest.approx(want_losses, rel=1e-5, abs=1e-6)
    assert got[1].keys() == want[1].keys()
    # Adam divides by what may be rounding alone.
    worst = max(float(relative_error(got[1][name], x)) for name, x in want[1].items())
    assert worst <= 1e-4, worst


@layouts
def test_one_batch_is_two_is_four(tmp_path, teacher, corpus_dir, boundaries):
    def steps(micro_rows):
        changes = (f"loop.micro_rows={micro_rows}", f"data.boundaries={boundaries}", *WHOLE)
        recipe = make_recipe(tmp_path, teacher, corpus_dir, *changes)
        return steps_on_rank(0, 1, recipe, tmp_path, 2)

    want = steps(8)
    assert_same_steps(steps(4), want)
    assert_same_steps(steps(3), want)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["align", "distill"])
@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_two_ranks_are_one(tmp_path, teacher, corpus_dir, parallel, stage):
    changes = ["data.boundaries=true", *(WHOLE if stage == "distill" else ())]
    recipe = make_recipe(tmp_path, teacher, corpus_dir, *changes)
    want = steps_on_rank(0, 1, recipe, tmp_path, 2)
    changes += ["loop.micro_rows=2", f"loop.parallel={parallel}"]
    recipe = make_recipe(tmp_path, teacher, corpus_dir, *changes)
    found = run_on_ranks(2, steps_on_rank, 2, recipe, tmp_path, 2)
    assert_same_steps(found[0], want)
    assert found[1][0] == found[0][0]


@pytest.mark.parametrize(
    "words",
    [
        pytest.param("k: 32", id="likeliest"),
        pytest.param("samples: 12, seed: 3", id="drawn", marks=pytest.mark.slow),
    ],
)
@layouts
def test_a_cache_is_the_teacher(tmp_path, teacher, corpus_dir, boundaries, words):
    where = ["--teacher", teacher, "--corpus", corpus_dir, "--pattern", "*.py"]
    sizes = ["--length", 24, *(["--boundaries"] if boundaries else [])]
    drawn = words != "k: 32"
    sizes += ["--samples", 12, "--seed", 3] if drawn else ["-k", 32]
    out = tmp_path / "cache"
    assert main([str(x) for x in ("cache", *where, *sizes, "--out", out)]) == 0
    changes = ["stages.0.trainable=['*']", "stages.0.lr=1e-3", f"data.boundaries={boundaries}"]
    changes.append("stages.1.losses=[{name: ce}]")  # the stage to come would want other words
    of = "stages.0.losses=[{{name: ce}}, {{name: topk_kl, args: {{{}}}}}]".format
    changes.append(of(words))

    def losses(*more):
        recipe = make_recipe(tmp_path, teacher, corpus_dir, *changes, *more)
        return steps_on_rank(0, 1, recipe, tmp_path, 2)[0]

    # Log-probabilities of a cache are rounded to 2^-11, counts not.
    within = {"rel": 1e-5} if drawn else {"rel": 1e-3, "abs": 1e-3}
    for got, want in zip(losses(f"teacher.cache={out}"), losses(), strict=True):
        assert got == pytest.approx(want, **within)
    # The same weights in another dtype are the same teacher.
    assert losses(f"teacher.cache={out}", "teacher.dtype=bfloat16")
    with pytest.raises(DistillError, match=r"boundaries is .* there and .* here"):
        losses(f"teacher.cache={out}", f"data.boundaries={not boundaries}")
    with pytest.raises(DistillError, match=r"data is .*; length is 24 there and 23 here"):
        losses(f"teacher.cache={out}", "data.length=23")
    with pytest.raises(DistillError, match=r"samples is (12|None) there and 13 here"):
        losses(f"teacher.cache={out}", of("samples: 13, seed: 3"))
    with pytest.raises(DistillError, match=r"(k is 32|words is drawn) there and \S+ here"):
        losses(f"teacher.cache={out}", of("k: 31"))
    if drawn:
        with pytest.raises(DistillError, match=r"support must be 'sampled' .* got 'tail'"):
            losses(f"teacher.cache={out}", of("support: tail"))


def test_stages_read_other_rows(tmp_path, teacher, corpus_dir):
    recipe = make_recipe(tmp_path, teacher, corpus_dir)
    shared = Run(recipe, tmp_path, Reporter(Console(quiet=True)))
    student = shared.first_student()
    seen = []
    for config, first in zip(recipe.stages, (None, 3), strict=True):
        stage = shared.stage(config, student)
        seen += [stage.rows.windows_of(step) for step in range(stage.steps)]
        # What was read otherwise is not gone on with.
        assert stage.settings["data"].get("first_step") == first
    assert len(set(torch.cat(seen).tolist())) == 8 * (3 + 5)


def test_a_number_that_is_none_ends_the_stage(tmp_path, teacher, corpus_dir):
    recipe = make_recipe(tmp_path, teacher, corpus_dir, *WHOLE)
    stage = first_stage(recipe, tmp_path)
    stage._train_step()
    stage.step += 1
    before = {name: x.clone() for name, x in stage.wrapped.weights().items()}
    head = stage.module.student.get_output_embeddings()
    with torch.no_grad():
        head.weight[3] = float("nan")
    with pytest.raises(DistillError, match=r"ce is nan at step 2 of 3 .*windows .*module_.*\.py"):
        stage._train_step()
    after = stage.wrapped.weights()
    assert all(torch.equal(after[name], x) for name, x in before.items() if "lm_head" not in name)


def test_ruined_weights_are_no_checkpoint(tmp_path, teacher, corpus_dir):
    """The losses of the step that ruins them were finite."""
    recipe = make_recipe(tmp_path, teacher, corpus_dir, *WHOLE, "stages.0.lr=1e39")
    stage = first_stage(recipe, tmp_path)
    stage._train_step()
    stage.step += 1
    with pytest.raises(DistillError, match=r"not finite after step 1 of 3 .*; no checkpoint"):
        stage.save()
    assert not stage.folder.exists()


def test_what_no_name_matches_is_an_error(tmp_path, teacher, corpus_dir):
    recipe = make_recipe(tmp_path, teacher, corpus_dir, "stages.0.trainable=['*mixr*']")
    with pytest.raises(DistillError, match=r"trainable of stage align must match .*'\*mixr\*'"):
        first_stage(recipe, tmp_path)


def test_learning_rates():
    config = StageConfig(lr=1.0, final_lr=0.1, warmup=2)
    rates = [lr_at(config, step, 12) for step in range(12)]
    assert rates[:3] == [0.5, 1.0, 1.0] and rates[-1] == pytest.approx(0.1)
    assert rates[2:] == sorted(rates[2:], reverse=True)
    config.schedule = "linear"
    assert lr_at(config, 11, 12) == pytest.approx(0.1)
    assert lr_at(config, 2, 12) - lr_at(config, 3, 12) == pytest.approx(0.1)
    config.schedule = "constant"
    assert lr_at(config, 11, 12) == 1.0
