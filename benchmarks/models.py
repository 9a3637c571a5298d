"""Whole models before and after `xk.replace_layers`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call

import xlstm_kernels as xk

from .mlstm import WIDENED
from .packages import load
from .problem import (
    FORWARD,
    FORWARD_BACKWARD,
    Bound,
    Case,
    Tensors,
    Trial,
    UnavailableError,
    Variant,
)
from .replay import Replay

FLOAT_BYTES = 4
INT_BYTES = 8
GATES = 4
VOCABULARY = 1024
PACKAGES = ("transformers", "xlstm")
REST = "untouched rest"


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


class FirstOutput(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)[0]


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


def torch_lstm(shape: tuple[int, int, int], direction: str) -> Case:
    """`torch.nn.LSTM`, one layer, batch first; (B, T, D), input size D."""
    B, T, D = shape
    return _case(
        *(f"nn.LSTM B{B} T{T} D{D}", direction),
        lambda: FirstOutput(nn.LSTM(D, D, batch_first=True)),
        shape,
        lambda draw: torch.randn(B, T, D, generator=draw),
        flops=2 * 2 * GATES * D * D * B * T,
    )


def slstm_block(shape: tuple[int, int, int, int], direction: str) -> Case:
    """A block of NX-AI's xlstm in plain torch, with its convolution, norms and feed-forward;
    (B, T, width, heads)."""
    B, T, width, heads = shape

    def make() -> nn.Module:
        xlstm = load("xlstm")
        block = xlstm.sLSTMBlockConfig(xlstm.sLSTMLayerConfig(backend="vanilla", num_heads=heads))
        config = xlstm.xLSTMBlockStackConfig(
            *(None, block),
            context_length=T,
            num_blocks=1,
            embedding_dim=width,
            slstm_at=[0],
        )
        return xlstm.xLSTMBlockStack(config)

    return _case(
        *(f"sLSTM block of xlstm B{B} T{T} E{width} H{heads}", direction, make, (B, T, width)),
        lambda draw: torch.randn(B, T, width, generator=draw),
        flops=2 * _size(make) * B * T,
    )


def hugging_face(shape: tuple[int, int, int, int], direction: str) -> Case:
    """transformers' xLSTM of (T, layers, hidden size, heads) on one sequence: a prompt with its
    cache, or for T = 1 a token; or a training step."""
    T, layers, hidden, heads = shape

    def make() -> nn.Module:
        transformers = load("transformers")
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
    multiplied = _size(make) - VOCABULARY * hidden
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
    weights, parts = _shapes(make), _parts(make)
    # A model that is one layer has no rest.
    rest = [] if parts == [""] or parts == ["model"] else [Variant(REST, _bind_rest(make))]
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
        variants=(_variant(make, True), _variant(make, False), *rest),
        flops=(3 if backward else 1) * flops,
        moved_bytes=(2 if backward else 1) * sizes + input_bytes,
        widened=WIDENED,
    )


def has(package: str) -> bool:
    return _why_not(package) is None


def left_out() -> list[str]:
    """Why models are not among the cases here."""
    return [reason for package in PACKAGES if (reason := _why_not(package))]


def _why_not(package: str) -> str | None:
    try:
        load(package)
    except UnavailableError as error:
        return str(error)
    return None


def _parts(make: Callable[[], nn.Module]) -> list[str]:
    """The layers that are replaced, by path; not the models that hold them."""
    paths = [row.path for row in xk.replace_layers(_made(make)).replaced]
    return [p for p in paths if not any(other.startswith(f"{p}.") for other in paths)]


def _made(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make()


def _shapes(make: Callable[[], nn.Module]) -> Tensors:
    """The model's weights without their values."""
    with torch.device("meta"):
        return dict(make().named_parameters())


def _size(make: Callable[[], nn.Module]) -> int:
    return sum(weight.numel() for weight in _shapes(make).values())


def _variant(make: Callable[[], nn.Module], replaced: bool) -> Variant:
    def bind(case: Case, tensors: Tensors) -> Bound:
        model = _made(make).to(tensors["dh"].dtype)
        if replaced:
            xk.replace_layers(model)
        return _bound(model, case, tensors)

    return Variant("cpu" if replaced else "eager", bind, ours=replaced)


def _bound(model: nn.Module, case: Case, tensors: Tensors) -> Bound:
    weights = {name: tensors[name] for name in case.wrt}
    return Bound(lambda: (functional_call(model, weights, (tensors["data"],)),), weights)


def _bind_rest(make: Callable[[], nn.Module]) -> Callable[[Case, Tensors], Bound]:
    """The replaced model, whose replaced layers take no time from the second call on."""

    def bind(case: Case, tensors: Tensors) -> Bound:
        model = _made(make).to(tensors["dh"].dtype)
        xk.replace_layers(model)
        replays = {path: Replay(model.get_submodule(path)) for path in _parts(make)}
        bound = _bound(model, case, tensors)
        results = Trial(case, Variant(REST, lambda *_: bound), tensors).results()
        for path, replay in replays.items():
            head = f"d{path}."
            grads = {n.removeprefix(head): x for n, x in results.items() if n.startswith(head)}
            replay.finish(grads)
        return bound

    return bind
