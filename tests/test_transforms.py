"""torch.func, forward-mode derivatives, checkpoints, the meta device: right, or a clear error."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import xlstm_kernels as xk

DRAW = torch.Generator().manual_seed(0)


def normal(*shape):
    return torch.randn(*shape, generator=DRAW, dtype=torch.float64)


R, TEACHER, LABELS = normal(4, 2, 5, 5), normal(3, 9), torch.tensor([0, -100, 8])
HEAD = normal(11, 9)
# Name, function of its first argument and a backend, and that argument.
CALLS = [
    ("slstm", lambda x, backend: xk.slstm(x, R, backend=backend)[0], normal(2, 3, 4, 2, 5)),
    ("lstm", lambda x, backend: xk.lstm(x, R, backend=backend)[1].c, normal(2, 3, 4, 2, 5)),
    (
        "kl_div",
        lambda x, backend: xk.kl_div(x, TEACHER, LABELS, ce_weight=0.5, backend=backend),
        normal(3, 9),
    ),
]
EVERY_CALL = pytest.mark.parametrize(("name", "call", "x"), CALLS, ids=["slstm", "lstm", "kl_div"])


def dual_level(function, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, x))).tangent


def along_x(jacobian, x):
    return (jacobian * x).flatten(jacobian.dim() - x.dim()).sum(-1)


# By name: the transform of a function at x, and what it is of the function's Jacobian.
TRANSFORMS = {
    "jvp": (lambda function, x: torch.func.jvp(function, (x,), (x,))[1], along_x),
    "dual_level": (dual_level, along_x),
    "grad": (
        lambda function, x: torch.func.grad(lambda x: function(x).sum())(x),
        lambda jacobian, x: jacobian.reshape(-1, *x.shape).sum(0),
    ),
    "jacrev": (
        lambda function, x: torch.func.jacrev(function)(x),
        lambda jacobian, x: jacobian,
    ),
}
EVERY_TRANSFORM = pytest.mark.parametrize(
    ("transform", "part"), TRANSFORMS.values(), ids=TRANSFORMS
)


@EVERY_CALL
@EVERY_TRANSFORM
def test_transforms_give_what_backward_gives(name, call, x, transform, part):
    jacobian = torch.autograd.functional.jacobian(lambda x: call(x, "cpu"), x)
    assert_close(transform(lambda x: call(x, "auto"), x), part(jacobian, x))


@EVERY_CALL
@EVERY_TRANSFORM
def test_a_named_backend_refuses_what_it_has_no_rule_for(name, call, x, transform, part):
    with pytest.raises(NotImplementedError, match=f"^{name}: backend 'cpu' .*need backend='refer"):
        transform(lambda x: call(x, "cpu"), x)


def test_vmap():
    x, student = normal(5, 2, 3, 4, 2, 5), normal(5, 3, 9)
    assert_close(torch.func.vmap(lambda x: xk.slstm(x, R)[0])(x)[2], xk.slstm(x[2], R)[0])
    got = torch.func.vmap(lambda student: xk.kl_div(student, TEACHER))(student)
    assert_close(got[2], xk.kl_div(student[2], TEACHER))


@pytest.mark.parametrize("name", ["kl_div", "topk_kl_div", "linear_cross_entropy"])
def test_gradients_by_sample(name):
    """vmap over grad, with labels and a teacher's words to look up."""
    student, words = normal(4, 3, 9), torch.tensor([[0, 3], [7, -1], [5, 8]]).expand(4, 3, 2)
    labels, logprobs = LABELS.expand(4, 3), TEACHER.log_softmax(-1)[:, :2]
    losses = {
        "kl_div": lambda x, ids, y: xk.kl_div(x, TEACHER, y, ce_weight=0.5),
        "topk_kl_div": lambda x, ids, y: xk.topk_kl_div(x, logprobs, ids, y, ce_weight=0.5),
        "linear_cross_entropy": lambda x, ids, y: xk.linear_cross_entropy(x, HEAD, y),
    }
    found = torch.func.vmap(torch.func.grad(losses[name]))(student, words, labels)
    for sample, *given in zip(found, student, words, labels, strict=True):
        leaf = given[0].clone().requires_grad_()
        assert_close(sample, *torch.autograd.grad(losses[name](leaf, *given[1:]), leaf))


@EVERY_CALL
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(name, call, x, reentrant):
    leaf = x.clone().requires_grad_()
    want = torch.autograd.grad(call(leaf, "cpu").sum(), leaf)
    checkpoint(call, leaf, "cpu", use_reentrant=reentrant).sum().backward()
    assert torch.equal(leaf.grad, *want)


@EVERY_CALL
def test_meta_tensors_have_shapes(name, call, x, monkeypatch):
    want = call(x, "auto")
    for constant in ("R", "TEACHER", "LABELS"):
        monkeypatch.setitem(globals(), constant, globals()[constant].to("meta"))
    got = call(x.to("meta"), "auto")
    assert got.is_meta and (got.shape, got.dtype) == (want.shape, want.dtype)
