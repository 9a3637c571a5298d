"""Benchmarks of whole models: layers that take no time, and memory as it is measured."""

from __future__ import annotations

import sys

import torch
from torch import nn

from benchmarks import packages, peak
from benchmarks.replay import Replay

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # of pytest


class Doubled(nn.Module):
    """Two outputs in a structure, an input used outside of the layer too."""

    def __init__(self):
        super().__init__()
        self.first, self.layer = nn.Linear(4, 4), Layer()

    def forward(self, x):
        x = self.first(x)
        y, (z, count) = self.layer(x, scale=2.0)
        return x + y * z * count


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4))
        self.calls = 0

    def forward(self, x, scale):
        self.calls += 1
        return scale * x * self.weight, (x.sin(), 3)


def test_a_replayed_layer_gives_back_outputs_and_gradients_without_a_call():
    torch.manual_seed(0)
    model = Doubled()
    x, dy = torch.randn(2, 4, requires_grad=True), torch.randn(2, 4)
    wanted = [x, *model.parameters()]

    def run():
        y = model(x)
        return y.detach(), *torch.autograd.grad(y, wanted, dy)

    own = run()
    replay = Replay(model.layer)
    recorded = run()
    replay.finish({"weight": recorded[-1]})
    calls = model.layer.calls
    for _ in range(2):
        for got, want in zip(run(), own, strict=True):
            torch.testing.assert_close(got, want)  # contributions add up in another order
    assert model.layer.calls == calls


def test_a_replayed_layer_without_gradients():
    model = Doubled().requires_grad_(False)
    x = torch.randn(2, 4)
    replay = Replay(model.layer)
    own = model(x)
    replay.finish({})
    assert torch.equal(model(x), own)


def test_peak_is_what_a_call_holds_at_once():
    size_bytes = 64 << 20

    def twice_then_once():
        return torch.ones(2 * size_bytes, dtype=torch.uint8)[:1].clone(), torch.ones(
            size_bytes, dtype=torch.uint8
        )

    # What was there before may shrink meanwhile.
    assert 1.9 * size_bytes < peak.during(twice_then_once) < 3 * size_bytes
    assert peak.during(lambda: None) < size_bytes


def test_packages_are_pinned_as_those_of_the_tests():
    """What is timed is what the tests compare with."""
    with open(packages.ROOT / "pyproject.toml", "rb") as file:
        extra = tomllib.load(file)["project"]["optional-dependencies"]["compat"]
    pinned = {item for item in (*packages.PACKAGES, *packages.PACKAGES_APART) if "==" in item}
    assert pinned and pinned <= set(extra)
