"""What the layers' tests share."""

import torch
from torch import nn

from xlstm_kernels.testing import relative_error


def seeded(make, *arguments, **options):
    torch.manual_seed(0)
    layer = make(*arguments, **options)
    with torch.no_grad():
        for parameter in layer.parameters():  # no zeros, which would hide a wrong order
            parameter.add_(torch.randn_like(parameter) / 4)
    return layer


def with_gradients(layer, result):
    """`result` and the gradient of every parameter, by name."""
    layer.zero_grad()
    result.square().sum().backward()
    return {name: p.grad.clone() for name, p in layer.named_parameters()}


def assert_near(got, want, bound=1e-5):
    assert got.shape == want.shape
    assert relative_error(got, want) <= bound


class Cell(nn.Module):
    """Gates in any order; the names of the Linears say nothing."""

    def __init__(self, inputs, hidden, order="ifgo", bias=True, forget=0.0, limit=None):
        super().__init__()
        self.b = nn.Linear(inputs, 4 * hidden, bias=bias)
        self.a = nn.Linear(hidden, 4 * hidden)
        self.order, self.forget, self.limit = order, forget, limit

    def forward(self, x, state):
        h, c = state
        parts = (self.b(x) + self.a(h)).chunk(4, -1)
        i, f, g, o = (parts[self.order.index(gate)] for gate in "ifgo")
        c = torch.sigmoid(f + self.forget) * c + torch.sigmoid(i) * torch.tanh(g)
        if self.limit is not None:
            c = c.clamp(-self.limit, self.limit)
        return torch.sigmoid(o) * torch.tanh(c), c


class Loop(nn.Module):
    """A loop over a cell that takes a state or does without."""

    def __init__(self, cell, hidden, detach_every=None, dropout=0.0):
        super().__init__()
        self.cell, self.hidden, self.detach_every = cell, hidden, detach_every
        self.drop = nn.Dropout(dropout)

    def forward(self, x, state=None):
        state = (x.new_zeros(x.shape[0], self.hidden),) * 2 if state is None else state
        outputs = []
        for t, x_t in enumerate(x.unbind(1)):
            if self.detach_every and t and t % self.detach_every == 0:
                state = tuple(part.detach() for part in state)
            state = self.cell(self.drop(x_t), state)
            outputs.append(state[0])
        return torch.stack(outputs, 1), state
