"""Every backend of the mLSTM gives the float64 recurrence's outputs and gradients."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from mlstm_cases import (
    BACKENDS,
    EACH_BACKEND,
    FLAGS,
    FLOAT64,
    INPUTS,
    STATE,
    MLSTMCase,
    call_mlstm,
    check_mlstm,
    exact_mlstm,
    mlstm_inputs,
    on_every_backend,
    run_mlstm,
)

import xlstm_kernels as xk
from xlstm_kernels.ops.mlstm import reference
from xlstm_kernels.testing import relative_error

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SHAPES = [
    *({"T": T} for T in (0, 1, 2, 15, 16, 17, 63, 64, 65, 257)),
    *({"K": K} for K in (1, 16, 48, 80, 96)),
    *({"V": V} for V in (1, 16, 24, 80, 130)),
    {"B": 0},
    {"B": 5, "H": 3, "T": 20},
    {"B": 1, "T": 600, "H": 1, "K": 16, "V": 16},
    {"B": 1, "T": 1030, "H": 1, "K": 8, "V": 8},
    *({"B": 1, "H": 1, "K": K, "V": V} for K, V in ((256, 512), (512, 256))),
]
LENGTHS = [{"lengths": n} for n in ((7, 64, 1), (0, 5, 0, 33, 80, 0), (48,), (0, 0), (), (520, 3))]
# 1 and 5 are below what a backend may have, 1000 above.
CHUNKS = [{"T": 150, "chunk_size": size} for size in (1, 5, 16, 33, 64, 100, 128, 1000)]


@pytest.mark.parametrize("case", on_every_backend(*SHAPES))
def test_shapes(case):
    check_mlstm(case)


BFLOAT16_SHAPES = [
    *({"T": T} for T in (1, 17, 33, 65)),
    *({"K": K} for K in (1, 16, 48, 80)),
    *({"V": V} for V in (1, 16, 24, 130)),
    *({"T": 150, "chunk_size": size} for size in (33, 128)),
    {"lengths": (0, 5, 0, 33, 80, 0)},
    {"B": 1, "T": 600, "H": 1, "K": 16, "V": 16},
]


@pytest.mark.parametrize(
    "case",
    on_every_backend(
        *({**shape, "dtype": torch.bfloat16} for shape in BFLOAT16_SHAPES), backends=("cpu",)
    ),
)
def test_shapes_in_bfloat16(case):
    """Which CPUs with bfloat16 tiles compute another way than float32."""
    check_mlstm(case)


@pytest.mark.parametrize(
    "case", on_every_backend(*({**flags, "dtype": d} for flags in FLAGS for d in DTYPES))
)
def test_gates_normalizers_and_dtypes(case):
    check_mlstm(case)


@pytest.mark.parametrize(
    "case",
    on_every_backend(
        *({"layout": x, "dtype": d} for x in ("head_first", "expanded", "strided") for d in DTYPES)
    ),
)
def test_layouts(case):
    check_mlstm(case)


@pytest.mark.parametrize(
    "case",
    on_every_backend(*({**flags, "state": s} for flags in FLAGS for s in ("zero", "large"))),
)
def test_initial_states(case):
    check_mlstm(case)


@pytest.mark.parametrize(
    "case",
    on_every_backend(
        *(
            {**flags, "gates": 50.0, "state": state, "T": 40}
            for flags in FLAGS
            if flags != {"input_gate": "exp", "normalizer": "none"}  # exp(50) squared, and more
            for state in ("zero", "random")
        )
    ),
)
def test_saturated_gates(case):
    check_mlstm(case)


@pytest.mark.parametrize(
    "case",
    on_every_backend(
        *({**flags, "B": 1, "T": 130, "K": 8, "V": 8} for flags in FLAGS),
        {"lengths": (130, 700), "H": 1, "K": 8, "V": 8},
        backends=("reference", *BACKENDS),
    ),
)
def test_nothing_stays_nothing_until_a_gate_opens(case):
    """A state of m = -inf holds nothing, whatever c and n are; a token whose gates are both closed
    leaves nothing."""
    inputs = mlstm_inputs(case)
    inputs["m0"].fill_(-torch.inf)
    inputs["i"][:, :3] = inputs["i"][:, 20:100] = inputs["f"][:, 20] = -torch.inf
    exact, got = exact_mlstm(case, inputs), run_mlstm(case, inputs, case.backend)
    for name, want in exact.items():
        assert got[name].isfinite().all(), name
        assert relative_error(got[name], want) <= 1e-4, name
    assert not got["h"][:, :3].any() and not got["h"][:, 20:100].any()
    assert not got["d_c0"][0].any() and not got["d_n0"][0].any()
    # Where it opens again, the tokens before might as well not be there.
    end = 130
    later = {name: inputs[name][:, 100:end] for name in (*INPUTS, "weight_h")}
    some = {name: x[:1] for name, x in inputs.items() if name.startswith("weight_last")}
    later |= some | {"c0": 0 * inputs["c0"][:1], "n0": 0 * inputs["n0"][:1]}
    later["m0"] = torch.full_like(inputs["m0"][:1], -1e4)
    fresh = run_mlstm(replace(case, lengths=None, T=30), later, case.backend)
    for name in ("h", *(f"d_{name}" for name in INPUTS)):
        assert relative_error(got[name][:, 100:end], fresh[name]) <= 1e-4, name


@pytest.mark.parametrize("case", on_every_backend(*LENGTHS))
def test_packed_sequences(case):
    check_mlstm(case)


@pytest.mark.parametrize("case", on_every_backend(*CHUNKS, {"scale": 0.5}, {"scale": -2.0}))
def test_chunk_sizes_and_scale(case):
    check_mlstm(case)


@pytest.mark.parametrize(
    "case",
    on_every_backend(
        {"B": 1, "T": 1024, "H": 1, "K": 128, "V": 256, "state": "zero"}, backends=FLOAT64
    ),
)
def test_gradients_need_no_norm_layer_behind(case):
    """A loss on h itself, at the sizes of a model: float32's error. Kernels that leave out the
    normaliser's gradient are off by 0.9 and more here."""
    inputs = mlstm_inputs(case)
    exact = run_mlstm(
        replace(case, dtype=torch.float64),
        {name: x.double() for name, x in inputs.items()},
        partial(reference.chunkwise, chunk_size=64),
        through=["h"],
    )
    got = run_mlstm(case, inputs, case.backend, through=["h"])
    for name in exact:
        assert relative_error(got[name], exact[name]) <= 1e-5, name


