"""A whole run from the command line: what it leaves, and what it says when it cannot."""

import json

import pytest
import torch
from run_cases import RECIPE, do, make_recipe, transformers, write_teacher

from distill.__main__ import main
from distill.capture import load_model
from distill.errors import Interrupt, Interrupted


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return write_teacher(tmp_path_factory.mktemp("teacher"))


def command(capsys, tmp_path, teacher, corpus, *more):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    given = [tmp_path / "recipe.yaml", f"teacher.path={teacher}", f"data.corpus={corpus}"]
    status = main([str(x) for x in ("run", *given, "--run-dir", tmp_path / "run", *more)])
    return status, *capsys.readouterr()


def weights(folder):
    return load_model(folder, torch.float32).state_dict()


def assert_same(got, want):
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], x) for name, x in want.items())


@pytest.mark.parametrize("family", ["Llama", pytest.param("Qwen2", marks=pytest.mark.slow)])
def test_a_run_leaves_a_student(capsys, tmp_path, corpus_dir, family):
    teacher = write_teacher(tmp_path / "teacher", family)
    status, out, err = command(capsys, tmp_path, teacher, corpus_dir)
    assert status == 0, err
    assert "distill  5/5  loss" in out and "topk_kl" in out
    run = tmp_path / "run"
    tokenizer = transformers.AutoTokenizer.from_pretrained(run / "student")
    student = load_model(run / "student")
    ids = torch.tensor([tokenizer("def ")["input_ids"]])
    assert student.generate(ids, max_new_tokens=4, min_new_tokens=4).shape == (1, 8)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(x["stage"], x["step"]) for x in lines[2:4]] == [("align", 3), ("distill", 1)]
    assert lines[-1]["losses"].keys() == {"ce", "topk_kl"}
    assert lines[-1]["losses"]["ce"] < lines[3]["losses"]["ce"]
    kept = sorted(x.name for x in (run / "checkpoints" / "distill").iterdir())
    assert kept == ["step-00000004", "step-00000005", "student"]


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


def test_a_stopped_run_goes_on_bit_for_bit(tmp_path, teacher, corpus_dir):
    recipe = make_recipe(tmp_path, teacher, corpus_dir)
    do(recipe, tmp_path / "whole")
    for looks in (1, 2):
        with pytest.raises(Interrupted):
            do(recipe, tmp_path / "run", resume=True, interrupt=StopAt(looks))
    do(recipe, tmp_path / "run", resume=True)
    assert_same(weights(tmp_path / "run/student"), weights(tmp_path / "whole/student"))
    steps = [
        [(x["stage"], x["step"], x["losses"]) for x in map(json.loads, path.open())]
        for path in (tmp_path / "run/metrics.jsonl", tmp_path / "whole/metrics.jsonl")
    ]
    assert steps[0] == steps[1]


def test_dry_run_writes_nothing(capsys, tmp_path, teacher, corpus_dir):
    status, out, err = command(capsys, tmp_path, teacher, corpus_dir, "--dry-run")
    assert status == 0, err
    for part in ("align: 3 steps of 192 tokens", "frozen", "memory", "nats a word"):
        assert part in out
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_written_over(capsys, tmp_path, teacher, corpus_dir):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text("")
    status, _, err = command(capsys, tmp_path, teacher, corpus_dir)
    assert status == 1 and "holds a run; pass --resume" in err
