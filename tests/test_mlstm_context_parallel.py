"""mlstm_context_parallel: one sequence over several processes is one pass over it in one."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
import torch.distributed as dist
from mlstm_cases import FLAGS, INPUTS, STATE, MLSTMCase, check_mlstm, mlstm_inputs
from ranks import run_on_ranks
from torch import Tensor

import xlstm_kernels as xk
from xlstm_kernels.testing import relative_error


@dataclass(frozen=True)
class Split:
    """A case, the tokens of each rank, and how much of the loss on the last state each has."""

    case: MLSTMCase
    lengths: tuple[int, ...]
    shares: tuple[float, ...]

    def part(self, rank: int) -> slice:
        begin = sum(self.lengths[:rank])
        return slice(begin, begin + self.lengths[rank])


def call(case: MLSTMCase, inputs: dict[str, Tensor]) -> tuple[Tensor, xk.MLSTMState]:
    state = tuple(inputs[f"{field}0"] for field in STATE if f"{field}0" in inputs)
    return xk.mlstm_context_parallel(
        *(inputs[name] for name in INPUTS),
        state or None,
        input_gate=case.input_gate,
        normalizer=case.normalizer,
        chunk_size=case.chunk_size,
        backend=case.backend,
    )


def run_splits(rank: int, splits: list[Split]) -> list[dict[str, Tensor]]:
    """On one rank, of each split: h of its tokens, the last state, and all gradients."""
    found = []
    for split in splits:
        inputs, part = mlstm_inputs(split.case), split.part(rank)
        leaves = {
            name: (x[:, part] if name in INPUTS else x).detach().requires_grad_()
            for name, x in inputs.items()
            if not name.startswith("weight_")
        }
        h, last = call(split.case, leaves)
        loss = (h * inputs["weight_h"][:, part]).sum(dtype=last.m.dtype)
        if split.shares[rank]:
            for field, state in last._asdict().items():
                loss = loss + split.shares[rank] * (state * inputs[f"weight_last_{field}"]).sum()
        loss.backward()
        results = {"h": h} | {f"last_{field}": state for field, state in last._asdict().items()}
        results |= {f"d_{name}": leaf.grad for name, leaf in leaves.items()}
        found.append({name: x.detach() for name, x in results.items() if x is not None})
    return found


def check_splits(*splits: Split) -> None:
    every = run_on_ranks(len(splits[0].lengths), run_splits, list(splits))
    for split, parts in zip(splits, zip(*every, strict=True), strict=True):
        whole = dict(parts[0])  # the initial state's gradients are the first rank's
        for name in ("h", *(f"d_{name}" for name in INPUTS)):
            whole[name] = torch.cat([part[name] for part in parts], dim=1)
        for part in parts[1:]:
            assert not {"d_c0", "d_n0", "d_m0"} & set(part)
            assert all(torch.equal(part[f"last_{f}"], whole[f"last_{f}"]) for f in STATE)
        check_mlstm(split.case, got=whole)


DOUBLE = MLSTMCase("cpu", dtype=torch.float64)
SINGLE = MLSTMCase("cpu")


@pytest.mark.medium
def test_two_ranks():
    check_splits(
        Split(DOUBLE, (41, 29), (0.0, 1.0)),
        Split(replace(SINGLE, state="zero"), (3, 67), (1.0, 0.0)),
        Split(replace(DOUBLE, input_gate="sigmoid", normalizer="none"), (70, 0), (0.25, 0.75)),
        Split(replace(SINGLE, dtype=torch.bfloat16), (30, 40), (0.0, 1.0)),
    )


LENGTHS = [(20, 0, 37, 13), (1, 63, 5, 1), (0, 0, 70, 0), (0, 0, 0, 70)]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_four_ranks(dtype):
    shares = (0.0, 0.5, 0.0, 0.5)
    cases = [MLSTMCase("cpu", dtype=dtype, **flags) for flags in FLAGS]
    splits = [Split(case, lengths, shares) for case in cases for lengths in LENGTHS]
    for case in cases:
        exp = case.input_gate == "exp"
        splits += [Split(replace(case, state=s), LENGTHS[0], shares) for s in ("zero", "large")]
        if not (exp and case.normalizer == "none"):  # exp(50) squared, and more
            splits.append(Split(replace(case, gates=50.0), LENGTHS[0], shares))
        if exp:  # else m becomes 0, and c and n change with it
            splits.append(Split(replace(case, T=0), (0, 0, 0, 0), shares))
    splits.append(Split(replace(cases[0], backend="reference"), LENGTHS[0], shares))
    check_splits(*splits)


def differentiate_little(rank: int) -> list[list[bool]]:
    """Backwards on every rank, of as little as possible on some; which inputs got a gradient."""
    inputs = mlstm_inputs(DOUBLE)
    plain = {name: inputs[name][:, 10 * rank : 10 * rank + 10] for name in INPUTS}
    plain |= {f"{field}0": inputs[f"{field}0"] for field in STATE}
    leaves = {name: x.detach().requires_grad_() for name, x in plain.items()}
    wanted = [leaves["q"], leaves["v"]] if rank else [leaves["q"]]
    found = []
    for output in (0, 1):
        h, last = call(DOUBLE, leaves)
        result = (h, last.c)[output].sum()
        grads = torch.autograd.grad(result, wanted, allow_unused=True)
        found.append([grad is not None and bool(grad.any()) for grad in grads])
    if rank == 0:  # the only input of any rank that requires a gradient
        plain["c0"] = leaves["c0"]
    h, last = call(DOUBLE, plain)
    (last.m if rank == 1 else h).sum().backward()
    return [*found, [leaves["c0"].grad is not None]]


def run_in_a_group(rank: int) -> tuple[Tensor, ...] | str:
    """h and the last state of ranks 1 and 2, who split the sequence; the error of rank 0."""
    group = dist.new_group([1, 2])
    inputs = mlstm_inputs(DOUBLE)
    part = [inputs[name].split([30, 40], dim=1)[max(rank - 1, 0)] for name in INPUTS]
    state = tuple(inputs[f"{field}0"] for field in STATE)
    try:
        h, last = xk.mlstm_context_parallel(*part, state, group=group)
    except RuntimeError as error:
        return str(error)
    return (h.detach(), *(x.detach() for x in last))


@pytest.mark.slow
def test_no_rank_waits_for_another_in_vain():
    """Each has its part of the backward, whatever it asks a gradient of."""
    first, *others = run_on_ranks(3, differentiate_little, timeout_s=60)
    assert first == [[True], [False], [True]]
    assert others == [[[True, True], [False, True], [False]]] * 2


@pytest.mark.slow
def test_a_group_of_some_ranks():
    outside, first, second = run_on_ranks(3, run_in_a_group, timeout_s=60)
    assert outside == (
        "mlstm_context_parallel: group must hold this rank, got a group without rank 0"
    )
    inputs = mlstm_inputs(DOUBLE)
    state = tuple(inputs[f"{field}0"] for field in STATE)
    h, last = xk.mlstm(*(inputs[name] for name in INPUTS), state)
    for got, want in zip(
        (torch.cat([first[0], second[0]], dim=1), *second[1:]), (h, *last), strict=True
    ):
        assert relative_error(got, want) < 1e-13


def test_nothing_is_kept_under_no_grad_and_errors(tmp_path):
    inputs = mlstm_inputs(SINGLE)
    with pytest.raises(RuntimeError, match=r"^mlstm_context_parallel: torch\.distributed must be"):
        call(SINGLE, inputs)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        h, last = call(SINGLE, inputs)
        assert h.requires_grad and last.m.requires_grad
        with torch.no_grad():
            h, last = call(SINGLE, inputs)
        assert not h.requires_grad and not last.m.requires_grad
        state = tuple(inputs[f"{field}0"] for field in STATE)
        want, _ = xk.mlstm(*(inputs[name] for name in INPUTS), state)
        assert torch.equal(h, want)
        inputs["f"] = inputs["f"][:, 1:]
        text = r"^mlstm_context_parallel: f must be \(B, T, H\) = \(2, 70, 2\), got \(2, 69, 2\)$"
        with pytest.raises(ValueError, match=text):
            call(SINGLE, inputs)
    finally:
        dist.destroy_process_group()
