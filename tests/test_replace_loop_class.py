"""Hand-written LSTMs whose classes do more than compute, or which change after the swap."""

import pickle

import pytest
import torch
from layer_cases import Cell, Loop
from torch import nn
from torch.nn.utils import prune

import xlstm_kernels as xk


class Adapted(nn.Module):
    """A Linear and what was learned beside it; its weight is the Linear's, as adapters have it."""

    def __init__(self, linear):
        super().__init__()
        self.linear, self.more = linear, nn.Linear(linear.in_features, linear.out_features)

    weight = property(lambda self: self.linear.weight)
    bias = property(lambda self: self.linear.bias)

    def forward(self, x):
        return self.linear(x) + self.more(x)


def half_as_large(linear):
    """The old weight_norm: a hook computes the weight before each call."""
    nn.utils.weight_norm(linear)
    linear.weight_g.data.mul_(0.5)


CHANGES = {
    "adapter": lambda layer: setattr(layer.cell, "b", Adapted(layer.cell.b)),
    "weight_norm": lambda layer: half_as_large(layer.cell.b),
    "pruned": lambda layer: prune.random_unstructured(layer.cell.a, "weight", 0.5),
    "number": lambda layer: setattr(layer.cell, "forget", 1.0),
    "once None": lambda layer: setattr(layer.cell, "limit", torch.tensor(0.01)),
    "dropout": lambda layer: setattr(layer.drop, "p", 1.0),
    "hook": lambda layer: layer.cell.b.register_forward_hook(lambda module, args, y: 2 * y),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm")
@pytest.mark.parametrize("change", CHANGES)
def test_what_a_cell_becomes_after_it_was_replaced_counts(change):
    layer, x = Loop(Cell(6, 8), 8), torch.randn(2, 9, 6)
    xk.replace_layers(layer)
    before = layer(x)[0]
    CHANGES[change](layer)
    got = layer(x)[0]
    xk.restore_layers(layer)
    assert torch.equal(got, layer(x)[0]) and not torch.equal(got, before)


class OwnCall(Loop):
    def __call__(self, x):
        return super().__call__(x.transpose(0, 1))


class Counts(Loop):
    """Leaves out of a pickle what cannot be pickled."""

    def __init__(self, cell, hidden):
        super().__init__(cell, hidden)
        self.ids = iter(range(3))

    def __getstate__(self):
        return {name: value for name, value in vars(self).items() if name != "ids"} | {"was": 1}

    def __setstate__(self, state):
        super().__setstate__(state)
        self.ids = iter(range(3))


def test_pickles_are_made_as_the_class_makes_them():
    layer = Counts(Cell(6, 8), 8)
    xk.replace_layers(layer)
    again = pickle.loads(pickle.dumps(layer))
    assert again.was == 1 and next(again.ids) == 0
    assert xk.restore_layers(again) == [""]


def test_a_call_that_does_more_than_forward_is_left():
    row = xk.replace_layers(OwnCall(Cell(6, 8), 8)).rows[0]
    assert row.became == "" and "__call__" in row.note


class Final(Loop):
    def __init_subclass__(cls):
        raise TypeError("derive from Loop instead")


class Fixed(Loop):
    def __setattr__(self, name, value):
        if name == "__class__":
            raise AttributeError("not this one")
        super().__setattr__(name, value)


@pytest.mark.parametrize(
    ("cls", "why"),
    [
        (Final, "no class can be derived from its own: TypeError: derive from Loop instead"),
        (Fixed, "it takes no other class: AttributeError: not this one"),
    ],
)
def test_a_layer_that_takes_no_other_class_is_left_and_others_are_replaced(cls, why):
    model = nn.ModuleList([cls(Cell(6, 8), 8), nn.LSTM(6, 8)])
    report = xk.replace_layers(model)
    assert report.rows[0].note == why and [row.path for row in report.replaced] == ["1"]
    assert type(model[0]) is cls and "_plan" not in vars(model[0])
    assert xk.restore_layers(model) == ["1"]
