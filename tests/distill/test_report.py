"""From models and a run's folder to the page: what it says is what was measured."""

import html
import json
import math
import re
import shutil

import pytest
import torch
from hybrid_cases import hybrid, make_teacher, save_teacher, stir, tokens, transformers

from distill.__main__ import main
from distill.data.corpus import read_documents
from distill.errors import DistillError
from distill.evaluation.assessment import Plan, assess
from distill.evaluation.bench import bench, crossover
from distill.evaluation.probes import QUESTION, mean_gates, needle
from distill.report.document import comparisons, render_markdown, write_report
from distill.report.run_folder import RunFolder

METRICS = [
    {"stage": "align", "step": s, "tokens": 100 * s, "loss": 2.0 / s, "losses": {"mixer": 2.0 / s}}
    for s in (1, 2, 3)
]
METRICS += [
    {"stage": "kd", "step": s, "tokens": 100 * s, "loss": 1.0, "losses": {"ce": 3.0, "kl": 0.5 / s}}
    for s in (1, 2)
]
METRICS += [
    {"stage": "kd", "step": 2, "tokens": 200, "heldout": {"bits_per_byte": 4.5, "agreement": 0.8}}
]


@pytest.fixture(scope="module")
def scores(corpus_dir):
    teacher = make_teacher(vocab_size=256)
    student = stir(hybrid.hybridize(teacher, window=16))
    models = {"teacher": teacher, "student": student, "<i>control": make_teacher(vocab_size=256)}
    plan = Plan(length=64, needle_lengths=(128,), contexts=(16, 32))
    return assess(models, None, read_documents(corpus_dir)[:5], plan)


@pytest.fixture
def run_dir(tmp_path, scores):
    (tmp_path / "controls" / "hard labels").mkdir(parents=True)
    for folder in (tmp_path, tmp_path / "controls" / "hard labels"):
        text = "\n".join(json.dumps(line) for line in METRICS) + "\n"
        (folder / "metrics.jsonl").write_text(text)
    (tmp_path / "scores.json").write_text(json.dumps(scores))
    (tmp_path / "recipe.yaml").write_text("stages:\n- name: <kd>\n")
    (tmp_path / "environment.json").write_text('{"torch": "2.13", "git": {"dirty": false}}')
    return tmp_path


def test_the_page_says_what_was_measured(run_dir, scores):
    write_report(run_dir)
    page, markdown = ((run_dir / f"report.{kind}").read_text() for kind in ("html", "md"))
    for text in (html.unescape(page), markdown):
        for model in scores["models"].values():
            assert f"{model['bits_per_byte']:.3f}" in text
            assert f"{model['agreement']:.1%}" in text
            assert f"{model['parameters']:,}" in text
        found = comparisons(scores)
        assert found.keys() == {"all tasks"} or found.keys() == {"all tasks", "generation alone"}
        for each in found.values():
            assert f"{each.alpha_star:.3f}" in text
            assert each.worst(1)[0] in text
        assert "2.13" in text and "name: <kd>" in text
        assert "tokens of context" in text or "at any of the contexts" in text
    assert not re.search(r"<(script|link|img|iframe|i>)", page)
    assert re.findall(r"""(?:src|href)=["'](?!#|data:)([^"']+)""", page) == []
    assert page.count("<svg") == 4 + 3 + 3
    ids = re.findall(r'<(?:clipPath|path|g|use|image)[^>]* id="([^"]+)"', page)
    assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', page)) <= set(ids)


def test_several_seeds(run_dir, scores):
    seeds = [{"student": 2.5, "hard labels": 2.625}, {"student": 2.75, "hard labels": 2.6875}]
    (run_dir / "scores.json").write_text(json.dumps(scores | {"seeds": seeds}))
    text = render_markdown(RunFolder.read(run_dir))
    assert "The student is better than 'hard labels' in 1 of 2 seeds." in text
    assert "| 2. | 2.750 | 2.688 |" in text


def test_what_is_not_there_is_left_out(run_dir, scores):
    (run_dir / "metrics.jsonl").unlink()
    fewer = scores | {"tasks": [], "needle": {}, "gates": {}, "bench": None}
    (run_dir / "scores.json").write_text(json.dumps(fewer))
    write_report(run_dir)
    assert (run_dir / "report.html").read_text().count("<svg") == 0
    (run_dir / "scores.json").unlink()
    with pytest.raises(DistillError, match=r"must have metrics\.jsonl or scores\.json"):
        write_report(run_dir)
    (run_dir / "metrics.jsonl").write_text(json.dumps(METRICS[0]) + "\n")
    write_report(run_dir)
    assert (run_dir / "report.html").read_text().count("<svg") == 1


def test_lines_of_a_run_that_was_stopped(run_dir):
    again = {"stage": "kd", "step": 2, "tokens": 200, "loss": 9.0}
    path = run_dir / "metrics.jsonl"
    more = [json.dumps(x) for x in (again, again | {"step": 3, "loss": math.nan})]
    path.write_text(path.read_text() + "\n".join(more) + '\n{"stage": "kd", "st')
    curve = RunFolder.read(run_dir).curve("loss")
    assert curve.tokens == [100, 200, 300, 400, 500]
    assert curve.values[-1] == 9.0
    whole = path.read_text()
    for line in ("{", "[]", '{"tokens": "x"}'):
        path.write_text(f"{line}\n{whole}")
        with pytest.raises(DistillError, match=r"metrics\.jsonl is damaged in line 1"):
            write_report(run_dir)


