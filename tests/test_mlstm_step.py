"""One token: every backend's step of the mLSTM is that of float64, in place or not; its gradient is
that of a sequence of one token. Several tokens: test_mlstm_step_tokens.py; rows of a pool:
test_mlstm_step_pool.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from mlstm_cases import DEVICES, FLAGS, INPUTS, STATE, WIDENED, MLSTMCase, mlstm_inputs
from mlstm_step_cases import (
    BACKENDS,
    DTYPES,
    EACH_BACKEND,
    EVERY_BACKEND,
    LARGE,
    SMALL,
    call,
    check_step,
    every,
    step_inputs,
    with_dtypes,
)

import xlstm_kernels as xk
from xlstm_kernels.ops.mlstm_step import op
from xlstm_kernels.testing import check

SIZES = (1, 24, 48, 130)


@pytest.mark.parametrize(
    "case", every(*({**flags, "dtype": dtype} for flags in FLAGS for dtype in DTYPES))
)
def test_gates_normalizers_and_dtypes(case):
    check_step(case)


@pytest.mark.parametrize("case", every(*FLAGS))
def test_nothing_stays_nothing_until_a_gate_opens(case):
    """A state of m = -inf holds nothing, whatever c and n are."""
    device = DEVICES.get(case.backend, "cpu")
    q, k, v, i, f = (mlstm_inputs(replace(case, T=3))[name].to(device) for name in INPUTS)
    i[:, :2], f[:, 1] = -torch.inf, -torch.inf
    c, n, m = (mlstm_inputs(case)[f"{field}0"].to(device) for field in STATE)
    state = (c, n, torch.full_like(m, -torch.inf))
    flags = {"input_gate": case.input_gate, "normalizer": case.normalizer}
    h, last = xk.mlstm_step(q, k, v, i, f, state, **flags, backend=case.backend)
    assert not h[:, :2].any()
    nothing = (0 * c, 0 * n, torch.full_like(m, -1e4))
    want = xk.mlstm_step(*(x[:, 2:] for x in (q, k, v, i, f)), nothing, **flags)
    for a, b in zip((h[:, 2:], *last), (want[0], *want[1]), strict=True):
        check("step", a, b.double(), b)


@pytest.mark.parametrize("case", every(*({"K": K, "V": V} for K in SIZES for V in SIZES)))
def test_head_sizes(case):
    check_step(case)


@pytest.mark.parametrize("case", every(*({"B": B, "H": 3} for B in (0, 1, 5)), {"scale": -2.0}))
def test_batches_and_scale(case):
    check_step(case)


@pytest.mark.parametrize(
    "case",
    every(
        # Columns of a head in several tasks, the last one narrower; a head a task; streamed.
        *({"B": 1, "H": 1, "K": 130, "V": V, "dtype": d} for V in (320, 1003) for d in DTYPES[:3]),
        {"B": 7, "H": 3, "K": 64, "V": 66},
        {"B": 4, "H": 4, "K": 512, "V": 520},
        {"B": 4, "H": 4, "K": 512, "V": 521},
        {"B": 2, "H": 4, "K": 512, "V": 520, "dtype": torch.float64},
    ),
)
def test_any_number_of_threads_gives_the_same_bits(case, threads):
    check_step(case)
    results = []
    for count in (1, 2, 5):
        threads(count)
        results.append(call(case, *step_inputs(case)))
    for name, result in results[0].items():
        assert all(torch.equal(result, other[name]) for other in results[1:]), name


@pytest.mark.parametrize(
    "case",
    every(
        *(
            {**flags, "gates": gates, "state": state}
            for flags in FLAGS
            if flags != {"input_gate": "exp", "normalizer": "none"}  # exp(50), and more
            for gates, state in ((50.0, "random"), (50.0, "large"), (None, "large"))
        )
    ),
)
def test_saturated_gates_and_large_states(case):
    check_step(case)


@pytest.mark.parametrize(
    "case", every(*({"layout": x, "dtype": d} for x in ("expanded", "strided") for d in DTYPES))
)
def test_layouts(case):
    check_step(case)


@EVERY_BACKEND
def test_strided_gates_and_states(backend):
    case = MLSTMCase(backend, T=1)
    token, state = step_inputs(case)
    expected = call(case, token, state)
    gates_BHG = torch.stack(token[3:], dim=-1)
    token[3:] = gates_BHG.unbind(-1)
    turned = xk.MLSTMState(*(x.transpose(0, 1).contiguous().transpose(0, 1) for x in state))
    doubled = xk.MLSTMState(*(x.double() for x in turned))
    for other in (turned, doubled, tuple(state)):
        for name, got in call(case, token, other).items():
            assert torch.equal(got, expected[name]), name


@pytest.mark.parametrize("flags", FLAGS, ids=lambda flags: "-".join(flags.values()))
@pytest.mark.parametrize("prefill", [0, 65])
@EVERY_BACKEND
def test_prefill_then_steps_is_one_pass(flags, prefill, backend):
    T = prefill + 6
    case = MLSTMCase(backend, T=T, **flags)
    inputs = mlstm_inputs(case)
    sequence = [inputs[name] for name in INPUTS]
    state = xk.MLSTMState(*(inputs[f"{field}0"] for field in STATE))
    plain_h, plain_last = xk.mlstm(*sequence, state, **flags, backend="reference")
    double = [x.double() for x in sequence], tuple(x.double() for x in state)
    exact_h, exact_last = xk.mlstm(*double[0], double[1], **flags, backend="reference")
    h, state = xk.mlstm(*(x[:, :prefill] for x in sequence), state, **flags, backend=backend)
    parts = [h]
    for t in range(prefill, T):
        token = [x[:, t] for x in sequence]
        inplace = t % 2 == 1
        h, state = xk.mlstm_step(*token, state, **flags, inplace=inplace, backend=backend)
        parts.append(h[:, None])
    widened = WIDENED[case.normalizer]
    check("h", torch.cat(parts, dim=1), exact_h, plain_h, widened)
    for name, got, exact, plain in zip(STATE, state, exact_last, plain_last, strict=True):
        check(name, got, exact, plain, widened)


@with_dtypes("reference", *BACKENDS, shapes=(SMALL, *LARGE))
def test_inplace_gives_the_same_bits_in_the_same_storage(shape, dtype, backend):
    B, H, K, V = shape
    case = MLSTMCase(backend, B=B, T=1, H=H, K=K, V=V, dtype=dtype)
    token, state = step_inputs(case)
    before = [x.clone() for x in (*token, *state)]
    expected = call(case, token, state)
    assert all(torch.equal(x, y) for x, y in zip((*token, *state), before, strict=True))
    # Between guards: nothing beside the state is written.
    padded = [torch.full((x.numel() + 64,), 7.0, dtype=x.dtype) for x in state]
    inside = [p[32:-32].view(x.shape) for p, x in zip(padded, state, strict=True)]
    for part, x in zip(inside, state, strict=True):
        part.copy_(x)
    versions = [part._version for part in inside]
    h, last = xk.mlstm_step(*token, tuple(inside), inplace=True, backend=backend)
    for name, got in {"h": h, **last._asdict()}.items():
        assert torch.equal(got, expected[name]), name
    assert all(got is part for got, part in zip(last, inside, strict=True))
    assert all(part._version > v for part, v in zip(inside, versions, strict=True))
    assert all((p[:32] == 7).all() and (p[-32:] == 7).all() for p in padded)
    assert all(torch.equal(x, y) for x, y in zip(token, before, strict=False))


@EVERY_BACKEND
def test_inplace_in_inference_mode(backend):
    case = MLSTMCase(backend, T=1)
    with torch.inference_mode():
        token, state = step_inputs(case)
        expected = call(case, token, state)
        got = call(case, token, state, inplace=True)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.mark.parametrize("case", every(*FLAGS, {"dtype": torch.bfloat16}))
def test_gradients_are_those_of_a_sequence_of_one_token(case):
    token, state = step_inputs(case)
    device = DEVICES.get(case.backend, "cpu")
    results = []
    for step in (True, False):
        leaves = [x.detach().to(device).requires_grad_() for x in (*token, *state)]
        flags = {"input_gate": case.input_gate, "normalizer": case.normalizer}
        if step:
            h, last = xk.mlstm_step(*leaves[:5], tuple(leaves[5:]), **flags)
        else:
            sequence = [x.unsqueeze(1) for x in leaves[:5]]
            h, last = xk.mlstm(*sequence, tuple(leaves[5:]), **flags, backend=case.backend)
            h = h.squeeze(1)
        loss = h.float().square().sum() + sum(part.square().sum() for part in last)
        results.append([h, *last, *torch.autograd.grad(loss, leaves)])
    for got, expected in zip(*results, strict=True):
        assert torch.equal(got, expected)


@EVERY_BACKEND
def test_gradient_of_one_input_reaches_it(backend):
    for wanted in range(8):
        token, state = step_inputs(MLSTMCase(backend, T=1))
        tensors = [*token, *state]
        tensors[wanted].requires_grad_()
        h, last = xk.mlstm_step(*tensors[:5], tuple(tensors[5:]), backend=backend)
        sum(x.sum() for x in (h, *last)).backward()
        assert tensors[wanted].grad is not None and tensors[wanted].grad.abs().sum() > 0
        with torch.no_grad():
            h, _ = xk.mlstm_step(*tensors[:5], tuple(tensors[5:]), inplace=True, backend=backend)
        assert not h.requires_grad


@pytest.mark.parametrize("backend", EACH_BACKEND)
def test_float16_subnormals_count(backend):
    tiny = torch.tensor([6e-8, 3e-6, 6e-5], dtype=torch.float16)
    one, gate = torch.ones(1, 1, 1, dtype=torch.float16), torch.zeros(1, 1)
    state = torch.zeros(1, 1, 1, 3), torch.zeros(1, 1, 1), torch.zeros(1, 1)
    how = {"normalizer": "none", "backend": backend}
    h, _ = xk.mlstm_step(one, one, tiny.view(1, 1, 3), gate, gate, state, **how)
    assert torch.equal(h.view(3), tiny)


GOOD = {
    "q": torch.zeros(2, 3, 4),
    "k": torch.zeros(2, 3, 4),
    "v": torch.zeros(2, 3, 5),
    "i": torch.zeros(2, 3),
    "f": torch.zeros(2, 3),
    "state": (torch.zeros(2, 3, 4, 5), torch.zeros(2, 3, 4), torch.zeros(2, 3)),
}
C, N, M = GOOD["state"]
WRONG = [
    (
        {"q": torch.zeros(2, 3)},
        ValueError,
        r"q must be \(B, H, K\) or \(B, T, H, K\).*got \(2, 3\)",
    ),
    ({"q": torch.zeros(2, 0, 3, 4)}, ValueError, "q must be .*, T from 1 to 16, .*got"),
    ({"q": torch.zeros(2, 17, 3, 4)}, ValueError, "q must be .*, T from 1 to 16, .*got"),
    ({"q": torch.zeros(2, 1, 3, 4)}, ValueError, r"k must be \(B, T, H, K\) = \(2, 1, 3, 4\), got"),
    ({"q": torch.zeros(2, 3, 4).long()}, TypeError, "q must be a floating point tensor"),
    ({"q": [1.0]}, TypeError, "q must be a tensor, got list"),
    ({"k": torch.zeros(2, 3, 5)}, ValueError, r"k must be \(B, H, K\) = \(2, 3, 4\), got"),
    ({"k": torch.zeros(2, 3, 4).half()}, TypeError, "k must have q's dtype"),
    ({"v": torch.zeros(2, 3, 0)}, ValueError, r"v must be \(B, H, V\), V not 0"),
    ({"v": torch.zeros(2, 2, 5)}, ValueError, r"v must be \(B, H, V\) = \(2, 3, 5\), got"),
    ({"i": torch.zeros(2, 3, 1)}, ValueError, r"i must be \(B, H\) = \(2, 3\), got"),
    ({"f": torch.zeros(3, 2)}, ValueError, r"f must be \(B, H\) = \(2, 3\), got"),
    ({"state": None}, TypeError, r"state must be \(c, n, m\), got NoneType"),
    ({"state": (C, N)}, ValueError, r"state must be \(c, n, m\), got 2 tensors"),
    ({"state": (C, N, C)}, ValueError, r"state\.m must be \(B, H\) = \(2, 3\), got"),
    ({"normalizer": "min"}, ValueError, "normalizer must be 'max' or 'plain' or 'none'"),
    ({"input_gate": "relu"}, ValueError, "input_gate must be 'exp' or 'sigmoid'"),
    ({"scale": torch.ones(())}, TypeError, "scale must be a number"),
    ({"eps": -1.0}, ValueError, "eps must be a number >= 0"),
    ({"backend": "cuda"}, NotImplementedError, "backend 'cuda' cannot run this call"),
    (
        {"state": (C, N.half(), M), "inplace": True},
        TypeError,
        r"state\.n must be torch\.float32 with inplace=True, got torch\.float16",
    ),
    (
        {"state": (C.double(), N, M), "inplace": True},
        TypeError,
        r"state\.c must be torch\.float32 or torch\.bfloat16 with inplace=True, got torch\.float64",
    ),
    (
        {"state": (C.mT.contiguous().mT, N, M), "inplace": True},
        ValueError,
        r"state\.c must have contiguous rows that do not overlap with inplace=True, got strides",
    ),
    (
        {"q": torch.zeros(2, 3, 4, requires_grad=True), "inplace": True},
        ValueError,
        "inplace must be False where a gradient is asked for",
    ),
]


@pytest.mark.parametrize(("changes", "error", "message"), WRONG)
def test_wrong_arguments_are_named(changes, error, message):
    with pytest.raises(error, match=f"^mlstm_step: {message}"):
        xk.mlstm_step(**(GOOD | changes))


OPTIONS = ("exp", "max", 0.5, 1e-6)


@pytest.mark.medium
@with_dtypes(*BACKENDS)
def test_opcheck(backend, dtype, shape):
    B, H, K, V = shape
    token, state = step_inputs(MLSTMCase(backend, B=B, T=1, H=H, K=K, V=V, dtype=dtype))
    torch.library.opcheck(op.forward, (*token, *state, None, False, *OPTIONS, backend))
    h = torch.zeros_like(token[2])
    torch.library.opcheck(op.update, (*token, *state, h, None, None, *OPTIONS, backend))


@pytest.mark.medium
@pytest.mark.parametrize("inplace", [False, True])
@EVERY_BACKEND
def test_compiles_without_breaks(backend, inplace):
    torch.compiler.reset()
    compiled = torch.compile(xk.mlstm_step, fullgraph=True, backend="aot_eager")
    case = MLSTMCase(backend, T=1)
    token, state = step_inputs(case)
    expected = call(case, token, state)
    h, last = compiled(*token, state, inplace=inplace, backend=backend)
    for name, got in {"h": h, **last._asdict()}.items():
        assert torch.equal(got, expected[name]), name
    assert all(torch.equal(x, y) == inplace for x, y in zip(last, state, strict=True))


@pytest.mark.medium
@EVERY_BACKEND
def test_compiles_with_gradients(backend):
    torch.compiler.reset()
    compiled = torch.compile(xk.mlstm_step, fullgraph=True, backend="aot_eager")
    token, state = step_inputs(MLSTMCase(backend, T=1))
    token[0].requires_grad_()
    gradients = []
    for step in (compiled, xk.mlstm_step):
        h, _ = step(*token, state, backend=backend)
        gradients += torch.autograd.grad(h.square().sum(), token[0])
    assert torch.equal(*gradients)
