"""What a finished run is worth: scores and report by one command, whole or not at all."""

import json
import shutil

import pytest
from run_cases import StopAt, do, make_recipe, tool, write_teacher

from distill.__main__ import main
from distill.data.capture import load_model
from distill.data.corpus import load_corpus
from distill.errors import DistillError, Interrupted
from distill.evaluation.scores import evaluate
from distill.training import runs
from distill.training.scoring import OUTCOME

SHORT = ("stages.0.steps=1", "stages.1.steps=2", "loop.heldout_every=0", "evaluation.report=true")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return write_teacher(tmp_path_factory.mktemp("teacher"))


def outcome(run):
    return [name for name in OUTCOME if (run / name).exists()]


def test_the_report_is_of_files_that_chose_nothing(tmp_path, teacher, corpus_dir):
    given = [*SHORT, "data.heldout_fraction=0.2", "stages.1.steps=1", "loop.heldout_every=1"]
    run = tmp_path / "run"
    said = do(make_recipe(tmp_path, teacher, corpus_dir, *given), run)
    halves = load_corpus(corpus_dir, "*.py", 0.2).halves
    assert halves.describe() in said
    scores = json.loads((run / "scores.json").read_text())
    assert list(scores["models"]["student"]["documents"]) == [d.path for d in halves.test]
    (model, tokenizer), (theirs, _) = map(runs.load_teacher, (run / "student", teacher))
    options = {"documents": halves.validation, "length": 24}
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["heldout"]
    want = evaluate(model, tokenizer, **options).bits_per_byte
    assert last["bits_per_byte"] == pytest.approx(want, rel=1e-5)
    want = evaluate(theirs, tokenizer, **options).bits_per_byte
    assert scores["validation"] == {"teacher": pytest.approx(want, rel=1e-5)}
    assert f"teacher, {want:.3f}" in (run / "report.html").read_text()


@pytest.mark.medium
def test_a_run_ends_with_scores_and_a_report(tmp_path, teacher, corpus_dir):
    run = tmp_path / "run"
    said = do(make_recipe(tmp_path, teacher, corpus_dir, *SHORT), run)
    assert outcome(run) == list(OUTCOME) and f"report   {run / 'report.html'}" in said
    scores = json.loads((run / "scores.json").read_text())
    student = load_model(run / "student")
    documents = load_corpus(corpus_dir, "*.py").heldout
    options = {"teacher": load_model(teacher), "length": 24}
    want = evaluate(student, runs.load_teacher(teacher)[1], documents, **options)
    found = scores["models"]["student"]
    assert found["bits_per_byte"] == pytest.approx(want.bits_per_byte, rel=1e-5)
    assert found["agreement"] == want.agreement
    assert f"{want.bits_per_byte:.3f} bits per byte of held-out text" in said
    for name in ("report.html", "report.md"):
        assert f"{want.bits_per_byte:.3f}" in (run / name).read_text()


@pytest.mark.medium
def test_a_stopped_run_has_none_until_it_ends(tmp_path, teacher, corpus_dir, monkeypatch):
    recipe = make_recipe(tmp_path, teacher, corpus_dir, *SHORT)
    run = tmp_path / "run"
    with pytest.raises(Interrupted):
        do(recipe, run, interrupt=StopAt(1))
    assert outcome(run) == [] and not (run / "student").exists()
    # Two looks a step at the signal, and the next one is of the scores.
    with pytest.raises(Interrupted):
        do(recipe, run, resume=True, interrupt=StopAt(5))
    assert outcome(run) == [] and (run / "student").exists()
    said = do(recipe, run, resume=True)
    assert outcome(run) == list(OUTCOME)
    assert "distill  " not in said  # nothing was left to train
    monkeypatch.setattr("distill.training.scoring.assess", None)
    do(recipe, run, resume=True)  # nor is anything left to score


