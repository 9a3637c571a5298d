"""Sliding-window attention against all pairs of tokens in float64: values, gradients, decoding."""

from __future__ import annotations

from functools import partial
from itertools import product

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import xlstm_kernels as xk
from xlstm_kernels.backends import TRITON_INTERPRETED
from xlstm_kernels.ops.sliding_window_attention import op
from xlstm_kernels.testing import check_results, lay_out, packed, relative_error

BACKENDS = ["reference", *(backend.value for backend in op.SLIDING_WINDOW_ATTENTION.table)]
# float64 has no product on a GPU's matrix units.
FLOAT64 = [backend for backend in BACKENDS if backend != "triton"]
# Where a GPU's compiled kernels run; inputs and results stay on the CPU.
DEVICES = {} if TRITON_INTERPRETED else {"triton": "cuda"}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPE = {"B": 2, "T": 300, "H": 4, "G": 2, "D": 16, "E": 16}


def make_inputs(B, T, H, G, D, E, dtype=torch.float32, layout="contiguous") -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(T + H)
    shapes = {"q": (H, D), "k": (G, D), "v": (G, E), "weight_h": (H, E)}
    made = {n: torch.randn(B, T, *size, generator=draw) for n, size in shapes.items()}
    return {name: lay_out(x.to(dtype), layout) for name, x in made.items()}


def all_pairs(inputs, backend, window, sinks=0, scale=None, lengths=None) -> tuple[Tensor, tuple]:
    """The definition, one query at a time."""
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    repeat = q.shape[2] // k.shape[2]
    scale = q.shape[3] ** -0.5 if scale is None else scale
    spans = [q.shape[1]] if lengths is None else lengths
    begin, rows = 0, []
    for length in spans:
        for t in range(length):
            seen = [j for j in range(t + 1) if j > t - window or j < sinks]
            keys, values = (
                x[:, [begin + j for j in seen]].repeat_interleave(repeat, 2) for x in (k, v)
            )
            p = torch.einsum("bhd,bjhd->bhj", q[:, begin + t], keys).mul(scale).softmax(-1)
            rows.append(torch.einsum("bhj,bjhe->bhe", p, values))
        begin += length
    return (torch.stack(rows, 1) if rows else torch.zeros_like(inputs["weight_h"])), ()


def attend(inputs, backend, window, sinks=0, scale=None, lengths=None) -> tuple[Tensor, tuple]:
    device = DEVICES.get(backend, "cpu")
    h = xk.sliding_window_attention(
        *(inputs[name].to(device) for name in "qkv"),
        **{"window": window, "sinks": sinks, "scale": scale, "backend": backend},
        cu_seqlens=packed(lengths),
    )
    return h.cpu(), ()


def check(backend, inputs, **options) -> None:
    results = partial(_results, wanted=["q", "k", "v"], **options)
    exact = results(all_pairs, {name: x.double() for name, x in inputs.items()})
    plain = results(attend, inputs, backend="reference")
    got = results(attend, inputs, backend=backend)
    for name in ("d_q", "d_k"):
        # Where every token sees itself alone these are 0: what is left is terms that cancel.
        if exact[name].norm() < 1e-12 * exact["d_v"].norm():
            for found in (got, plain, exact):
                assert found.pop(name).norm() <= 1e-6 * exact["d_v"].norm()
    check_results(got, exact, iter([plain]))


def _results(form, inputs, wanted, backend=None, **options) -> dict[str, Tensor]:
    leaves = {n: x.detach().requires_grad_(n in wanted) for n, x in inputs.items()}
    h, _ = form(leaves, backend, **options)
    grads = torch.autograd.grad(h, [leaves[n] for n in wanted], inputs["weight_h"].to(h.dtype))
    return {"h": h.detach()} | {f"d_{n}": g for n, g in zip(wanted, grads, strict=True)}