@pytest.mark.parametrize("case", on_every_backend({"T": 33}, {"lengths": (5, 0, 20)}))
def test_gradient_through_some_outputs(case):
    """A loss on c, n or m alone is what peers get wrong: they drop n's gradient and fix m."""
    states = [f"last_{field}" for field in STATE]
    for through in (["h"], states, *([state] for state in states)):
        check_mlstm(case, through)


@pytest.mark.parametrize("case", on_every_backend({"T": 19}, {"T": 19, "state": "zero"}))
def test_gradient_of_some_inputs(case):
    """Whatever else is asked for, each gradient has the same bits."""
    inputs = mlstm_inputs(case)
    everything = run_mlstm(case, inputs, case.backend)
    names = [name for name in inputs if not name.startswith("weight_")]
    for wanted in (*([name] for name in names), names[:2], names[2:]):
        some = run_mlstm(case, inputs, case.backend, wanted=wanted)
        for name in wanted:
            assert torch.equal(some[f"d_{name}"], everything[f"d_{name}"]), name


@pytest.mark.parametrize(
    "case",
    on_every_backend(
        *({**flags, "B": 1, "T": 7, "H": 1, "K": 3, "V": 2} for flags in FLAGS),
        {"lengths": (2, 0, 4), "H": 1, "K": 3, "V": 2},
        {"B": 1, "T": 70, "H": 1, "K": 2, "V": 3},
        backends=("reference", "cpu"),
    ),
)
def test_gradcheck(case):
    case = MLSTMCase(**{**case.__dict__, "dtype": torch.float64})
    inputs = {name: x.double() for name, x in mlstm_inputs(case).items()}
    names = [name for name in inputs if not name.startswith("weight_")]

    def outputs(*tensors):
        h, last = call_mlstm(case, dict(zip(names, tensors, strict=True)), case.backend)
        return h, *last

    leaves = [inputs[name].requires_grad_() for name in names]
    assert torch.autograd.gradcheck(outputs, leaves, fast_mode=case.T > 8)


@pytest.mark.parametrize("backend", EACH_BACKEND)
def test_float16_subnormals_count(backend):
    tiny = torch.tensor([6e-8, 3e-6, 6e-5], dtype=torch.float16)
    one, gate = torch.ones(1, 1, 1, 1, dtype=torch.float16), torch.zeros(1, 1, 1)
    h, _ = xk.mlstm(one, one, tiny.view(1, 1, 1, 3), gate, gate, normalizer="none", backend=backend)
    assert torch.equal(h.view(3), tiny)
