"""One point of a scaling plot, in a process of its own, so that its peak of memory is its own.

`python -m benchmarks.point '{"T": 1024, ...}'` prints time, memory and error as JSON.
"""

from __future__ import annotations

import json
import sys
from statistics import median

import torch

import xlstm_kernels as xk
from xlstm_kernels import testing

from . import mlstm, peak
from .problem import FORWARD, FORWARD_BACKWARD, Tensors, Trial
from .timing import Subject, settle

# Gates of the cases' inputs forget what is this far back, exp(-50): the last tokens, forward and
# backward, are those of a sequence that begins there, which float64 can afford at any T.
FORGOTTEN = 1024
SAMPLES = 3


def measure(
    variant: str, direction: str, T: int, H: int, K: int, V: int, threads: int
) -> dict[str, float]:
    """time_us; peak_bytes beyond the inputs; error and budget of the last tokens' results."""
    torch.set_num_threads(threads)
    run_once(variant, direction, 2 * mlstm.CHUNKS[0], H, K, V)  # loads what is loaded once
    trial, inputs = _trial(variant, direction, T, H, K, V)
    before_bytes = peak.forget()
    results = trial.run()
    peak_bytes = peak.size_bytes() - before_bytes
    names = ["h", *(f"d{name}" for name in trial.bound.wrt)]
    last = {n: x.detach()[:, -FORGOTTEN:].clone() for n, x in zip(names, results, strict=False)}
    del results
    error, budget = _judge(last, inputs, direction)
    subject = Subject(variant, trial.run)
    settle(subject, limit_s=0.5)
    time_us = median(subject.sample() for _ in range(SAMPLES))
    return {"time_us": time_us, "peak_bytes": peak_bytes, "error": error, "budget": budget}


def run_once(variant: str, direction: str, T: int, H: int, K: int, V: int) -> None:
    _trial(variant, direction, T, H, K, V)[0].run()


def _trial(name: str, direction: str, T: int, H: int, K: int, V: int) -> tuple[Trial, Tensors]:
    case = mlstm.sequence((1, T, H, K, V), torch.float32, direction)
    variant = next(v for v in case.variants if v.name == name)
    inputs = case.prepare()
    if direction == FORWARD_BACKWARD:
        for wanted in case.wrt:
            inputs[wanted].requires_grad_()
    return Trial(case, variant, inputs), inputs


def _judge(last: Tensors, inputs: Tensors, direction: str) -> tuple[float, float]:
    """Error and budget of the worst result, by error over budget."""
    wrt = [name for name in mlstm.INPUTS if direction != FORWARD]
    exact, plain = (_last_of_reference(inputs, wrt, dtype) for dtype in (torch.double, torch.float))
    found = []
    for name, x in last.items():
        budget = mlstm.WIDENED * testing.budget(plain[name], exact[name], x.dtype)
        found.append((testing.relative_error(x, exact[name]), budget))
    return max(found, key=lambda pair: pair[0] / pair[1])


def _last_of_reference(inputs: Tensors, wrt: list[str], dtype: torch.dtype) -> Tensors:
    part = {n: x.detach()[:, -2 * FORGOTTEN :].to(dtype) for n, x in inputs.items()}
    leaves = {n: part[n].requires_grad_(n in wrt) for n in mlstm.INPUTS}
    h, _ = xk.mlstm(*leaves.values(), backend="reference", chunk_size=mlstm.CHUNKS[0])
    found = {"h": h.detach()}
    if wrt:
        grads = torch.autograd.grad(h, [leaves[n] for n in wrt], part["dh"])
        found |= {f"d{n}": grad for n, grad in zip(wrt, grads, strict=True)}
    return {n: x[:, -FORGOTTEN:] for n, x in found.items()}


if __name__ == "__main__":
    print(json.dumps(measure(**json.loads(sys.argv[1]))))
