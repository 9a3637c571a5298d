"""Scores against sums taken a token at a time; recovery against the paper's tables."""

import math

import pytest
import torch
from hybrid_cases import hybrid, make_teacher, save_teacher, transformers

import distill
from distill.data.corpus import Document
from distill.errors import DistillError
from distill.evaluation.recovery import win_and_tie
from distill.evaluation.scores import evaluate

DOCUMENTS = [
    Document("pkg/a.py", bytes(range(5, 40))),
    Document("pkg/b.py", bytes(range(30, 41))),
    Document("top.py", bytes([7, 9, 7, 9, 8] * 3)),
    Document("other/one.py", b"\x04"),
]


@torch.no_grad()
def one_at_a_time(model, teacher, text, length, overlap):
    """nats, correct, agreed: each token from the context that its window gives."""
    nats, correct, agreed, begin, end = 0.0, 0, 0, 0, min(length, len(text) - 1)
    for at in range(1, len(text)):
        if at > end:
            begin, end = at - 1 - overlap, min(at - 1 - overlap + length, len(text) - 1)
        context = torch.tensor([list(text[begin:at])])
        logits, theirs = (m(context, use_cache=False).logits[0, -1] for m in (model, teacher))
        nats -= float(logits.log_softmax(-1)[text[at]])
        correct += int(logits.argmax() == text[at])
        agreed += int(logits.argmax() == theirs.argmax())
    return nats, correct, agreed


@pytest.mark.parametrize(("length", "overlap"), [(100, 0), (8, 3)])
def test_scores_are_sums_over_tokens(length, overlap):
    teacher = make_teacher().train()
    model = hybrid.hybridize(teacher, window=3, sinks=1)
    seen = []
    scores = evaluate(
        model,
        None,
        DOCUMENTS,
        teacher=teacher,
        length=length,
        rows=3,
        overlap=overlap,
        after_batch=lambda *done: seen.append(done),
    )
    assert seen[-1] == (34 + 10 + 14,) * 2
    assert scores.documents.keys() == {"pkg/a.py", "pkg/b.py", "top.py"}
    for document in DOCUMENTS[:3]:
        got = scores.documents[document.path]
        nats, correct, agreed = one_at_a_time(model, teacher, document.text, length, overlap)
        assert got.nats == pytest.approx(nats, rel=1e-4)
        assert (got.correct, got.agreed, got.tokens) == (correct, agreed, len(document.text) - 1)
    assert scores.groups.keys() == {"pkg"}
    assert scores.groups["pkg"].tokens == 44
    bits = sum(s.nats for s in scores.documents.values()) / math.log(2)
    assert scores.bits_per_byte == pytest.approx(bits / 58)
    assert (
        scores.as_dict()["documents"]["top.py"]["accuracy"] == scores.documents["top.py"].accuracy
    )
    assert teacher.training
    assert distill.evaluate is evaluate


def test_a_tokenizer_and_its_start_of_text(tmp_path, corpus_dir):
    save_teacher(tmp_path, corpus_dir)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    text = "def value_3(self, größe):\n    return self.3\n"
    document = Document("a.py", text.encode())
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        given = torch.tensor([[tokenizer.eos_token_id, *ids]])
        want = float(model(given, labels=given).loss) * len(ids)
    score = evaluate(model, tokenizer, [document]).total
    assert (score.tokens, score.n_bytes) == (len(ids), len(text.encode()))
    assert score.nats == pytest.approx(want, rel=1e-5)
    assert score.agreement is None
    tokenizer.eos_token = None
    without = evaluate(model, tokenizer, [document]).total
    first = len(tokenizer.decode(ids[:1]).encode())
    assert (without.tokens, without.n_bytes) == (len(ids) - 1, len(text.encode()) - first)


def test_what_cannot_be_scored():
    model = make_teacher()
    with pytest.raises(DistillError, match="documents must have at least two tokens"):
        evaluate(model, None, DOCUMENTS[3:])
    with pytest.raises(DistillError, match="length must be at most 16, the positions of the model"):
        evaluate(make_teacher("gpt2", max_position_embeddings=16), None, DOCUMENTS, length=17)
    with pytest.raises(DistillError, match="overlap must be at least 0 and below 4, got 4"):
        evaluate(model, None, DOCUMENTS, length=4, overlap=4)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(DistillError, match=r"must give finite logits, got none in pkg/a\.py"):
        evaluate(model, None, DOCUMENTS)


def test_win_and_tie():
    teacher = {"a": 0.5, "b": 0.8, "c": 0.4, "d": 0.0, "e": 1.0}
    student = {"a": 0.6, "b": 0.8, "c": 0.3, "d": 0.0, "e": 0.1}
    found = win_and_tie(student, teacher)
    assert found.alpha_star == 0
    assert [found.share(alpha) for alpha in (0, 0.24, 0.26, 1)] == [0.6, 0.6, 0.8, 1.0]
    assert found.worst(2) == ["e", "c"]
    assert found.recovery["a"] == pytest.approx(1.2)
    half = win_and_tie({"a": 0.45, "c": 0.2, "e": 1.0}, {"a": 0.5, "c": 0.4, "e": 1.0})
    assert half.alpha_star == pytest.approx(0.1) and half.share(half.alpha_star) > 0.5
    with pytest.raises(DistillError, match="same tasks, got b"):
        win_and_tie({"a": 1.0}, {"a": 1.0, "b": 1.0})
    with pytest.raises(DistillError, match=r"at least 0, got -1.0 and 0.5 for a"):
        win_and_tie({"a": -1.0}, {"a": 0.5})
    with pytest.raises(DistillError, match="same tasks, got none"):
        win_and_tie({}, {})
