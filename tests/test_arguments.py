"""What is not a tensor or a number is refused by name, in every operation and layer."""

import re

import pytest
import torch

import xlstm_kernels as xk

X, R, PART = torch.zeros(2, 3, 4, 2, 5), torch.zeros(4, 2, 5, 5), torch.zeros(2, 2, 5)
S, T, LABELS = torch.zeros(4, 9), torch.zeros(4, 9), torch.zeros(4, dtype=torch.int64)
HIDDEN = torch.zeros(2, 8)
SLSTM, CELL = xk.nn.SLSTM(6, 8), xk.nn.LSTMCell(6, 8)


def trained(value):
    return torch.tensor(value, requires_grad=True)


NOT_TENSORS = {
    "slstm: x must be a tensor, got list": lambda: xk.slstm(X.tolist(), R),
    "lstm: r must be a tensor, got NoneType": lambda: xk.lstm(X, None),
    "lstm: b must be a tensor, got tuple": lambda: xk.lstm(X, R, (PART, PART)),
    "slstm: state must be (h, c, n, m), got int": lambda: xk.slstm(X, R, None, 1),
    "lstm: state.c must be a tensor, got NoneType": lambda: xk.lstm(X, R, None, (PART, None)),
    "lstm: cu_seqlens must be a tensor, got list": lambda: xk.lstm(X[:1], R, cu_seqlens=[0, 3]),
    "slstm: r must be a dense tensor, got torch.sparse_coo": lambda: xk.slstm(X, R.to_sparse()),
    "kl_div: student_logits must be a tensor, got list": lambda: xk.kl_div([[0.0]], T),
    "kl_div: teacher_logits must be a tensor, got NoneType": lambda: xk.kl_div(S, None),
    "kl_div: teacher_logits must be a dense tensor, got torch.sparse_coo": lambda: xk.kl_div(
        S, T.to_sparse()
    ),
    "kl_div: labels must be a tensor, got list": lambda: xk.kl_div(S, T, [0, 0, 0, 0]),
    "kl_div: labels must be integers, got torch.complex64": lambda: xk.kl_div(
        S, T, LABELS.to(torch.complex64)
    ),
    "kl_div: row_weight must be a tensor, got float": lambda: xk.kl_div(S, T, row_weight=1.0),
    "SLSTM: x must be a tensor, got list": lambda: SLSTM([[0.0]]),
    "slstm: state must be (h, c, n, m), got float": lambda: SLSTM(torch.zeros(3, 6), 1.0),
    "LSTMCell: x must be a tensor, got list": lambda: CELL([0.0]),
    "LSTMCell.unroll: x must be a tensor, got list": lambda: CELL.unroll([[[0.0]]]),
    "LSTMCell: state must be (h, c), got Tensor": lambda: CELL(torch.zeros(2, 6), HIDDEN),
    "LSTMCell: state.h must be a tensor, got NoneType": lambda: CELL(
        torch.zeros(2, 6), (None, HIDDEN)
    ),
}
NOT_NUMBERS = {
    "slstm: n_floor must be a number, got str": lambda: xk.slstm(X, R, n_floor="0"),
    "slstm: clip_grad must be a number, got Tensor": lambda: xk.slstm(X, R, clip_grad=trained(1.0)),
    "kl_div: temperature must be a number, got Tensor": lambda: xk.kl_div(
        S, T, temperature=trained(2.0)
    ),
    "kl_div: ce_weight must be a number, got str": lambda: xk.kl_div(S, T, LABELS, ce_weight="1"),
    "kl_div: kl_weight must be a number, got NoneType": lambda: xk.kl_div(S, T, kl_weight=None),
    "kl_div: beta must be a number, got NoneType": lambda: xk.kl_div(S, T, beta=None),
    "kl_div: ignore_index must be an integer, got float": lambda: xk.kl_div(
        S, T, LABELS, ignore_index=-100.0
    ),
    "SLSTM: block_ratio must be a number, got NoneType": lambda: xk.nn.SLSTM(
        6, 8, block_ratio=None
    ),
    "LSTM: hidden_size must be an integer, got float": lambda: xk.nn.LSTM(6, 8.0),
}


@pytest.mark.parametrize("text", [*NOT_TENSORS, *NOT_NUMBERS])
def test_what_is_of_another_type_is_refused_by_name(text):
    with pytest.raises(TypeError, match=f"^{re.escape(text)}$"):
        (NOT_TENSORS | NOT_NUMBERS)[text]()


@pytest.mark.parametrize("count", [1, 3])
def test_cell_takes_two_states(count):
    with pytest.raises(
        ValueError, match=rf"^LSTMCell: state must be \(h, c\), got {count} tensors"
    ):
        CELL(torch.zeros(2, 6), (HIDDEN,) * count)


def test_numbers_of_numpy_are_numbers():
    numpy = pytest.importorskip("numpy", reason="numpy is not installed")
    assert xk.kl_div(S, T + 1, temperature=numpy.float32(2), beta=numpy.float64(0.5)) == 0


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int8, torch.int32])
def test_labels_of_any_integer_dtype(backend, dtype):
    labels = torch.tensor([0, 8, 3, 100])
    student = torch.arange(36.0).view(4, 9)
    options = {"ce_weight": 1.0, "ignore_index": 100, "backend": backend}
    want = xk.kl_div(student, T, labels, **options)
    assert torch.equal(xk.kl_div(student, T, labels.to(dtype), **options), want)
    with pytest.raises(ValueError, match="got 255 at row 3"):
        beyond = torch.tensor([0, 8, 3, 255], dtype=torch.uint8)
        xk.kl_div(student, T, beyond, ce_weight=1.0, ignore_index=-1, backend=backend)
