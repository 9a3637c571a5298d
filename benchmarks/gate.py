"""The gate before the clock: a case is as close to the float64 reference as its dtype allows, or is
not timed. Error and budget are those of `xlstm_kernels.testing`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from xlstm_kernels import testing

from .problem import Case, Tensors, Trial, UnavailableError, Variant, tracked

# A peer is timed with the error it has, printed beside ours; beyond this it does something else.
PEER_LIMIT = 0.1
NOT_COMPILED = "left out by --quick: compiling takes longer than all the rest"

Say = Callable[[str], None]


def quiet(_: str) -> None:
    """Progress that nobody sees."""


@dataclass(frozen=True)
class Verdict:
    """Relative error (2-norm) of the worst of a variant's results, by error over budget."""

    worst: str
    error: float
    budget: float
    limit: float  # the budget for ours; a peer's is wider

    @property
    def passes(self) -> bool:
        return self.error <= self.limit  # false for NaN

    def reason(self) -> str:
        return f"parity: {self.worst} has relative error {self.error:.1e}, limit {self.limit:.1e}"


@dataclass(frozen=True)
class Oracle:
    """The reference's results in float64, and in the case's own dtype, which earn the budget."""

    exact: Tensors
    plain: Tensors
    widened: float

    @classmethod
    def of(cls, case: Case, inputs: Tensors) -> Oracle:
        double = {name: t.double() if t.is_floating_point() else t for name, t in inputs.items()}
        exact = case.reference(case, tracked(case, double))
        del double
        return cls(exact, case.reference(case, tracked(case, inputs)), case.widened)

    def judge(self, got: Tensors, ours: bool) -> Verdict:
        """The worst of `got`'s tensors. A shape or a name that differs is an error of infinity."""
        verdicts = [self._judge(name, got, ours) for name in self.exact]
        return max(verdicts, key=_overrun)

    def _judge(self, name: str, got: Tensors, ours: bool) -> Verdict:
        exact, plain = self.exact[name], self.plain[name]
        if name not in got or got[name].shape != exact.shape:
            return Verdict(name, float("inf"), 0.0, 0.0)
        error = testing.relative_error(got[name], exact)
        budget = self.widened * testing.budget(plain, exact, got[name].dtype)
        return Verdict(name, error, budget, budget if ours else max(budget, PEER_LIMIT))


@dataclass
class Gate:
    """By variant: trials that may be timed, verdicts of all that ran, reasons of the others.

    A variant that is wrong, or cannot run here, has a reason and no trial. When one of ours is
    wrong, no variant of the case has a trial.
    """

    trials: dict[str, Trial]
    verdicts: dict[str, Verdict]
    reasons: dict[str, str]

    @classmethod
    def of(cls, case: Case, quick: bool = False, say: Say = quiet) -> Gate:
        inputs = case.prepare()
        say("float64 reference")
        oracle = Oracle.of(case, inputs)
        tensors = tracked(case, inputs)
        gate = cls({}, {}, {})
        torch.compiler.reset()  # graphs of other cases
        for variant in case.variants:
            say(f"parity of {variant.name}")
            gate._admit(case, variant, tensors, oracle, quick)
        red = [v.name for v in case.variants if v.ours and v.name in gate.verdicts]
        red = [name for name in red if not gate.verdicts[name].passes]
        if red:
            for name in gate.trials:
                gate.reasons[name] = f"{red[0]} fails its parity test"
            gate.trials.clear()
        return gate

    def _admit(
        self, case: Case, variant: Variant, tensors: Tensors, oracle: Oracle, quick: bool
    ) -> None:
        try:
            if quick and variant.compiles:
                raise UnavailableError(NOT_COMPILED)
            trial = Trial(case, variant, tensors)
            results = trial.results()
        except Exception as error:
            self.reasons[variant.name] = first_line(error)
            return
        verdict = self.verdicts[variant.name] = oracle.judge(results, variant.ours)
        if verdict.passes:
            self.trials[variant.name] = trial
        else:
            self.reasons[variant.name] = verdict.reason()


def first_line(error: Exception) -> str:
    """Why a variant has no result."""
    text = (str(error).strip() or repr(error)).splitlines()[0]
    kind = type(error).__name__
    return text if isinstance(error, UnavailableError) else f"{kind}: {text}"


def _overrun(verdict: Verdict) -> float:
    ratio = verdict.error / max(verdict.budget, torch.finfo(torch.float64).tiny)
    return float("inf") if ratio != ratio else ratio
