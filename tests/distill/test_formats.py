"""Documents in lines and rows: all of them, in order, and what is none is named by its place."""

import builtins
import gzip
import json
import re
import sys

import pytest

from distill.data.corpus import load_corpus, read_documents
from distill.errors import DistillError

ROWS = [{"text": f"größe {n}\n" * (1 + n % 3), "id": n} for n in range(30)]
LINES = "\n\n".join(json.dumps(row, ensure_ascii=bool(row["id"] % 2)) for row in ROWS).encode()


def write_parquet(path, rows=ROWS, group=7):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed: the extra `parquet`")
    from pyarrow.parquet import write_table

    write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=group)


def written(path, rows=ROWS):
    """A file of rows, by its name."""
    if path.suffix == ".parquet":
        write_parquet(path, rows)
    else:
        data = "\n\n".join(map(json.dumps, rows)).encode()
        path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


names = pytest.mark.parametrize("name", ["all.jsonl", "all.jsonl.gz", "all.parquet"])


@names
def test_lines_and_rows_are_documents(tmp_path, name):
    path = written(tmp_path / name, [*ROWS, {"text": "", "id": 30}])
    found = read_documents(tmp_path, f"*{path.suffix}")
    step = 1 if path.suffix == ".parquet" else 2  # lines between are blank
    assert [d.path for d in found] == [f"{name}:{1 + step * n}" for n in range(30)]
    assert [d.text.decode() for d in found] == [row["text"] for row in ROWS]
    assert read_documents(path) == found  # the file itself
    corpus = load_corpus(tmp_path, f"*{path.suffix}", heldout_fraction=0.1)
    assert len(corpus.heldout) == 3 and {*corpus.train, *corpus.heldout} == {*found}


def test_text_beside_lines(tmp_path):
    """Of another key, and in one corpus with files of text."""
    (tmp_path / "pkg").mkdir()
    written(tmp_path / "pkg" / "b.jsonl", [{"body": "two", "text": 3}, {"body": "three"}])
    (tmp_path / "a.md").write_text("one")
    found = read_documents(tmp_path, "*", "body")
    assert [(d.path, d.text) for d in found] == [
        *(("a.md", b"one"), ("pkg/b.jsonl:1", b"two"), ("pkg/b.jsonl:3", b"three"))
    ]


GOOD = b'{"text": "a"}\n{"text": "b"}\n'


@pytest.mark.parametrize(
    ("name", "data", "why"),
    [
        ("a.jsonl", GOOD + b"{'text': 1}\n", "a.jsonl:3 is not JSON: Expecting property name"),
        ("a.jsonl", GOOD + b"\xff\xfe{\n", "a.jsonl:3 is not JSON"),
        ("a.jsonl", GOOD + b"[" * 100_000, "a.jsonl:3 is not JSON"),
        ("a.jsonl", GOOD + b'{"body": "a", "x": 1}', "a.jsonl:3 must be an object with 'text'"),
        ("a.jsonl", GOOD + b'["text"]', "an object with 'text', got list"),
        ("a.jsonl", GOOD + b'{"text": null}', "a.jsonl:3: 'text' must be text, got NoneType"),
        ("a.jsonl", GOOD + b'{"text": "\\ud800"}', "a.jsonl:3: 'text' is not text: surrogates"),
        ("a.jsonl.gz", gzip.compress(GOOD, mtime=0)[:-9], "a.jsonl.gz is damaged"),
        ("a.jsonl.gz", GOOD, "cannot read .*a.jsonl.gz: Not a gzipped file"),
        ("a.jsonl", b'{"text": ""}\n' + GOOD[:14], "at least 2 documents .* found 1"),
    ],
)
def test_what_is_no_document_is_named(tmp_path, name, data, why):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DistillError, match=why):
        load_corpus(tmp_path, "*.jsonl*")


def test_parquet_that_is_none(tmp_path):
    path = tmp_path / "a.parquet"
    write_parquet(path)
    with pytest.raises(DistillError, match="must have a column 'body', got text, id"):
        read_documents(tmp_path, "*.parquet", "body")
    with pytest.raises(DistillError, match=re.escape("a.parquet:1: 'id' must be text, got int")):
        read_documents(tmp_path, "*.parquet", "id")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DistillError, match=r"a\.parquet is damaged"):
        read_documents(tmp_path, "*.parquet")


def test_parquet_asks_for_what_reads_it(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").touch()
    for module in [name for name in sys.modules if name.partition(".")[0] == "pyarrow"]:
        monkeypatch.delitem(sys.modules, module)
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.partition(".")[0] == "pyarrow":
            raise ModuleNotFoundError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(DistillError, match=r"a.parquet is Parquet, .* install '.\[parquet\]'"):
        read_documents(tmp_path, "*.parquet")
