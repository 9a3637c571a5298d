"""What holds for every mLSTM: causality, splits, packing, chunk sizes, forms, torch citizenship."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from mlstm_cases import (
    BACKENDS,
    DEVICES,
    EACH_BACKEND,
    FLAGS,
    FLOAT64,
    INPUTS,
    SLOW,
    MLSTMCase,
    call_mlstm,
    check_mlstm,
    mlstm_inputs,
    on_every_backend,
    run_mlstm,
)
from torch._dynamo.testing import CompileCounterWithBackend

import xlstm_kernels as xk
from xlstm_kernels.ops.mlstm import op, reference
from xlstm_kernels.testing import relative_error

WITH_REFERENCE = ("reference", *BACKENDS)


@pytest.mark.parametrize("chunk_size", [1, 7, 64, 100])
@pytest.mark.parametrize("flags", FLAGS, ids=lambda flags: "-".join(flags.values()))
def test_chunkwise_reference_is_the_recurrence(flags, chunk_size):
    case = MLSTMCase("reference", dtype=torch.float64, **flags)
    inputs = {name: x.double() for name, x in mlstm_inputs(case).items()}
    exact = run_mlstm(case, inputs, "reference")
    got = run_mlstm(case, inputs, partial(reference.chunkwise, chunk_size=chunk_size))
    for name in exact:
        assert relative_error(got[name], exact[name]) < 1e-12, name


@pytest.mark.parametrize("flags", FLAGS, ids=lambda flags: "-".join(flags.values()))
def test_parallel_reference_is_the_recurrence(flags):
    case = MLSTMCase("reference", dtype=torch.float64, state="zero", **flags)
    tensors = [mlstm_inputs(case)[name].double() for name in INPUTS]
    h, _ = xk.mlstm(*tensors, **flags, backend="reference")
    assert relative_error(reference.parallel(*tensors, case.options), h) < 1e-12


@pytest.mark.parametrize("case", on_every_backend({}, {"dtype": torch.bfloat16}))
def test_causal(case):
    inputs = mlstm_inputs(case)
    before, _ = call_mlstm(case, inputs, case.backend)
    for t in (1, 17, 64):
        changed = {name: x.clone() for name, x in inputs.items()}
        for name in INPUTS:
            changed[name][:, t:] += 1
        after, _ = call_mlstm(case, changed, case.backend)
        assert torch.equal(after[:, :t], before[:, :t])
        assert not torch.equal(after[:, t:], before[:, t:])


@pytest.mark.parametrize(
    "case", on_every_backend(*({"T": 150, **flags} for flags in FLAGS), backends=FLOAT64)
)
@pytest.mark.parametrize("split", [1, 64, 90])
def test_a_split_with_carried_state_changes_nothing(case, split):
    """Values and gradients, through the state that is carried."""
    case = replace(case, dtype=torch.float64)
    inputs = {name: x.double() for name, x in mlstm_inputs(case).items()}
    whole = run_mlstm(case, inputs, case.backend)
    leaves = {n: x.requires_grad_() for n, x in inputs.items() if not n.startswith("weight_")}
    first = {n: x[:, :split] if n in INPUTS else x for n, x in leaves.items()}
    h_first, state = call_mlstm(case, first, case.backend)
    second = {n: leaves[n][:, split:] for n in INPUTS} | {
        f"{field}0": part for field, part in state._asdict().items()
    }
    h_second, last = call_mlstm(case, second, case.backend)
    h = torch.cat([h_first, h_second], dim=1)
    loss = (h * inputs["weight_h"]).sum()
    for field, part in last._asdict().items():
        loss = loss + (part * inputs[f"weight_last_{field}"]).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    assert relative_error(h, whole["h"]) < 1e-11
    for name, grad in zip(leaves, grads, strict=True):
        assert relative_error(grad, whole[f"d_{name}"]) < 1e-10, name


@pytest.mark.parametrize("case", on_every_backend({"lengths": (5, 0, 70, 1)}))
def test_packed_sequences_are_the_loop_over_them(case):
    inputs = mlstm_inputs(case)
    h, last = call_mlstm(case, inputs, case.backend)
    begin = 0
    for row, length in enumerate(case.lengths):
        one = {n: inputs[n][:, begin : begin + length] for n in INPUTS}
        one |= {f"{field}0": inputs[f"{field}0"][row : row + 1] for field in "cnm"}
        h_row, last_row = call_mlstm(replace(case, lengths=None), one, case.backend)
        assert torch.equal(h[:, begin : begin + length], h_row)
        for got, want in zip(last, last_row, strict=True):
            assert torch.equal(got[row : row + 1], want)
        begin += length


@pytest.mark.parametrize("case", on_every_backend({"B": 3, "H": 4}))
def test_sequences_and_heads_do_not_see_one_another(case, threads):
    inputs = mlstm_inputs(case)
    whole = run_mlstm(case, inputs, case.backend)
    threads(1)
    order = torch.tensor([2, 0, 1])
    some = run_mlstm(case, {n: x[order] for n, x in inputs.items()}, case.backend)
    for name, result in whole.items():
        assert torch.equal(some[name], result[order]), name


@pytest.mark.parametrize(
    "case",
    on_every_backend(
        *({"B": 1, "H": 1, "V": 300, "dtype": dtype} for dtype in (torch.float32, torch.bfloat16))
    ),
)
def test_results_do_not_depend_on_threads(case, threads):
    """However the work on a head is shared out among them."""
    inputs = mlstm_inputs(case)
    threads(1)
    alone = run_mlstm(case, inputs, case.backend)
    for count in (2, 3, 8):
        threads(count)
        for name, result in run_mlstm(case, inputs, case.backend).items():
            assert torch.equal(result, alone[name]), (name, count)


@pytest.mark.parametrize(
    "lengths", [(1700,), (0, 1600, 3, 0)], ids=lambda lengths: "_".join(map(str, lengths))
)
@pytest.mark.parametrize("flags", FLAGS, ids=lambda flags: "-".join(flags.values()))
def test_intervals_side_by_side_give_what_one_walk_gives(flags, lengths, threads):
    """Where threads are more than sequences and heads, both passes start in several places."""
    case = MLSTMCase("cpu", lengths=lengths, H=1, K=8, V=20, dtype=torch.float64, **flags)
    inputs = mlstm_inputs(case)
    inputs["f"] += 6.0  # what the last token gives reaches the first
    threads(1)
    walked = run_mlstm(case, inputs, "cpu")
    threads(8)
    got = run_mlstm(case, inputs, "cpu")
    for name, result in got.items():
        assert relative_error(result, walked[name]) < 1e-12, name
    assert torch.equal(got["last_m"], walked["last_m"])
    assert not torch.equal(got["last_c"], walked["last_c"])  # it did start in several places


@pytest.mark.parametrize(
    "sizes",
    [
        *({"lengths": lengths} for lengths in ((767,), (769, 0, 1), (2300, 900, 40))),
        *({"lengths": (1500,), "chunk_size": size} for size in (33, 256)),
        {"B": 2, "H": 2, "T": 1100},
    ],
    ids=lambda sizes: "-".join(map(str, sizes.values())),
)
def test_forward_gives_the_same_on_any_number_of_threads(sizes, threads):
    case = MLSTMCase("cpu", **{"H": 1, "K": 5, "V": 9, "dtype": torch.float64, **sizes})
    inputs = mlstm_inputs(case)
    inputs["f"] += 6.0
    threads(1)
    h, last = call_mlstm(case, inputs, "cpu")
    for count in (2, 3, 5, 16):
        threads(count)
        h_now, last_now = call_mlstm(case, inputs, "cpu")
        for got, want in zip((h_now, *last_now), (h, *last), strict=True):
            assert relative_error(got, want) < 1e-12, count


@pytest.mark.medium
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_intervals_side_by_side_keep_to_the_budget(dtype, threads):
    threads(8)
    check_mlstm(MLSTMCase("cpu", B=1, T=1700, H=1, K=16, V=24, dtype=dtype))


GUARD, CANARY = 64, 7.0


@pytest.mark.parametrize(
    "case",
    on_every_backend(
        *({"dtype": dtype} for dtype in (torch.float32, torch.bfloat16)),
        {"K": 1, "V": 1, "T": 3},
        {"B": 1, "T": 600, "K": 17, "V": 130},
        {"lengths": (7, 0, 64, 1)},
    ),
)
def test_nothing_beside_the_tensors_is_read_or_written(case, monkeypatch):
    """Inputs stand between NaN, what the backend allocates between canaries."""
    guarded = []

    def between_guards(x, guard):
        flat = torch.full((x.numel() + 2 * GUARD,), guard, dtype=x.dtype)
        inside = flat[GUARD:-GUARD].view(x.shape)
        guarded.append((flat, guard))
        return inside.copy_(x)

    def empty(*size, dtype=None, **options):
        made = allocate(*size, dtype=dtype, **options)
        return between_guards(made, CANARY) if made.is_floating_point() else made

    inputs = mlstm_inputs(case)
    expected = run_mlstm(case, inputs, case.backend)
    padded = {name: between_guards(x, torch.nan) for name, x in inputs.items()}
    allocate = torch.empty
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", empty)
        got = run_mlstm(case, padded, case.backend)
    for name, result in expected.items():
        assert torch.equal(got[name], result), name
    for name, x in inputs.items():
        assert torch.equal(padded[name], x), name
    assert len(guarded) > len(inputs) + 12  # h, the last state, what is saved, gradients
    for flat, guard in guarded:
        edges = torch.cat([flat[:GUARD], flat[-GUARD:]])
        assert edges.isnan().all() if guard != CANARY else (edges == CANARY).all()


@pytest.mark.parametrize("backend", EACH_BACKEND)
@pytest.mark.parametrize("gates", [-100.0, 100.0])
def test_long_sequences_of_extreme_gates_stay_finite(backend, gates):
    T = 1100 if backend in SLOW else 3000
    case = MLSTMCase(backend, B=1, T=T, H=1, K=8, V=8, state="zero")
    inputs = mlstm_inputs(case)
    inputs |= {"i": inputs["i"].sign() * 50, "f": torch.full_like(inputs["f"], gates)}
    for name, result in run_mlstm(case, inputs, backend).items():
        assert result.isfinite().all(), name


@pytest.mark.medium
@pytest.mark.parametrize("case", on_every_backend({"T": 9}, {"lengths": (3, 0, 6)}))
def test_opcheck(case):
    device = DEVICES.get(case.backend, "cpu")
    inputs = {name: x.to(device) for name, x in mlstm_inputs(case).items()}
    tensors = [inputs[n] for n in (*INPUTS, "c0", "n0", "m0")]
    cu_seqlens = None if case.cu_seqlens is None else case.cu_seqlens.to(device)
    call = (cu_seqlens, *case.options, 0)
    torch.library.opcheck(op.forward, (*tensors, *call, True, case.backend))
    _, *last_and_saved = op.forward(*tensors, *call, True, case.backend)
    grads = [inputs["weight_h"], *last_and_saved[:3]]
    saved = last_and_saved[3:]
    arguments = (*grads, *tensors[:5], saved, *call, True, case.backend)
    torch.library.opcheck(op.backward, arguments)


@pytest.mark.medium
@pytest.mark.parametrize("backend", EACH_BACKEND)
def test_compiles_whole_and_once_for_every_length(backend):
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    function = partial(xk.mlstm, backend=backend)
    compiled = torch.compile(function, fullgraph=True, backend=counter, dynamic=True)
    compilations = []
    for T in (33, 64, 70):
        inputs = mlstm_inputs(MLSTMCase(backend, T=T, state="zero"))
        tensors = [inputs[name].requires_grad_() for name in INPUTS]
        results = []
        for run in (compiled, function):
            h, last = run(*tensors)
            grads = torch.autograd.grad((h * inputs["weight_h"]).sum() + last.c.sum(), tensors)
            results.append((h, *last, *grads))
        for got, want in zip(*results, strict=True):
            assert torch.equal(got, want)
        compilations.append(counter.frame_count)
    # One call may compile twice, while dynamo finds out what is constant.
    assert compilations[0] == compilations[-1] <= 2


@pytest.mark.parametrize("backend", EACH_BACKEND)
def test_second_derivative_is_an_error(backend):
    case = MLSTMCase(backend, T=5, state="zero")
    tensors = [x.requires_grad_() for n, x in mlstm_inputs(case).items() if n in INPUTS]
    h, _ = xk.mlstm(*tensors, backend=backend)
    (dq,) = torch.autograd.grad(h.square().sum(), tensors[0], create_graph=True)
    with pytest.raises(NotImplementedError, match=f"mlstm: backend '{backend}' has no second"):
        dq.sum().backward()


@pytest.mark.parametrize(
    "case", on_every_backend({"T": 0}, {"lengths": (0,)}, {"lengths": ()}, backends=WITH_REFERENCE)
)
@pytest.mark.parametrize("chunk_size", [None, 16])
def test_no_tokens_leave_a_state_of_its_own_and_a_gradient(case, chunk_size):
    inputs, device = mlstm_inputs(case), DEVICES.get(case.backend, "cpu")
    given = {name: inputs[name].to(device) for name in (*INPUTS, "c0", "n0", "m0")}
    cu_seqlens = None if case.cu_seqlens is None else case.cu_seqlens.to(device)
    options = {"cu_seqlens": cu_seqlens, "backend": case.backend, "chunk_size": chunk_size}
    *tokens, c, n, m = given.values()
    _, last = xk.mlstm(*tokens, (c, n, m), **options)
    for before, after in zip((c, n, m), last, strict=True):
        assert torch.equal(before, after)
        assert before.numel() == 0 or before.data_ptr() != after.data_ptr()
    for name in given:
        leaf = given[name].clone().requires_grad_()
        *tokens, c, n, m = (given | {name: leaf}).values()
        h, _ = xk.mlstm(*tokens, (c, n, m), **options)
        (grad,) = torch.autograd.grad(h.sum(), leaf)
        assert grad.shape == leaf.shape and not grad.any(), name


@pytest.mark.parametrize("function", [xk.mlstm, xk.mlstm_step])
@pytest.mark.parametrize("backend", EACH_BACKEND)
def test_second_derivative_is_refused_where_one_input_alone_has_a_gradient(backend, function):
    """The other inputs are frozen, and h.sum() has no gradient of its own to differentiate by."""
    inputs = mlstm_inputs(MLSTMCase(backend, T=2, K=3, V=2))
    given = {name: inputs[name] for name in (*INPUTS, "c0", "n0", "m0")}
    for name in given:
        leaf = given[name].clone().requires_grad_()
        *tokens, c, n, m = (given | {name: leaf}).values()
        h, _ = function(*tokens, (c, n, m), backend=backend)
        (grad,) = torch.autograd.grad(h.sum(), leaf, create_graph=True)
        # Another path to the leaf, which alone would give a number.
        with pytest.raises(NotImplementedError, match=f"mlstm: backend '{backend}' has no second"):
            torch.autograd.grad(grad.square().sum() + leaf.square().sum(), leaf)


Q, V, GATE = torch.zeros(2, 5, 3, 4), torch.zeros(2, 5, 3, 6), torch.zeros(2, 5, 3)
BAD = {
    r"q must be \(B, T, H, K\)": lambda: xk.mlstm(Q[0], Q, V, GATE, GATE),
    r"k must be \(B, T, H, K\) = \(2, 5, 3, 4\), got \(2, 5, 3, 3\)": lambda: xk.mlstm(
        Q, Q[..., :3], V, GATE, GATE
    ),
    r"v must be \(B, T, H, V\) = \(2, 5, 3, 6\), got \(2, 4, 3, 6\)": lambda: xk.mlstm(
        Q, Q, V[:, :4], GATE, GATE
    ),
    r"v must have q's dtype torch.float32, got torch.float64": lambda: xk.mlstm(
        Q, Q, V.double(), GATE, GATE
    ),
    r"f must be \(B, T, H\) = \(2, 5, 3\), got \(2, 5, 3, 1\)": lambda: xk.mlstm(
        Q, Q, V, GATE, GATE[..., None]
    ),
    r"state must be \(c, n, m\), got 2 tensors": lambda: xk.mlstm(Q, Q, V, GATE, GATE, (Q, Q)),
    r"state.c must be \(B, H, K, V\) = \(2, 3, 4, 6\), got": lambda: xk.mlstm(
        Q, Q, V, GATE, GATE, (Q, Q, Q)
    ),
    r"input_gate must be 'exp' or 'sigmoid', got 'relu'": lambda: xk.mlstm(
        Q, Q, V, GATE, GATE, input_gate="relu"
    ),
    r"normalizer must be 'max' or 'plain' or 'none', got None": lambda: xk.mlstm(
        Q, Q, V, GATE, GATE, normalizer=None
    ),
    r"chunk_size must be at least 1 or None, got 0": lambda: xk.mlstm(
        Q, Q, V, GATE, GATE, chunk_size=0
    ),
    r"chunk_size must be an integer, got bool": lambda: xk.mlstm(
        Q, Q, V, GATE, GATE, chunk_size=True
    ),
    r"q must have B = 1 with cu_seqlens, got B = 2": lambda: xk.mlstm(
        Q, Q, V, GATE, GATE, cu_seqlens=torch.tensor([0, 5], dtype=torch.int32)
    ),
    r"cu_seqlens must rise from 0 to T = 5, got \[0, 6, 5\]": lambda: xk.mlstm(
        Q[:1], Q[:1], V[:1], GATE[:1], GATE[:1], cu_seqlens=torch.tensor([0, 6, 5]).int()
    ),
    r"q must be a tensor, got list": lambda: xk.mlstm([], Q, V, GATE, GATE),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_are_named(message):
    with pytest.raises((ValueError, TypeError), match=f"^mlstm: {message}"):
        BAD[message]()
