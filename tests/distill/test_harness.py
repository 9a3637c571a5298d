"""Tasks of lm-eval-harness on tiny models, from files."""

import json
import sys

import pytest
from hybrid_cases import hybrid, save_teacher, transformers

from distill.__main__ import main
from distill.errors import DistillError
from distill.evaluation.harness import harness_tasks

CHOICE = """\
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
doc_to_choice: ["yes", "no"]
metric_list:
- {{metric: acc, aggregation: mean, higher_is_better: true}}
"""
WRITE = """\
task: tiny_write
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 3, do_sample: false}}
metric_list:
- {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""


@pytest.mark.slow
def test_tasks_of_a_folder(tmp_path, corpus_dir, monkeypatch):
    pytest.importorskip("lm_eval", reason="lm_eval is not installed")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    save_teacher(tmp_path / "teacher", corpus_dir)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "teacher")
    teacher = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "teacher")
    data = tmp_path / "data.jsonl"
    lines = [{"question": f"is {n} more?", "answer": n % 2} for n in range(4)]
    data.write_text("\n".join(map(json.dumps, lines)))
    for name, text in (("choice", CHOICE), ("write", WRITE)):
        (tmp_path / f"{name}.yaml").write_text(text.format(data=data))
    models = {"teacher": teacher, "student": hybrid.hybridize(teacher, window=8)}
    found = harness_tasks(models, tokenizer, ["tiny_choice", "tiny_write"], folder=tmp_path)
    kinds = {task["name"]: task["kind"] for task in found}
    assert kinds == {"tiny_choice": "text", "tiny_write": "generation"}
    assert all(task["scores"].keys() == models.keys() for task in found)
    assert all(0 <= score <= 1 for task in found for score in task["scores"].values())


def test_without_the_harness(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(DistillError, match=r"harness: lm_eval must be installed .*pip install"):
        harness_tasks({}, None, ["gsm8k"])
    assert main(["eval", "--out", "nowhere", "--harness", "gsm8k"]) == 1  # before anything is read
    assert "lm_eval must be installed" in capsys.readouterr().err