def test_scores_are_of_every_model(scores):
    assert scores["models"]["teacher"]["agreement"] == 1.0
    assert scores["models"]["<i>control"]["agreement"] == 1.0
    assert scores["models"]["student"]["parameters"] > scores["models"]["teacher"]["parameters"]
    kinds = [task["kind"] for task in scores["tasks"]]
    assert kinds.count("generation") == 1 and kinds.count("text") > 1
    assert scores["gates"].keys() == {0, 1, 2}
    assert all(len(heads) == 4 and min(heads) > 0 for heads in scores["gates"].values())
    student = scores["bench"]["models"]["student"]
    assert student[0]["cache_bytes"] == student[1]["cache_bytes"]
    teacher = scores["bench"]["models"]["teacher"]
    assert teacher[1]["cache_bytes"] == 2 * teacher[0]["cache_bytes"]
    with pytest.raises(DistillError, match="models must be a teacher and a student, got 1"):
        assess({"teacher": None}, None, [])


def test_gates_are_the_mixers(tmp_path):
    student = stir(hybrid.hybridize(make_teacher(), window=4, layers=[1], output_gate="bias"))
    bias = student.model.layers[1].self_attn.mixer.output_bias
    found = mean_gates(student, tokens(9))
    assert found.keys() == {1}
    assert torch.allclose(torch.tensor(found[1]), bias.sigmoid(), atol=1e-6)
    assert mean_gates(make_teacher(), tokens(9)) == {}


class Reader(torch.nn.Module):
    """Finds the number when it stands among the last `memory` tokens: ids are bytes."""

    def __init__(self, memory):
        super().__init__()
        self.memory, self.base_model, self.device = memory, self.read, torch.device("cpu")

    def get_output_embeddings(self):
        return torch.nn.Identity()

    def read(self, ids_1T, use_cache):
        text = bytes(ids_1T[0, -self.memory :].tolist()).decode()
        found = re.search(r"pass key is( \d{5})\. Remember", text)
        answer = (found[1] if found else " 00000").encode()
        given = bytes(ids_1T[0].tolist()).rpartition(QUESTION.encode())[2]
        top = torch.zeros(1, ids_1T.shape[1], dtype=torch.int64)
        top[0, -len(answer) :] = torch.tensor(list(answer))
        assert given == answer[: len(given)] or not found
        return (torch.nn.functional.one_hot(top, 256),)


def test_needles_are_found_as_far_as_a_model_remembers():
    assert needle(Reader(4000), None, [200, 1000]) == {200: 1.0, 1000: 1.0}
    near = needle(Reader(300), None, [200, 1000], depths=5)
    assert near == {200: 1.0, 1000: 0.4}
    with pytest.raises(DistillError, match="lengths must be at least"):
        needle(Reader(9), None, [20])


def test_crossover():
    def rows(*decode_ms):
        return [{"context": 4**at, "decode_ms": ms} for at, ms in enumerate(decode_ms)]

    assert crossover(rows(1, 2, 3, 4), rows(2, 2, 2, 2)) == 16
    assert crossover(rows(1, 2, 1, 4), rows(0.5, 1, 2, 2)) == 64
    assert crossover(rows(1, 2), rows(2, 3)) is None
    assert crossover(rows(1, 2), rows(0, 1)) == 1
    with pytest.raises(DistillError, match=r"contexts must be at least 1, got \[\]"):
        bench({}, [])


@pytest.mark.slow
def test_the_commands(tmp_path, capsys, corpus_dir):
    teacher = save_teacher(tmp_path / "teacher", corpus_dir)
    model = transformers.AutoModelForCausalLM.from_pretrained(teacher)
    student = hybrid.hybridize(model, window=16)
    transformers.AutoTokenizer.from_pretrained(teacher).save_pretrained(tmp_path / "student")
    student.save_pretrained(tmp_path / "student")
    pair = ["--teacher", str(teacher), "--student", str(tmp_path / "student")]
    text = ["--corpus", str(corpus_dir), "--pattern", "*.py", "--out", str(tmp_path / "run")]
    more = ["--all-files", "--length", "64", "--control", f"hard labels={teacher}"]
    assert main(["eval", *pair, *text, *more]) == 0
    assert "Control 'hard labels' takes" in capsys.readouterr().out
    assert main(["report", str(tmp_path / "run")]) == 0
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        "report.html",
        "report.md",
        "scores.json",
    ]
    recipe = f"teacher: {{path: {teacher}}}\ndata: {{corpus: {corpus_dir}, pattern: '*.py'}}\n"
    recipe += "stages: [{name: kd, losses: [{name: ce}], steps: 1}]\n"
    (tmp_path / "recipe.yaml").write_text(recipe)
    shutil.copytree(tmp_path / "student", tmp_path / "controls" / "twin" / "student")
    given = ["eval", "--out", str(tmp_path), "--length", "64", "--control", f"labels={teacher}"]
    assert main(given) == 0
    said = capsys.readouterr().out
    assert "Control 'twin' takes" in said and "Control 'labels' takes" in said
    file = tmp_path / "speed.json"
    capsys.readouterr()
    assert main(["bench", *pair, "--contexts", "32,8", "--steps", "2", "--json", str(file)]) == 0
    assert "context" in capsys.readouterr().out
    assert main(["bench", *pair, "--device", "nothing"]) == 1
    assert "--device: cannot use 'nothing'" in capsys.readouterr().err
    assert [row["context"] for row in json.loads(file.read_text())["models"]["student"]] == [8, 32]
    assert main(["eval", *pair, "--out", str(tmp_path / "none")]) == 1
    assert "--corpus: must be given" in capsys.readouterr().err
    assert main(["eval", *pair, *text, "--control", "x"]) == 1
    assert "--control: must be NAME=DIR" in capsys.readouterr().err