WINDOWS = [
    {"window": 1},
    {"window": 7, "sinks": 3},
    {"window": 64, "sinks": 4},
    {"window": 130, "sinks": 0},
    {"window": 40, "sinks": 150},  # more first tokens than a window holds
    {"window": 299, "sinks": 1},
    {"window": 1000, "sinks": 2},
    {"window": 64, "sinks": 1000},
    {"window": 32, "scale": 0.7},
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", WINDOWS, ids=str)
def test_windows_and_sinks(options, backend):
    check(backend, make_inputs(**SHAPE), **options)


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [*product(BACKENDS, DTYPES), *product(FLOAT64, [torch.float64])],
)
def test_dtypes(dtype, backend):
    check(backend, make_inputs(**SHAPE, dtype=dtype), window=33, sinks=4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "sizes",
    [{"T": T} for T in (1, 2, 127, 128, 129, 256, 257)]
    + [{"G": 4}, {"G": 1}, {"E": 24}, {"D": 1, "E": 1}, {"B": 1, "H": 3, "G": 3}],
    ids=str,
)
def test_shapes(sizes, backend):
    check(backend, make_inputs(**{**SHAPE, **sizes}), window=20, sinks=2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["head_first", "expanded", "strided"])
def test_layouts(layout, backend):
    check(backend, make_inputs(**SHAPE, layout=layout), window=20, sinks=2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lengths", [(100, 0, 200), (1, 1, 140), (0,), ()], ids=str)
def test_packed_sequences_do_not_see_one_another(lengths, backend):
    inputs = make_inputs(**{**SHAPE, "B": 1, "T": sum(lengths)})
    options = {"window": 30, "sinks": 2, "lengths": lengths}
    if sum(lengths):
        return check(backend, inputs, **options)
    got = _results(attend, inputs, ["q", "k", "v"], backend, **options)
    assert all(x.numel() == 0 for x in got.values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_at_all(backend):
    for size in ({"B": 0}, {"T": 0}):
        inputs = make_inputs(**{**SHAPE, **size})
        got = _results(attend, inputs, ["q", "k", "v"], backend, window=5, sinks=1)
        assert got["h"].shape == inputs["weight_h"].shape


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_token_sees_neither_later_ones_nor_those_before_its_window(backend):
    inputs = make_inputs(**SHAPE)
    h, _ = attend(inputs, backend, window=50, sinks=2)
    for hidden in (slice(201, None), slice(2, 151)):
        poisoned = dict(inputs)
        for name in "kv":
            poisoned[name] = inputs[name].clone()
            poisoned[name][:, hidden] = 1e4
        assert (
            relative_error(attend(poisoned, backend, window=50, sinks=2)[0][:, 200], h[:, 200]) == 0
        )


@pytest.mark.parametrize("backend", FLOAT64)
def test_gradcheck(backend):
    inputs = make_inputs(1, 9, 2, 1, 3, 2, torch.float64)
    leaves = [inputs[name].requires_grad_() for name in "qkv"]
    function = partial(xk.sliding_window_attention, window=4, sinks=2, backend=backend)
    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("sinks", [0, 3])
@pytest.mark.parametrize("prompt", [0, 1, 4, 30])
@pytest.mark.parametrize("inplace", [False, True])
def test_steps_go_on_from_a_prompt(inplace, prompt, sinks):
    inputs = make_inputs(**{**SHAPE, "T": 60})
    want, _ = attend(inputs, "reference", window=11, sinks=sinks)
    k, v = (inputs[name][:, :prompt] for name in "kv")
    cache = xk.sliding_window_cache(k, v, window=11, sinks=sinks)
    for t in range(prompt, 60):
        token = (inputs[name][:, t] for name in "qkv")
        storage = cache.k.data_ptr()
        h, cache = xk.sliding_window_attention_step(*token, cache, inplace=inplace)
        assert (cache.k.data_ptr() == storage) == inplace
        assert cache.k.shape == (2, sinks + 11, 2, 16) and cache.seen.tolist() == [t + 1] * 2
        assert relative_error(h, want[:, t]) <= 1e-6


@pytest.mark.parametrize("inplace", [False, True])
def test_steps_of_sequences_that_have_seen_unlike_numbers(inplace):
    inputs = make_inputs(**{**SHAPE, "T": 24})
    want, _ = attend(inputs, "reference", window=5, sinks=2)
    seen = torch.tensor([3, 20])  # the first has not filled its places
    rows = torch.arange(2)
    parts = [
        xk.sliding_window_cache(*(inputs[n][b : b + 1, :T] for n in "kv"), window=5, sinks=2)
        for b, T in enumerate(seen.tolist())
    ]
    tensors = (torch.cat([part[at] for part in parts]) for at in range(3))
    cache = xk.SlidingWindowCache(*tensors, sinks=2)
    for t in range(4):
        token = (inputs[name][rows, seen + t] for name in "qkv")
        h, cache = xk.sliding_window_attention_step(*token, cache, inplace=inplace)
        assert relative_error(h, want[rows, seen + t]) <= 1e-6


def test_gradients_flow_through_steps():
    inputs = {n: x.requires_grad_() for n, x in make_inputs(**{**SHAPE, "T": 9}).items()}
    cache = xk.sliding_window_cache(inputs["k"][:, :5], inputs["v"][:, :5], window=4, sinks=1)
    outputs = []
    for t in range(5, 9):
        h, cache = xk.sliding_window_attention_step(*(inputs[n][:, t] for n in "qkv"), cache)
        outputs.append(h)
    leaves = [inputs[name] for name in "qkv"]
    got = torch.autograd.grad(torch.stack(outputs, 1).square().sum(), leaves)
    h, _ = attend(inputs, "reference", window=4, sinks=1)
    for a, b in zip(got, torch.autograd.grad(h[:, 5:].square().sum(), leaves), strict=True):
        assert relative_error(a, b) <= 1e-5


def test_autocast_does_not_round_float32():
    inputs = make_inputs(**SHAPE)
    want, _ = attend(inputs, "cpu", window=20)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attend(inputs, "cpu", window=20)[0], want)


@pytest.mark.slow
def test_compiles_into_one_graph():
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(xk.sliding_window_attention, backend=counter, fullgraph=True)
    for T in (300, 400, 500):
        inputs = make_inputs(**{**SHAPE, "T": T})
        q, k, v = (inputs[name] for name in "qkv")
        got = compiled(q, k, v, window=20, sinks=2)
        assert relative_error(got, xk.sliding_window_attention(q, k, v, window=20, sinks=2)) <= 1e-6
    assert counter.frame_count <= 2  # the second makes T dynamic


Q, K = torch.zeros(2, 5, 4, 8), torch.zeros(2, 5, 2, 8)
CACHE = xk.sliding_window_cache(K, K, window=3)
WRONG = {
    r"k must be \(B, T, G, D\), got \(2, 5, 2\)": lambda f: f(Q, K[..., 0], K, window=2),
    r"v must be \(B, T, G, E\) = \(2, 5, 2, 3\), got \(2, 4, 2, 3\)": lambda f: f(
        Q, K, K[:, :4, :, :3], window=2
    ),
    r"q must be \(B, T, H, D\) = \(2, 5, 4, 8\), got \(2, 5, 4, 7\)": lambda f: f(
        Q[..., :7], K, K, window=2
    ),
    r"H must be a multiple of k's heads G = 2, got 3": lambda f: f(Q[:, :, :3], K, K, window=2),
    r"k must be of q's dtype torch.float32, got torch.float64": lambda f: f(
        Q, K.double(), K, window=2
    ),
    r"v must be a tensor, got NoneType": lambda f: f(Q, K, None, window=2),
    r"window must be at least 1, got 0": lambda f: f(Q, K, K, window=0),
    r"window must be an integer, got float": lambda f: f(Q, K, K, window=2.0),
    r"sinks must be at least 0, got -1": lambda f: f(Q, K, K, window=2, sinks=-1),
    r"scale must be a number, got Tensor": lambda f: f(Q, K, K, window=2, scale=torch.ones(())),
    r"q must have B = 1 with cu_seqlens": lambda f: f(
        Q, K, K, window=2, cu_seqlens=torch.tensor([0, 5], dtype=torch.int32)
    ),
    r"cu_seqlens must rise from 0 to T = 5": lambda f: f(
        Q[:1], K[:1], K[:1], window=2, cu_seqlens=torch.tensor([0, 4], dtype=torch.int32)
    ),
    r"backend 'cuda' cannot run this call": lambda f: f(Q, K, K, window=2, backend="cuda"),
    r"cache.k must be \(B, slots, G, D\) = \(1, 3, 2, 8\)": lambda f: (
        xk.sliding_window_attention_step(Q[:1, 0], K[:1, 0], K[:1, 0], CACHE)
    ),
    r"inplace must be False where gradients are wanted": lambda f: xk.sliding_window_attention_step(
        Q[:, 0].clone().requires_grad_(), K[:, 0], K[:, 0], CACHE, inplace=True
    ),
}


@pytest.mark.parametrize("message", WRONG)
def test_bad_arguments(message):
    with pytest.raises((ValueError, TypeError, NotImplementedError), match=message):
        WRONG[message](xk.sliding_window_attention)
