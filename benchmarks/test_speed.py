"""The cases under pytest-benchmark: the gate first, then the clock. No test asserts a time.

`pytest benchmarks --benchmark-only`, with `--quick` for tiny shapes, `-k slstm-fwd` for some.
"""

from __future__ import annotations

import pytest

from .gate import Gate
from .problem import Case, Trial, Variant

pytest.importorskip("pytest_benchmark", reason="the extra `bench` is not installed")


@pytest.fixture(scope="module")
def gates() -> dict[str, Gate]:
    """The gate of the case under test; the others' tensors are let go."""
    return {}


def test_speed(case: Case, variant: Variant, gates: dict[str, Gate], benchmark, request) -> None:
    if case.id not in gates:
        gates.clear()
        gates[case.id] = Gate.of(case, request.config.getoption("--quick"))
    gate = gates[case.id]
    if variant.name in gate.reasons:
        if variant.ours:
            pytest.fail(gate.reasons[variant.name])
        pytest.skip(gate.reasons[variant.name])
    trial: Trial = gate.trials[variant.name]
    benchmark.group = case.id
    benchmark.extra_info |= {"flops": case.flops, "moved_bytes": case.moved_bytes}
    rounds = 3 if request.config.getoption("--quick") else 10
    benchmark.pedantic(trial.run, setup=trial.reset, rounds=rounds, warmup_rounds=1)
