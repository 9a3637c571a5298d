"""Controls: what is trained beside a student, by one command, and what the report says of it."""

import json

import pytest
from run_cases import StopAt, assert_same, do, make_recipe, weights, write_teacher

from distill.__main__ import main
from distill.data.capture import load_model
from distill.errors import DistillError, Interrupted
from distill.report.document import write_report
from distill.training.controls import CONTROLS, controls_of

SHORT = ("stages.0.steps=1", "stages.1.steps=2", "loop.heldout_every=0")
BOTH = f"controls=[{','.join(CONTROLS)}]"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return write_teacher(tmp_path_factory.mktemp("teacher"))


def test_a_control_differs_in_its_losses_or_its_student_alone(tmp_path, teacher, corpus_dir):
    given = ["stages.1.losses.0.args={label_smoothing: 0.1}", "teacher.cache=words", BOTH]
    recipe = make_recipe(tmp_path, teacher, corpus_dir, *given, "evaluation.report=true")
    before = recipe.as_dict()
    found = {name: control.as_dict() for name, control in controls_of(recipe).items()}
    assert list(found) == list(CONTROLS) and recipe.as_dict() == before
    for control in found.values():
        control["teacher"]["cache"] = "words"
        assert control["evaluation"].pop("report") is False
        assert [control[x] for x in ("data", "loop", "teacher")] == [
            before[x] for x in ("data", "loop", "teacher")
        ]
        *_, last = control["stages"]
        assert last["losses"] == [{"name": "ce", "weight": 1.0, "args": {"label_smoothing": 0.1}}]
    labels, on = found["hard-labels"], found["teacher-trained-on"]
    assert labels["student"] == before["student"]
    assert (on["student"]["kind"], on["student"]["path"]) == ("load", str(teacher))
    assert [len(x["stages"]) for x in (labels, on)] == [2, 1]  # the teacher has no mixers to align
    for control, stages in ((labels, before["stages"]), (on, before["stages"][1:])):
        for got, want in zip(control["stages"], stages, strict=True):
            assert got | {"losses": None} == want | {"losses": None}


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        (["controls=[hard-label]"], "no hard-label, did you mean hard-labels?"),
        (["teacher.path=null", "controls=[teacher-trained-on]"], "must have teacher.path"),
        (["stages.1.trainable=['*mixer*']", BOTH], "a stage that trains what the teacher has"),
    ],
)
def test_controls_that_cannot_be(tmp_path, teacher, corpus_dir, changes, why):
    with pytest.raises(DistillError, match=why):
        do(make_recipe(tmp_path, teacher, corpus_dir, *changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.medium
def test_one_command_trains_and_compares(tmp_path, teacher, corpus_dir, capsys):
    recipe = make_recipe(tmp_path, teacher, corpus_dir, *SHORT, "evaluation.report=true")
    recipe.save(tmp_path / "recipe.yaml")
    run = tmp_path / "run"
    given = ["run", str(tmp_path / "recipe.yaml"), "--run-dir", str(run)]
    given += ["--controls", ",".join(CONTROLS)]
    assert main([*given, "--dry-run"]) == 0
    assert "control  teacher-trained-on: distill" in capsys.readouterr().out
    assert main(given) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    models = json.loads((run / "scores.json").read_text())["models"]
    assert list(models) == ["teacher", "student", *CONTROLS]
    own = models["student"]["bits_per_byte"]
    page, markdown = ((run / f"report.{kind}").read_text() for kind in ("html", "md"))
    for name in CONTROLS:
        bits = models[name]["bits_per_byte"]
        better = "yes" if own < bits else "no"
        row = f"| {name} | {bits:.3f} | {own:.3f} | {own - bits:+.4f} | {better} |"
        assert row in markdown and f"Control {name!r} takes {bits:.3f}" in said
        assert f"{own - bits:+.4f}" in page
    on = load_model(run / "controls/teacher-trained-on/student").state_dict()
    assert on.keys() == load_model(teacher).state_dict().keys()
    # The report stands by itself, and is as it was.
    write_report(run)
    assert (run / "report.md").read_text() == markdown


@pytest.mark.medium
def test_a_stopped_control_goes_on_bit_for_bit(tmp_path, teacher, corpus_dir):
    recipe = make_recipe(tmp_path, teacher, corpus_dir, *SHORT, BOTH)
    do(recipe, tmp_path / "whole")
    run, looks = tmp_path / "run", 2 * (1 + 2) + 2  # those of the student, and one step more
    with pytest.raises(Interrupted):
        do(recipe, run, interrupt=StopAt(looks))
    assert (run / "student").exists() and not (run / "controls/hard-labels/student").exists()
    with pytest.raises(DistillError, match="holds a run; pass --resume"):
        do(recipe, run)
    written = (run / "metrics.jsonl").read_text()
    do(recipe, run, resume=True)
    assert (run / "metrics.jsonl").read_text() == written
    for name in CONTROLS:
        ours, want = (weights(x / "controls" / name / "student") for x in (run, tmp_path / "whole"))
        assert_same(ours, want)


@pytest.mark.medium
def test_a_control_that_comes_later_is_in_the_report_after_a_stop(tmp_path, teacher, corpus_dir):
    given = [*SHORT, "evaluation.report=true"]
    run, later = tmp_path / "run", "controls=[hard-labels]"
    do(make_recipe(tmp_path, teacher, corpus_dir, *given), run)
    recipe = make_recipe(tmp_path, teacher, corpus_dir, *given, later)
    # Two looks a step at the signal, and the next one is of the scores.
    with pytest.raises(Interrupted):
        do(recipe, run, resume=True, interrupt=StopAt(2 * (1 + 2)))
    assert (run / "controls/hard-labels/student").exists()
    assert not (run / "report.html").exists()
    do(recipe, run, resume=True)
    assert "hard-labels" in json.loads((run / "scores.json").read_text())["models"]
    assert "controls:\n- hard-labels\n" in (run / "recipe.yaml").read_text()


@pytest.mark.parametrize("name", ["student", "report.html", "controls/hard-labels/student"])
def test_what_no_run_has_written_stays(tmp_path, teacher, corpus_dir, name):
    place = tmp_path / "run" / name
    place.mkdir(parents=True)
    recipe = make_recipe(tmp_path, teacher, corpus_dir, "controls=[hard-labels]")
    for resume in (False, True):
        with pytest.raises(DistillError, match=f"{place} is of no run and would be replaced"):
            do(recipe, tmp_path / "run", resume)
    assert place.exists() and not (tmp_path / "run/recipe.yaml").exists()