@pytest.mark.medium
def test_a_report_may_be_left_out(tmp_path, teacher, corpus_dir, capsys):
    recipe = make_recipe(tmp_path, teacher, corpus_dir, *SHORT)
    recipe.save(tmp_path / "recipe.yaml")
    given = ["run", str(tmp_path / "recipe.yaml"), "--run-dir", str(tmp_path / "run")]
    assert main([*given, "--no-report"]) == 0, capsys.readouterr().err
    assert outcome(tmp_path / "run") == [] and (tmp_path / "run/student").exists()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ("evaluation.needle=[9]", "needle: lengths must be at least 58"),
        ("evaluation.contexts=[0]", "evaluation.contexts must be at least 1, got 0"),
        ("evaluation.rows=0", "evaluation.rows must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_scored_is_not_trained(tmp_path, teacher, corpus_dir, change, why):
    with pytest.raises(DistillError, match=why):
        do(make_recipe(tmp_path, teacher, corpus_dir, change), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def short(tmp_path_factory, teacher):
    """A teacher of 32 positions."""
    folder = tmp_path_factory.mktemp("short") / "teacher"
    shutil.copytree(teacher, folder)
    config = json.loads((folder / "config.json").read_text()) | {"n_positions": 32}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_contexts_that_the_teacher_has_no_positions_for_are_not_trained(
    tmp_path, short, corpus_dir
):
    recipe = make_recipe(tmp_path, short, corpus_dir, "evaluation.contexts=[17]")
    with pytest.raises(DistillError, match="bench: length must be at most 32, the positions"):
        do(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_lengths_are_looked_at_before_models(
    tmp_path, teacher, short, corpus_dir, capsys, monkeypatch
):
    monkeypatch.setattr("distill.evaluation.folders.load_model", None)
    given = ["eval", "--out", str(tmp_path / "x"), "--corpus", str(corpus_dir), "--length", "16"]
    for student, flags, why in (
        (teacher, ["--needle", "9,99"], "needle: lengths must be at least 58, which the question"),
        (short, ["--needle", "99"], "needle: length must be at most 32, the positions of the mod"),
        (short, ["--contexts", "17"], "bench: length must be at most 32, the positions"),
    ):
        models = ["--teacher", str(teacher), "--student", str(student)]
        assert main([*given, *models, *flags]) == 1
        assert why in capsys.readouterr().err


@pytest.mark.slow
def test_a_student_without_a_teacher_has_a_report_of_its_training(tmp_path, teacher, corpus_dir):
    given = ["student.kind=load", f"student.path={teacher}", "student.options={}", *SHORT]
    given += ["stages.0.trainable=['*']", "stages.0.losses=[{name: ce}]", "loop.heldout_every=1"]
    given += ["stages.1.losses=[{name: ce}]", "teacher.path=null"]
    said = do(make_recipe(tmp_path, teacher, corpus_dir, *given), tmp_path / "run")
    assert outcome(tmp_path / "run") == ["report.html", "report.md"]
    assert "without scores: the recipe has no teacher" in said


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_of_two_ranks_one_scores_and_the_other_waits(tmp_path, teacher, corpus_dir, parallel):
    make_recipe(tmp_path, teacher, corpus_dir)
    given = [f"teacher.path={teacher}", f"data.corpus={corpus_dir}", *SHORT]
    given += [f"loop.parallel={parallel}", "--run-dir", tmp_path / "run"]
    given += ["--controls", "hard-labels"]
    process = tool(tmp_path, *given, ranks=2)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert outcome(tmp_path / "run") == list(OUTCOME)
    assert out.count("score    hard-labels") == 1 and out.count("report   ") == 1


@pytest.mark.slow
def test_what_stops_one_rank_stops_the_other(tmp_path, teacher, corpus_dir):
    make_recipe(tmp_path, teacher, corpus_dir)
    given = [f"teacher.path={teacher}", f"data.corpus={corpus_dir}", *SHORT]
    damaged = tmp_path / "run" / "controls" / "other" / "metrics.jsonl"
    damaged.parent.mkdir(parents=True)
    damaged.write_text("{\n\n")
    process = tool(tmp_path, *given, "--run-dir", tmp_path / "run", ranks=2)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1 and f"{damaged} is damaged in line 1" in err, err
    assert (tmp_path / "run" / "student").exists()
