"""The mixer against its equations, a token and a head at a time, and its gradients."""

import pytest
import torch
from hybrid_cases import stir

from distill.hybrid.mixer import HybridMixer
from distill.hybrid.options import CHOICES, HybridOptions
from xlstm_kernels.testing import relative_error


def mixer_loop(mixer, x, q, k, v, scale):
    """The module's equations, a token and a head at a time."""
    options, (B, T, H, D) = mixer.options, q.shape
    h = torch.zeros_like(q)
    i, f = mixer.gates(x).chunk(2, dim=-1)
    i = i.exp() if options.input_gate == "exp" else i.sigmoid()
    for b in range(B):
        for head in range(H):
            shared, own = head // (H // k.shape[2]), head // (H // mixer.states)
            S, z = torch.zeros(1, D, dtype=q.dtype), torch.zeros(1, dtype=q.dtype)
            for t in range(T):
                q_t, k_t, v_t = q[b, t, head], k[b, t, shared], v[b, t, shared]
                phi_q, phi_k = phi(mixer, "q", q_t, head), phi(mixer, "k", k_t, own)
                S = f[b, t, own].sigmoid() * S + i[b, t, own] * torch.outer(phi_k, v_t)
                z = f[b, t, own].sigmoid() * z + i[b, t, own] * phi_k
                divisor = {"plain": phi_q @ z, "max": max(phi_q @ z, z.new_ones(())), "none": 1}
                seen = [j for j in range(t + 1) if j > t - options.window or j < options.sinks]
                weights = (scale * (k[b, seen, shared] @ q_t)).softmax(-1)
                o = mixer.output_bias[head]
                if options.output_gate != "bias":
                    given = torch.cat((q_t, k_t, v_t)) if options.output_gate == "qkv" else x[b, t]
                    o = o + mixer.output_weight[head] @ given
                o = o.sigmoid()
                h[b, t, head] = o * (phi_q @ S) / divisor[options.normalizer]
                h[b, t, head] += (1 - o) * (weights @ v[b, seen, shared])
    return h


def phi(mixer, name, x, head):
    if mixer.options.feature_map == "elu":
        return torch.where(x > 0, x + 1, x.exp())
    y = x @ getattr(mixer, f"feature_{name}")[head]
    if mixer.options.feature_map == "softmax":
        return y.softmax(-1)
    return torch.cat((y.softmax(-1), (-y).softmax(-1)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gates_are_float32(dtype):
    """In bfloat16 and under autocast, and saved under the names of a linear layer."""
    mixer = stir(HybridMixer(8, 4, 2, 6, HybridOptions(window=3)).to(dtype))
    assert {"gates.weight", "gates.bias"} < mixer.state_dict().keys()
    x, q, k, v = (torch.randn(1, 5, *size, dtype=dtype) for size in ((8,), (4, 6), (2, 6), (2, 6)))
    seen = []
    mixer.observer = lambda *given: seen.append(given[3])
    with torch.autocast("cpu", torch.bfloat16):
        mixer(x, q, k, v)
    want = torch.nn.functional.linear(x.float(), *(w.float() for w in mixer.gates.parameters()))
    for gate, exact in zip(seen[0][3:], want.chunk(2, dim=-1), strict=True):
        assert gate.dtype == torch.float32 and torch.equal(gate, exact.expand_as(gate))


VARIANTS = [
    {},
    *({name: value} for name, values in CHOICES.items() for value in values[1:]),
    {"window": 1, "sinks": 0},
    {"window": 100},
    {"grouped_heads": "share", "feature_map": "softmax_pair", "input_gate": "sigmoid"},
    {"feature_dim": 3},
    {"feature_dim": 9, "feature_map": "softmax_pair"},
]


def decoded(mixer, inputs, lengths, *, scale):
    """What comes of tokens in pieces, the first of which is the prompt."""
    prompt, *pieces = zip(*(part.split(lengths, dim=1) for part in inputs), strict=True)
    h, state = mixer.prefill(*prompt, scale=scale)
    found = [h]
    for piece in pieces:
        h, state = mixer.step(*piece, state, scale=scale)
        found.append(h)
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_mixer_computes_its_equations(changes):
    torch.manual_seed(0)
    options = HybridOptions(**{"window": 3, "sinks": 2, "eps": 0.0} | changes)
    mixer = stir(HybridMixer(8, 4, 2, 6, options).double())
    inputs = [torch.randn(2, 11, 8), *(torch.randn(2, 11, heads, 6) for heads in (4, 2, 2))]
    inputs = [part.double() for part in inputs]
    with torch.no_grad():
        want = mixer_loop(mixer, *inputs, scale=0.4)
        assert relative_error(mixer(*inputs, scale=0.4), want) <= 1e-12
        got = decoded(mixer, inputs, (1, 9, 1), scale=0.4)
    assert relative_error(got, want) <= 1e-12


def test_gradients_of_decoding_are_those_of_a_sequence():
    torch.manual_seed(0)
    options = HybridOptions(window=3, sinks=1, grouped_heads="share")
    mixer = stir(HybridMixer(8, 4, 2, 6, options).double())
    inputs = [torch.randn(2, 7, 8), *(torch.randn(2, 7, heads, 6) for heads in (4, 2, 2))]
    inputs = [part.double().requires_grad_() for part in inputs]
    whole = mixer(*inputs, scale=0.4)
    weight, wanted = torch.randn_like(whole), [*inputs, *mixer.parameters()]
    want = torch.autograd.grad(whole, wanted, weight)
    got = torch.autograd.grad(decoded(mixer, inputs, (3, 1, 3), scale=0.4), wanted, weight)
    assert all(relative_error(a, b) <= 1e-10 for a, b in zip(got, want, strict=True))
