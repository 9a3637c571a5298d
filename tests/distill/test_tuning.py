"""Successive halving: its rounds, its budget, and that the better choice wins."""

import io
import math

import pytest
from rich.console import Console
from run_cases import RECIPE, write_teacher

from distill.__main__ import main
from distill.data.capture import load_teacher
from distill.errors import DistillError
from distill.evaluation.scores import evaluate
from distill.progress import Reporter
from distill.training.recipe import Recipe
from distill.training.tuning import BEST, Round, Trial, choices, plan, tune, with_budget


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return write_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture
def source(tmp_path):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path / "recipe.yaml"


def test_rounds_share_the_budget():
    assert plan(9, 2700, 3) == [Round(9, 150), Round(3, 450)]
    assert plan(10, 9000, 3) == [Round(10, 300), Round(4, 750), Round(2, 1500)]
    for trials in range(2, 40):
        rounds = plan(trials, 10**6, 3)
        assert sum(each.trials * each.tokens for each in rounds) <= 10**6
        assert 2 <= rounds[-1].trials <= 3


def test_combinations():
    over = {"a": ["1", "2"], "b": ["x", "y", "z"]}
    assert len(choices(over, None, 1)) == 6 and choices(over, None, 1)[1] == {"a": "1", "b": "y"}
    assert choices(over, 3, 1) == choices(over, 3, 1) != choices(over, 3, 2)
    with pytest.raises(DistillError, match="two combinations to compare, got 1"):
        choices({"a": ["1"]}, None, 1)


def test_the_best_of_the_last_round_is_first_and_what_diverged_last():
    trials = [Trial({}, [2.0]), Trial({}, [1.0, 3.0]), Trial({}, [math.nan]), Trial({}, [1.5, 2.5])]
    assert [t.scores for t in sorted(trials, key=lambda t: t.rank)][:3] == [
        [1.5, 2.5],
        [1.0, 3.0],
        [2.0],
    ]


def test_stages_keep_their_shares(source):
    recipe = Recipe.load(source, ["stages.1.warmup=2"])
    longer = with_budget(recipe, 80 * 8 * 24)
    assert [stage.steps for stage in longer.stages] == [30, 50]
    assert longer.stages[1].warmup == 20
    with pytest.raises(DistillError, match="a step of each stage, got 300"):
        with_budget(recipe, 300)


def tuned(source, teacher, corpus, folder, over, **options):
    reporter = Reporter(Console(file=io.StringIO()))
    given = [f"teacher.path={teacher}", f"data.corpus={corpus}", "data.heldout_fraction=0.2"]
    return tune(source, over, folder, reporter, overrides=given, **options)


@pytest.mark.slow
def test_the_better_learning_rate_wins(source, teacher, corpus_dir, tmp_path):
    over = {"stages.1.lr": ["1e-9", "1e-2", "1e30", "1e-8"]}
    folder, seen = tmp_path / "tune", []
    options = {"tokens": 15_000, "keep": 2, "after_trial": lambda t: seen.append(len(t.scores))}
    trials = tuned(source, teacher, corpus_dir, folder, over, **options)
    assert trials[0].choices == {"stages.1.lr": "1e-2"} and len(trials[0].scores) == 2
    assert trials[-1].choices == {"stages.1.lr": "1e30"}
    best = Recipe.load(folder / BEST)
    assert best.stages[1].lr == 1e-2 and [stage.steps for stage in best.stages] == [3, 5]
    assert seen == [1] * 4 + [2] * 2
    # Chosen by some files, scored on others.
    corpus = best.data.plan().corpus()
    model, tokenizer = load_teacher(folder / "round-1/trial-1/student")
    validation, test = (
        evaluate(model, tokenizer, part, length=24).bits_per_byte for part in corpus.halves
    )
    assert trials[0].scores[-1] == pytest.approx(validation) != test
    assert trials[0].test == pytest.approx(test)
    # What is there is not trained again.
    written = {path: path.stat().st_mtime_ns for path in folder.glob("round-*/*/metrics.jsonl")}
    again = tuned(source, teacher, corpus_dir, folder, over, **options)
    assert [t.scores for t in again][:3] == [t.scores for t in trials][:3]
    with pytest.raises(DistillError, match="is of another recipe; choose another folder"):
        tuned(source, teacher, corpus_dir, folder, over, **options | {"tokens": 14_000})
    finite = [path for path in written if (path.parent / "student").exists()]
    assert finite and all(path.stat().st_mtime_ns == written[path] for path in finite)


def test_too_few_files_to_choose_by(source, teacher, corpus_dir, tmp_path):
    given = [f"teacher.path={teacher}", f"data.corpus={corpus_dir}"]
    reporter = Reporter(Console(file=io.StringIO()))
    over = {"stages.1.lr": ["1e-3", "1e-2"]}
    with pytest.raises(DistillError, match="tune: at least 2 documents must be held out"):
        tune(source, over, tmp_path / "tune", reporter, overrides=given, tokens=10_000)
    assert not (tmp_path / "tune").exists()


def test_unknown_keys_and_values_are_one_line(source, tmp_path, capsys):
    base = ["tune", str(source), "--tokens", "9999", "--run-dir", str(tmp_path / "x")]
    assert main([*base, "--over", "stages.0.lrr=1,2"]) == 1
    assert "there is no stages.0.lrr, did you mean lr?" in capsys.readouterr().err
    assert main([*base, "--over", "lr"]) == 1
    assert "--over: must be as KEY=V1,V2, got 'lr'" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
