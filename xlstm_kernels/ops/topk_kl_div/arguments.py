"""What a loss asks of a teacher that is known by its likeliest words."""

from __future__ import annotations

from torch import Tensor

from ..kl_div.rows import check_beside, check_is_integers, check_logits, readable
from .support import OPEN, SUPPORTS, WITH_TAIL


def check_support(
    function: str, support: str, tail_logmass: Tensor | None, divergence: str
) -> None:
    if support not in SUPPORTS:
        known = ", ".join(repr(name) for name in SUPPORTS)
        raise ValueError(f"{function}: support must be one of {known}, got {support!r}")
    if tail_logmass is not None and support not in WITH_TAIL:
        raise ValueError(
            f"{function}: tail_logmass must be None for support {support!r}, which has no tail"
        )
    if support == "truncated" and divergence != "forward":
        raise ValueError(
            f"{function}: divergence must be 'forward' for support 'truncated', whose p are no"
            f" distribution, got {divergence!r}"
        )
    if support in OPEN and divergence == "reverse":
        raise ValueError(
            f"{function}: divergence 'reverse' is infinite for support {support!r}, where the"
            " student has mass outside; use 'tail' or 'both'"
        )


def check_target(
    function: str,
    student: Tensor,
    topk_logprobs: Tensor,
    topk_ids: Tensor,
    tail_logmass: Tensor | None,
    whose: str = "student_logits'",
) -> None:
    """Beside the rows of `student`."""
    check_logits(function, "topk_logprobs", topk_logprobs, width="K")
    check_beside(function, "topk_logprobs", topk_logprobs, student, False, whose)
    check_is_integers(function, "topk_ids", topk_ids)
    check_beside(function, "topk_ids", topk_ids, student, False, whose)
    if topk_ids.shape != topk_logprobs.shape:
        raise ValueError(
            f"{function}: topk_ids must have the shape of topk_logprobs"
            f" {tuple(topk_logprobs.shape)}, got {tuple(topk_ids.shape)}"
        )
    if tail_logmass is not None:
        check_logits(function, "tail_logmass", tail_logmass, width="")
        check_beside(function, "tail_logmass", tail_logmass, student, whose=whose)


def check_ids(function: str, ids: Tensor, V: int) -> None:
    outside = (ids < -1) | (ids >= V)
    if readable(ids) and bool(outside.any()):
        at = int(outside.flatten().nonzero()[0])
        raise ValueError(
            f"{function}: topk_ids must be in [0, {V}) or -1 for none,"
            f" got {int(ids.flatten()[at])} at row {at // ids.shape[-1]}"
        )
