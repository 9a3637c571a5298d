"""Schemas and backends of divergences from a teacher of few words."""

from __future__ import annotations

from ...backends import Backend, Op
from ..kl_div.op import define_row_loss
from . import cpu, cuda, triton

TOPK_KL_DIV = Op("topk_kl_div", {Backend.CPU: cpu, Backend.CUDA: cuda, Backend.TRITON: triton})

forward, overwrite, forward_by = define_row_loss(
    TOPK_KL_DIV, "Tensor topk_logprobs, Tensor topk_ids, Tensor? tail_logmass", " str support,"
)
