"""The documents of a file: a text file is one; JSON Lines and Parquet have one a line, or row."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.errors import DistillError

LINES = (".jsonl", ".jsonl.gz")
PARQUET = ".parquet"
PARQUET_ROWS = 1024  # in memory at a time


@dataclass(frozen=True)
class Document:
    """Its text, byte for byte, and its path relative to the corpus, as notes/a.txt or
    notes/all.jsonl:17, the line or row from 1."""

    path: str
    text: bytes


def documents_of(file: Path, path: str, text_key: str) -> Iterator[Document]:
    """Those of a file that are not empty, in order.

    Raises:
        DistillError: it cannot be read, is not what its name says, or has something else than text
            at `text_key`; the message names file and line.
    """
    try:
        if path.endswith(LINES):
            yield from _lines(file, path, text_key)
        elif path.endswith(PARQUET):
            yield from _rows(file, path, text_key)
        else:
            text = file.read_bytes()
            text.decode("utf-8")
            if text:
                yield Document(path, text)
    except UnicodeDecodeError as error:
        raise DistillError(f"corpus: {file} is not UTF-8 text: {error.reason}") from error
    except (EOFError, zlib.error) as error:
        raise DistillError(f"corpus: {file} is damaged: {error}") from error
    except OSError as error:
        raise DistillError(f"corpus: cannot read {file}: {error.strerror or error}") from error


def _lines(file: Path, path: str, text_key: str) -> Iterator[Document]:
    with gzip.open(file) if path.endswith(".gz") else file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DistillError(f"corpus: {file}:{number} is not JSON: {error}") from error
            if not isinstance(row, dict) or text_key not in row:
                has = f"keys {', '.join(row)}" if isinstance(row, dict) else type(row).__name__
                raise DistillError(
                    f"corpus: {file}:{number} must be an object with {text_key!r}, got {has};"
                    " text_key is the name of what has the text"
                )
            if text := _bytes(row[text_key], f"{file}:{number}", text_key):
                yield Document(f"{path}:{number}", text)


def _rows(file: Path, path: str, text_key: str) -> Iterator[Document]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise DistillError(
            f"corpus: {file} is Parquet, which pyarrow reads: pip install '.[parquet]'"
        ) from error
    try:
        with ParquetFile(file) as table:
            names = table.schema_arrow.names
            if text_key not in names:
                raise DistillError(
                    f"corpus: {file} must have a column {text_key!r}, got {', '.join(names)};"
                    " text_key is the name of what has the text"
                )
            number = 0
            for batch in table.iter_batches(PARQUET_ROWS, columns=[text_key]):
                for value in batch.column(0).to_pylist():
                    number += 1
                    if text := _bytes(value, f"{file}:{number}", text_key):
                        yield Document(f"{path}:{number}", text)
    except ArrowException as error:
        raise DistillError(f"corpus: {file} is damaged: {error}") from error


def _bytes(text: Any, where: str, text_key: str) -> bytes:
    if not isinstance(text, str):
        raise DistillError(f"corpus: {where}: {text_key!r} must be text, got {type(text).__name__}")
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise DistillError(f"corpus: {where}: {text_key!r} is not text: {error.reason}") from error
