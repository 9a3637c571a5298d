"""The demo: what it trains, what it finds again, and what its page says."""

import copy
import html
import io
import json
import os
import re
import shutil
import signal

import pytest
from rich.console import Console
from safetensors.torch import load_file

from distill.data.rows import byte_tokenizer
from distill.data.tokens import Tokens
from distill.demo.report import publish, render, sentences, summary
from distill.demo.results import judge, measure
from distill.demo.run import PARTS
from distill.demo.speed import Parity
from distill.errors import DistillError, Interrupted
from distill.training.trainer import Stage

# One of them is trained for all.
pytestmark = [pytest.mark.xdist_group("demo"), pytest.mark.medium]


@pytest.fixture(scope="session")
def finished(make_demo, tmp_path_factory):
    """Folder and metrics of a whole demo."""
    folder = tmp_path_factory.mktemp("demo")
    metrics = json.loads(json.dumps(measure(make_demo(folder))))
    return folder, metrics


@pytest.fixture
def metrics(finished):
    return copy.deepcopy(finished[1])


def weights(folder):
    return {
        path.parent.parent.name: load_file(path)
        for path in sorted(folder.glob("*/student/model.safetensors"))
    }


def test_bytes_are_the_tokens(corpus_dir, make_demo, tmp_path):
    documents = make_demo(tmp_path).corpus.train
    tokenizer = byte_tokenizer()
    slow, fast = Tokens.of(documents, tokenizer), Tokens.of_bytes(documents, tokenizer.eos_token_id)
    assert slow.digest() == fast.digest() and slow.names == fast.names


def test_each_part_has_each_seed_and_they_differ(finished, metrics):
    found = weights(finished[0])
    assert len(found) == 1 + 2 * 3 + 1  # the teacher is trained on once
    for part in ("hybrid", "small", "small-labels"):
        one, two = found[f"{part}-1"], found[f"{part}-2"]
        assert any(not one[name].equal(two[name]) for name in one)
    assert list(metrics["parts"]) == ["teacher", *PARTS]
    sizes = {part: models[0]["parameters"] for part, models in metrics["parts"].items()}
    assert sizes["small"] == sizes["small, labels"] < 0.8 * sizes["teacher"]
    assert sizes["hybrid"] > sizes["teacher"] == sizes["teacher on"]


def test_publishes_table_page_and_numbers(metrics, tmp_path):
    output = io.StringIO()
    publish(metrics, tmp_path, Console(file=output, width=160))
    for row in summary(metrics)[1]:
        assert all(cell in output.getvalue() for cell in row)
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    text = html.unescape((tmp_path / "report.html").read_text())
    for sentence in sentences(metrics):
        assert sentence in text and sentence in output.getvalue()
    for sample in metrics["samples"]:
        assert all(sample[part] in text for part in metrics["parts"])


def test_page_is_self_contained(metrics):
    text = render(metrics)
    assert not re.search(r"<(script|link|img|iframe)\b", text)
    assert re.findall(r"""(?:src|href)=["'](?!#|data:)([^"']+)""", text) == []
    ids = re.findall(r'<(?:clipPath|path|g|use)[^>]* id="([^"]+)"', text)
    references = re.findall(r'(?:href="#|url\(#)([^")]+)', text)
    assert set(references) <= set(ids)


def test_text_of_the_models_cannot_break_the_page(metrics):
    metrics["samples"][0]["hybrid"] = "</pre><script>alert(1)</script>"
    assert "<script>" not in render(metrics)


def test_verdict_goes_whichever_way_the_numbers_do(metrics):
    parts = metrics["parts"]
    for own, control, gain in zip(
        parts["small"], parts["small, labels"], (0.25, -0.5), strict=True
    ):
        control["bits_per_byte"] = own["bits_per_byte"] + gain
    for model in parts["hybrid"]:
        model["bits_per_byte"] = 1.02 * parts["teacher"][0]["bits_per_byte"]
    verdict = judge(metrics)
    assert verdict.gains == pytest.approx((0.25, -0.5)) and verdict.better == 1
    assert verdict.change == pytest.approx(0.02)
    said = " ".join(sentences(metrics))
    assert "2.0% more bits per byte" in said and "in 1 of 2 seeds" in said


def test_a_folder_that_is_no_demos_stays(make_demo, tmp_path):
    mine = tmp_path / "hybrid-1" / "recipe.yaml"
    mine.parent.mkdir()
    mine.write_text("mine")
    with pytest.raises(DistillError, match=r"hybrid-1 is no demo's; pass another --run-dir"):
        make_demo(tmp_path).run()
    assert mine.read_text() == "mine" and [p.name for p in tmp_path.iterdir()] == ["hybrid-1"]


@pytest.mark.slow
def test_a_finished_teacher_is_used_again_and_the_rest_is_not(finished, make_demo, tmp_path):
    folder = tmp_path / "again"
    shutil.copytree(finished[0], folder)
    before = (folder / "hybrid-1" / "recipe.yaml").read_text()
    recipe = before.replace(str(finished[0]), str(folder))
    for path in folder.glob("*/recipe.yaml"):
        path.write_text(path.read_text().replace(str(finished[0]), str(folder)))
    demo = make_demo(folder)
    demo.run()
    said = demo.output.getvalue()
    assert "teacher: trained before" in said and "hybrid 1: trained before" not in said
    assert (folder / "hybrid-1" / "recipe.yaml").read_text() == recipe
    want, got = weights(finished[0]), weights(folder)
    assert all(got[run][name].equal(x) for run in want for name, x in want[run].items())
    with pytest.raises(DistillError, match=r"hybrid 1: .* trained otherwise .*window"):
        make_demo(folder, resume=True, window=8).run()


@pytest.mark.slow
def test_an_interrupted_demo_goes_on_to_the_same_weights(
    finished, make_demo, tmp_path, monkeypatch
):
    original, count = Stage._train_step, 0

    def step(self):
        nonlocal count
        count += 1
        if count == 6:  # within the hybrid's second stage
            os.kill(os.getpid(), signal.SIGINT)
        return original(self)

    monkeypatch.setattr(Stage, "_train_step", step)
    demo = make_demo(tmp_path)
    with pytest.raises(Interrupted), demo.interrupt:
        demo.run()
    assert not (tmp_path / "hybrid-1" / "student").exists()
    make_demo(tmp_path, resume=True).run()
    want, got = weights(finished[0]), weights(tmp_path)
    assert want.keys() == got.keys()
    assert all(got[run][name].equal(x) for run in want for name, x in want[run].items())


@pytest.mark.slow
def test_kernels_that_are_wrong_are_not_timed(make_demo, finished, monkeypatch):
    monkeypatch.setattr("distill.demo.speed.parity", lambda *call: Parity(1e-3, 1e-6))
    demo = make_demo(finished[0], resume=True)
    with pytest.raises(DistillError, match=r"must agree.*off by 1\.0e-03, allowed 1\.0e-06"):
        measure(demo)
