"""The page says what the metrics say, and needs nothing but itself."""

import copy
import html
import json
import re

import pytest

from distill.demo.report import ROWS, quality_sentence, render
from distill.demo.results import judge


@pytest.fixture(scope="module")
def metrics_cache():
    return {}


@pytest.fixture
def metrics(metrics_cache, make_demo, tmp_path):
    if not metrics_cache:
        metrics_cache.update(json.loads(json.dumps(make_demo(tmp_path).run())))
    return copy.deepcopy(metrics_cache)


def test_page_contains_the_numbers(metrics):
    page = html.unescape(render(metrics))
    for model in metrics["models"].values():
        for title, cell in ROWS:
            assert title in page
            assert cell(model) in page
    assert f"{metrics['speed']['ours']['tokens_per_s']:,.0f}" in page
    assert metrics["machine"]["torch"] in page
    for sample in metrics["samples"]:
        assert sample["student"] in page


def test_page_is_self_contained(metrics):
    page = render(metrics)
    assert not re.search(r"<(script|link|img|iframe)\b", page)
    outside = re.findall(r"""(?:src|href)=["'](?!#)([^"']+)""", page)
    assert outside == []
    assert "@import" not in page and "url(http" not in page
    assert page.count("<svg") == 4
    ids = re.findall(r'<(?:clipPath|path|g|use)[^>]* id="([^"]+)"', page)
    references = re.findall(r'(?:href="#|url\(#)([^")]+)', page)
    assert set(references) <= set(ids)


def test_ink_follows_the_page(metrics):
    page = render(metrics)
    assert "prefers-color-scheme: dark" in page
    assert "currentColor" in page
    assert "#010203" not in page


def test_text_of_the_models_cannot_break_the_page(metrics):
    metrics["samples"][0]["student"] = "</pre><script>alert(1)</script>"
    assert "<script>" not in render(metrics)


def test_page_depends_on_the_metrics_alone(metrics):
    assert render(metrics) == render(copy.deepcopy(metrics))


def test_gain_of_each_file_is_in_the_verdict(metrics):
    for file in metrics["files"]:
        file["control"] = file["student"] + 0.25
    metrics["models"]["control"]["bits_per_byte"] = (
        metrics["models"]["student"]["bits_per_byte"] + 0.25
    )
    verdict = judge(metrics)
    assert verdict.files_better == verdict.files == len(metrics["files"])
    assert verdict.gain == pytest.approx(0.25)
    assert verdict.low == pytest.approx(0.25) and verdict.high == pytest.approx(0.25)


def test_a_worse_student_is_called_worse(metrics):
    models = metrics["models"]
    models["control"]["bits_per_byte"] = models["student"]["bits_per_byte"] - 0.1
    assert "0.100 bits per byte worse than its control" in quality_sentence(judge(metrics))
    assert "-0.100" in render(metrics)


def test_metrics_agree_with_themselves(metrics):
    heldout_bytes = metrics["corpus"]["heldout_bytes"]
    assert heldout_bytes == sum(file["bytes"] for file in metrics["files"])
    for name, model in metrics["models"].items():
        whole = sum(file[name] * file["bytes"] for file in metrics["files"]) / heldout_bytes
        assert whole == pytest.approx(model["bits_per_byte"])
        assert model["train_tokens"] == model["steps"] * 4 * 16
        assert metrics["curves"][name][-1]["step"] == model["steps"]
    assert metrics["models"]["teacher"]["agreement"] == 1.0
    assert (
        metrics["models"]["student"]["parameters"]
        <= 0.4 * (metrics["models"]["teacher"]["parameters"])
    )
    assert metrics["speed"]["parity"]["error"] <= metrics["speed"]["parity"]["budget"]
