"""Whole models before and after `xk.replace_layers`."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call

import xlstm_kernels as xk

from .mlstm import WIDENED
from .problem import FORWARD, FORWARD_BACKWARD, Bound, Case, Tensors, Trial, Variant

FLOAT_BYTES = 4
INT_BYTES = 8
GATES = 4
VOCABULARY = 1024
HAS_TRANSFORMERS = importlib.util.find_spec("transformers") is not None


class PythonLoop(nn.Module):
    """An LSTM as it is written by hand."""

    def __init__(self, inputs: int, hidden: int):
        super().__init__()
        self.hidden = hidden
        self.from_input = nn.Linear(inputs, GATES * hidden)
        self.from_hidden = nn.Linear(hidden, GATES * hidden)

    def forward(self, x: Tensor) -> Tensor:
        h = c = x.new_zeros(x.shape[0], self.hidden)
        outputs = []
        for x_t in x.unbind(1):
            i, f, g, o = (self.from_input(x_t) + self.from_hidden(h)).chunk(GATES, -1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
            outputs.append(h)
        return torch.stack(outputs, 1)


class Logits(nn.Module):
    """A causal model of transformers, ids to logits."""

    def __init__(self, model: nn.Module, use_cache: bool):
        super().__init__()
        self.model, self.use_cache = model, use_cache

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(ids, use_cache=self.use_cache).logits


def python_loop(shape: tuple[int, int, int], direction: str) -> Case:
    """(B, T, D), input size D."""
    B, T, D = shape

    def make() -> nn.Module:
        return PythonLoop(D, D)

    return _case(
        *(f"LSTM loop B{B} T{T} D{D}", direction, make, shape),
        lambda draw: torch.randn(B, T, D, generator=draw),
        flops=2 * 2 * GATES * D * D * B * T,
    )


def hugging_face(shape: tuple[int, int, int, int], direction: str) -> Case:
    """transformers' xLSTM of (T, layers, hidden size, heads) on one sequence: a prompt with its
    cache, or for T = 1 a token; or a training step."""
    T, layers, hidden, heads = shape

    def make() -> nn.Module:
        import transformers

        config = transformers.xLSTMConfig(
            vocab_size=VOCABULARY,
            **dict.fromkeys(("hidden_size", "embedding_dim"), hidden),
            **dict.fromkeys(("num_hidden_layers", "num_blocks"), layers),
            num_heads=heads,
        )
        model = transformers.xLSTMForCausalLM(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():  # its gates do not look at their input at first
                parameter.add_(torch.randn_like(parameter) / hidden)
        return Logits(model, use_cache=direction == FORWARD)

    # Every weight but the embeddings', which are looked up.
    multiplied = sum(w.numel() for w in _shapes(make).values()) - VOCABULARY * hidden
    states = layers * hidden * (hidden // 2) // heads
    return _case(
        *(f"xLSTM of transformers T{T} L{layers} E{hidden}", direction, make, (1, T, VOCABULARY)),
        lambda draw: torch.randint(0, VOCABULARY, (1, T), generator=draw),
        flops=(2 * multiplied + 4 * states) * T,
    )


def _case(
    shape: str,
    direction: str,
    make: Callable[[], nn.Module],
    result: tuple[int, ...],
    data: Callable[[torch.Generator], Tensor],
    flops: int,
) -> Case:
    weights = _shapes(make)
    sizes = sum(w.nbytes for w in weights.values()) + FLOAT_BYTES * torch.Size(result).numel()
    backward = direction == FORWARD_BACKWARD
    input_bytes = data(torch.Generator()).nbytes
    return Case(
        op="replace",
        shape=shape,
        dtype=torch.float32,
        direction=direction,
        inputs=lambda draw: {
            **{name: p.detach() for name, p in _made(make).named_parameters()},
            "data": data(draw),
            "dh": torch.randn(result, generator=draw),
        },
        outputs=("h",),
        wrt=tuple(weights),
        reference=lambda case, tensors: Trial(case, _variant(make, False), tensors).results(),
        variants=(_variant(make, True), _variant(make, False)),
        flops=(3 if backward else 1) * flops,
        moved_bytes=(2 if backward else 1) * sizes + input_bytes,
        widened=WIDENED,
    )


def _made(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make()


def _shapes(make: Callable[[], nn.Module]) -> Tensors:
    """The model's weights without their values."""
    with torch.device("meta"):
        return dict(make().named_parameters())


def _variant(make: Callable[[], nn.Module], replaced: bool) -> Variant:
    def bind(case: Case, tensors: Tensors) -> Bound:
        model = _made(make).to(tensors["dh"].dtype)
        if replaced:
            xk.replace_layers(model)
        weights = {name: tensors[name] for name in case.wrt}
        return Bound(lambda: (functional_call(model, weights, (tensors["data"],)),), weights)

    return Variant("cpu" if replaced else "eager", bind, ours=replaced)
