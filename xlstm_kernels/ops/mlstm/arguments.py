"""What `xk.mlstm` and `xk.mlstm_step` ask of the arguments that they share."""

from __future__ import annotations

from torch import Tensor

from ...arguments import check_is_integer, check_is_number, check_tensor
from ...cells import MLSTMState
from ...cells.mlstm import INPUT_GATES, NORMALIZERS, Options

Shape = tuple[int, ...]


def check_options(
    function: str, input_gate: str, normalizer: str, chunk_size: int | None = None
) -> None:
    for name, value, known in (
        ("input_gate", input_gate, INPUT_GATES),
        ("normalizer", normalizer, NORMALIZERS),
    ):
        if value not in known:
            names = " or ".join(map(repr, known))
            raise ValueError(f"{function}: {name} must be {names}, got {value!r}")
    if chunk_size is not None:
        check_is_integer(function, "chunk_size", chunk_size)
        if chunk_size < 1:
            raise ValueError(f"{function}: chunk_size must be at least 1 or None, got {chunk_size}")


def make_options(
    function: str,
    K: int,
    input_gate: str,
    normalizer: str,
    scale: float | None,
    eps: float,
    chunk_size: int | None = None,
) -> Options:
    check_options(function, input_gate, normalizer, chunk_size)
    check_is_number(function, "eps", eps)
    if scale is not None:
        check_is_number(function, "scale", scale)
    if not eps >= 0:
        raise ValueError(f"{function}: eps must be a number >= 0, got {eps}")
    return Options(input_gate, normalizer, K**-0.5 if scale is None else float(scale), float(eps))


def check_state(
    function: str,
    state: tuple[Tensor, ...],
    sizes: tuple[Shape, Shape, Shape],
    first: tuple[str, Tensor],
    rows: str = "B",
) -> None:
    if not isinstance(state, (tuple, list)):
        raise TypeError(f"{function}: state must be (c, n, m), got {type(state).__name__}")
    if len(state) != 3:
        raise ValueError(f"{function}: state must be (c, n, m), got {len(state)} tensors")
    axes = (f"({rows}, H, K, V)", f"({rows}, H, K)", f"({rows}, H)")
    for field, part, letters, size in zip(MLSTMState._fields, state, axes, sizes, strict=True):
        check_tensor(function, f"state.{field}", part, letters, size, first)
