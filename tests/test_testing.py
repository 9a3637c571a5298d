"""The measure that judges every backend catches what it should."""

import pytest
import torch

from xlstm_kernels import testing
from xlstm_kernels.testing import RecurrenceCase, check, check_recurrence, relative_error

EXACT = torch.linspace(-1, 1, 1000, dtype=torch.float64)
PLAIN = EXACT.float()


def test_rounding_passes():
    check("x", PLAIN * (1 + 2e-7), EXACT, PLAIN)


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (lambda x: x * (1 + 2**-20), "x: relative error 9.54e-07, budget"),
        (lambda x: x.index_fill(0, torch.tensor([7]), torch.nan), "x: relative error nan"),
        (lambda x: x.index_fill(0, torch.tensor([7]), torch.inf), "x: relative error (nan|inf)"),
        (lambda x: x[:-1], r"x: shape \(999,\), not \(1000,\)"),
        (lambda x: x.bfloat16(), "x: dtype torch.bfloat16, not torch.float32"),
    ],
)
def test_errors_fail(spoil, text):
    with pytest.raises(AssertionError, match=text):
        check("x", spoil(PLAIN.clone()), EXACT, PLAIN)


def test_one_bad_element_of_many_fails():
    """In a large bfloat16 tensor it is within the budget of the norm."""
    exact = torch.ones(1_000_000, dtype=torch.float64)
    got = exact.bfloat16()
    got[123] = 2
    assert relative_error(got, exact) < testing.budget(exact.bfloat16(), exact, torch.bfloat16)
    with pytest.raises(AssertionError, match="worst element"):
        check("x", got, exact, exact.bfloat16())


def test_zero_is_judged_by_absolute_error():
    zero = torch.zeros(3, dtype=torch.float64)
    check("x", zero.float() + 1e-30, zero, zero.float())
    with pytest.raises(AssertionError):
        check("x", zero.float() + 1e-3, zero, zero.float())


def test_empty_tensors_pass():
    empty = torch.empty(0, 4, dtype=torch.float64)
    check("x", empty.float(), empty, empty.float())


def test_widening_has_a_limit():
    off = PLAIN * (1 + 8e-7)
    check("x", off, EXACT, PLAIN, widened=2.0)
    with pytest.raises(AssertionError):
        check("x", off, EXACT, PLAIN)


def test_units_in_another_order_give_the_same_numbers():
    case = RecurrenceCase("slstm", "cpu", dtype=torch.float64, layout="expanded")
    inputs = testing.recurrence_inputs(case)
    order = torch.randperm(case.D, generator=torch.Generator().manual_seed(0))
    got = testing._run_reordered(case, inputs, order, None)
    for name, want in testing.run_recurrence(case, inputs, "reference").items():
        assert not torch.equal(got[name], want), name
        assert relative_error(got[name], want) < 1e-12, name


def test_a_lucky_run_of_plain_torch_does_not_fail_a_result(monkeypatch):
    """Plain torch that happens to be exact earns nothing; other orders of its sums do."""
    honest, plain_runs = testing.run_recurrence, []

    def lucky(case, inputs, backend, *rest):
        results = honest(case, inputs, backend, *rest)
        if case.backend == backend:  # the result under test: off by more than four roundings
            results["h"] = results["h"] * (1 + 6e-7)
        elif case.dtype == torch.float32:
            plain_runs.append(results)
            if len(plain_runs) == 1:
                exact = {name: t.double() for name, t in inputs.items()}
                wide = honest(case, exact, backend, *rest)
                results = {name: wide[name].to(t.dtype) for name, t in results.items()}
            else:
                results["h"] = results["h"] * (1 + 3e-7)
        return results

    monkeypatch.setattr(testing, "run_recurrence", lucky)
    check_recurrence(RecurrenceCase("lstm", "cpu", T=5))
    assert len(plain_runs) == testing.PLAIN_RUNS


def test_a_case_is_told_apart_by_its_name():
    case = RecurrenceCase("lstm", "cpu")
    other = RecurrenceCase("lstm", "cpu", gates=50.0)
    assert str(case) == "lstm-cpu-B3-T18-H2-D20-float32"
    assert str(other) == "lstm-cpu-B3-T18-H2-D20-float32-gates_50.0"
    assert case.seed == RecurrenceCase("lstm", "reference").seed != other.seed


def test_the_example_of_an_install_check():
    check_recurrence(RecurrenceCase("slstm", "auto", T=33, D=48))


@pytest.mark.parametrize("gradient", ["d_x", "d_r", "d_b", "d_h0", "d_c0", "d_n0", "d_m0"])
def test_a_wrong_gradient_fails(gradient, monkeypatch):
    """Each by itself, as a peer that forgets one would be."""
    honest = testing.run_recurrence

    def forgetful(case, inputs, backend, *rest):
        results = honest(case, inputs, backend, *rest)
        if backend == "auto":
            results[gradient] = results[gradient] * 1.001
        return results

    monkeypatch.setattr(testing, "run_recurrence", forgetful)
    with pytest.raises(AssertionError, match=f"^{gradient}: "):
        check_recurrence(RecurrenceCase("slstm", "auto", T=5, D=4))
