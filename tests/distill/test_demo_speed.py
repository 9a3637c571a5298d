"""Nothing is timed that has not been shown to be equal."""

import pytest

from distill.demo import results
from distill.demo.speed import Parity
from distill.errors import DistillError


def test_backends_that_disagree_are_not_timed(make_demo, tmp_path, monkeypatch):
    timed = []
    monkeypatch.setattr(results, "parity", lambda *a: Parity("blocks.0.up.weight", 1e-2, 1e-6))
    monkeypatch.setattr(results, "time_steps", lambda *a: timed.append(a))
    with pytest.raises(DistillError, match=r"blocks\.0\.up\.weight is off by 1\.0e-02"):
        make_demo(tmp_path).run()
    assert timed == []


@pytest.mark.parametrize(("error", "holds"), [(1e-7, True), (1e-6, True), (float("nan"), False)])
def test_parity_holds_within_the_budget_and_not_for_nan(error, holds):
    assert Parity("w", error, 1e-6).holds is holds
