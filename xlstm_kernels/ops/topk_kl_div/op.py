"""Schemas, fakes and backends of divergences from a teacher of few words."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...backends import Backend, Op
from ...cells import compute_dtype
from ...library import define
from ..kl_div.options import SCHEMA
from . import cpu

TOPK_KL_DIV = Op("topk_kl_div", {Backend.CPU: cpu})

_ARGUMENTS = (
    " Tensor topk_logprobs, Tensor topk_ids, Tensor? tail_logmass, Tensor? labels,"
    f" Tensor? row_weight, {SCHEMA}, str support,"
)


def _fake_loss(student: Tensor, reduction: str) -> Tensor:
    shape = student.shape[:-1] if reduction == "none" else ()
    return student.new_empty(shape, dtype=compute_dtype(student.dtype))


def _fake_forward(student: Tensor, *call: Any) -> list[Tensor]:
    *_, reduction, _, want_grad, _ = call
    loss = _fake_loss(student, reduction)
    return [loss, student.new_empty(student.shape)] if want_grad else [loss]


def _fake_overwrite(student: Tensor, *call: Any) -> Tensor:
    *_, reduction, _, _ = call
    return _fake_loss(student, reduction)


# As those of kl_div.
forward = define(
    TOPK_KL_DIV,
    f"topk_kl_div_forward(Tensor student,{_ARGUMENTS} bool want_grad, str backend) -> Tensor[]",
    _fake_forward,
)
overwrite = define(
    TOPK_KL_DIV,
    f"topk_kl_div_overwrite(Tensor(a!) student,{_ARGUMENTS} str backend) -> Tensor",
    _fake_overwrite,
)
