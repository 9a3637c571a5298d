"""What the layers' tests share."""

import torch

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
