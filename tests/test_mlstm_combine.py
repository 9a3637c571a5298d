"""mlstm_combine: one pass is its two halves combined, in any order of combining."""

import re

import pytest
import torch
import torch.nn.functional as F
from layer_cases import assert_near

import xlstm_kernels as xk


def tokens(T, gates=1.0):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, T, 3, size, dtype=torch.float64) for size in (4, 4, 5))
    i, f = (gates * torch.randn(2, T, 3, dtype=torch.float64) for _ in range(2))
    return q, k, v, i, f


def random_state():
    c, n, m = (torch.randn(2, 3, *size, dtype=torch.float64) for size in ((4, 5), (4,), ()))
    return xk.MLSTMState(c, n, 5 * m)


def nothing():
    c, n, m = random_state()
    return xk.MLSTMState(0 * c, 0 * n, torch.full_like(m, -torch.inf))


def decay():
    return F.logsigmoid(torch.randn(2, 3, dtype=torch.float64))


def assert_same_memory(got, want):
    """c exp(m) and n exp(m), by the larger scale, which does not overflow."""
    m = torch.maximum(got.m, want.m)
    for part in ("c", "n"):
        a, b = (
            torch.einsum("bh...,bh->bh...", getattr(s, part), (s.m - m).exp()) for s in (got, want)
        )
        assert_near(a, b, 1e-12)


@pytest.mark.parametrize("input_gate", ["exp", "sigmoid"])
@pytest.mark.parametrize("gates", [1.0, 50.0])
@pytest.mark.parametrize("at", [0, 1, 8, 16, 17])
def test_halves_make_one_pass(at, gates, input_gate):
    x = tokens(17, gates)
    states = []
    for part in (slice(None), slice(0, at), slice(at, None)):
        inputs = [t[:, part] for t in x]
        states.append(xk.mlstm(*inputs, input_gate=input_gate, backend="reference")[1])
    whole, a, b = states
    assert_same_memory(xk.mlstm_combine(a, F.logsigmoid(x[4][:, at:]).sum(1), b), whole)


def test_associative():
    torch.manual_seed(0)
    (a, b, c), d_b, d_c = (random_state() for _ in range(3)), decay(), decay()
    left = xk.mlstm_combine(xk.mlstm_combine(a, d_b, b), d_c, c)
    right = xk.mlstm_combine(a, d_b + d_c, xk.mlstm_combine(b, d_c, c))
    for got, want in zip(left, right, strict=True):
        assert_near(got, want, 1e-13)


def test_nothing_is_the_identity():
    torch.manual_seed(0)
    state, d = random_state(), decay()
    for got in (
        xk.mlstm_combine(nothing(), d, state),
        xk.mlstm_combine(state, torch.zeros_like(d), nothing()),
        xk.mlstm_combine(random_state(), torch.full_like(d, -torch.inf), state),
    ):
        assert all(torch.equal(a, b) for a, b in zip(got, state, strict=True))
    both = xk.mlstm_combine(nothing(), d, nothing())
    assert not both.c.any() and not both.n.any() and (both.m == -torch.inf).all()


@pytest.mark.parametrize("empty", ["a", "b", "ab"])
def test_gradients_of_nothing_are_finite(empty):
    torch.manual_seed(0)
    states = [nothing() if which in empty else random_state() for which in "ab"]
    leaves = [part.clone().requires_grad_() for state in states for part in state]
    d = decay().requires_grad_()
    c, n, m = xk.mlstm_combine(tuple(leaves[:3]), d, tuple(leaves[3:]))
    (c.square().sum() + n.sum() + c.sum() + m.exp().sum()).backward()
    assert all(leaf.grad.isfinite().all() for leaf in (*leaves, d))


def test_gradients():
    torch.manual_seed(0)
    leaves = [part.requires_grad_() for _ in range(2) for part in random_state()]
    leaves.append(decay().requires_grad_())

    def combine(*x):
        return tuple(xk.mlstm_combine(x[:3], x[6], x[3:6]))

    assert torch.autograd.gradcheck(combine, leaves)
    assert torch.autograd.gradgradcheck(combine, leaves)


def test_gradient_of_m_at_a_tie_goes_to_the_past():
    leaves = [part.detach().requires_grad_() for part in (*random_state(), *random_state())]
    with torch.no_grad():
        leaves[5].copy_(leaves[2])
    last = xk.mlstm_combine(leaves[:3], torch.zeros_like(leaves[2]), leaves[3:])
    d_a, d_b = torch.autograd.grad(last.m.sum(), [leaves[2], leaves[5]])
    assert (d_a == 1).all() and (d_b == 0).all()


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"b": (1,)}, ValueError, "state_b must be (c, n, m), got 1 tensors"),
        ({"a": 3}, TypeError, "state_a must be (c, n, m), got int"),
        (
            {"d": torch.zeros(2)},
            ValueError,
            "log_decay_b must be (B, H) = (2, 3), got (2,)",
        ),
        (
            {"b": (torch.zeros(2, 3, 4, 5), torch.zeros(2, 3, 5), torch.zeros(2, 3))},
            ValueError,
            "state_b.n must be (B, H, K) = (2, 3, 4), got (2, 3, 5)",
        ),
    ],
)
def test_errors(change, error, text):
    call = {"a": random_state(), "d": decay(), "b": random_state()} | change
    with pytest.raises(error, match=f"^mlstm_combine: {re.escape(text)}$"):
        xk.mlstm_combine(call["a"], call["d"], call["b"])
