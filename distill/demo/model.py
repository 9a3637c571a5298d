"""A recurrent language model: sLSTM blocks, each followed by a gated feed-forward layer."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

import xlstm_kernels as xk

State = list[xk.SLSTMState]  # one a block


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of a `LanguageModel`; `backend` is passed on to the kernels."""

    vocab: int
    width: int
    layers: int
    heads: int
    ffn: int
    backend: str = "auto"


class Block(nn.Module):
    """x + norm(slstm(norm(x))), then x + ffn(norm(x)): the sLSTM block of arXiv:2405.04517."""

    def __init__(self, config: ModelConfig, index: int):
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.mixer_norm = nn.LayerNorm(width, bias=False)
        self.mixer = xk.nn.SLSTM(
            width,
            width,
            num_heads=config.heads,
            block_ratio=index / max(1, config.layers - 1),
            backend=config.backend,
        )
        self.head_norm = nn.Parameter(torch.ones(width))
        self.ffn_norm = nn.LayerNorm(width, bias=False)
        self.up = nn.Linear(width, 2 * config.ffn, bias=False)
        self.down = nn.Linear(config.ffn, width, bias=False)

    def forward(
        self, x_BTE: torch.Tensor, state: xk.SLSTMState | None = None
    ) -> tuple[torch.Tensor, xk.SLSTMState]:
        h_BTE, state = self.mixer(self.mixer_norm(x_BTE), state)
        x_BTE = x_BTE + self._normalise_heads(h_BTE)
        gate_BTF, value_BTF = self.up(self.ffn_norm(x_BTE)).chunk(2, dim=-1)
        return x_BTE + self.down(F.gelu(gate_BTF, approximate="tanh") * value_BTF), state

    def _normalise_heads(self, h_BTE: torch.Tensor) -> torch.Tensor:
        h_BTHD = h_BTE.unflatten(-1, (self.heads, -1))
        return F.layer_norm(h_BTHD, h_BTHD.shape[-1:]).flatten(-2) * self.head_norm


class LanguageModel(nn.Module):
    """Next-token logits; the embedding is also the output layer.

    forward(tokens_BT, state=None) -> (logits_BTV, state); `state` is a list with one entry a block.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab, config.width)
        self.blocks = nn.ModuleList(Block(config, index) for index in range(config.layers))
        self.norm = nn.LayerNorm(config.width, bias=False)
        self._initialise()

    def _initialise(self) -> None:
        # Logits of unit variance at the start, and residual branches that do not add up with depth.
        nn.init.normal_(self.embedding.weight, std=self.config.width**-0.5)
        for block in self.blocks:
            assert isinstance(block, Block)
            nn.init.normal_(block.up.weight, std=self.config.width**-0.5)
            branch_std = self.config.ffn**-0.5 / math.sqrt(2 * self.config.layers)
            nn.init.normal_(block.down.weight, std=branch_std)

    def forward(
        self, tokens_BT: torch.Tensor, state: State | None = None
    ) -> tuple[torch.Tensor, State]:
        x_BTE = self.embedding(tokens_BT)
        after = []
        for index, block in enumerate(self.blocks):
            x_BTE, block_state = block(x_BTE, None if state is None else state[index])
            after.append(block_state)
        return F.linear(self.norm(x_BTE), self.embedding.weight), after


def seeded_model(config: ModelConfig, seed: int) -> LanguageModel:
    """A model whose initial weights depend on `config` and `seed` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LanguageModel(config)


def n_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def n_bytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


@torch.no_grad()
def generate(
    model: LanguageModel, prompt: list[int], count: int, temperature: float, seed: int
) -> list[int]:
    """`count` tokens sampled after `prompt`, one step of the recurrence each."""
    generator = torch.Generator().manual_seed(seed)
    logits_BTV, state = model(torch.tensor([prompt]))
    tokens = []
    for _ in range(count):
        probability_V = torch.softmax(logits_BTV[0, -1].float() / temperature, dim=-1)
        token = torch.multinomial(probability_V, 1, generator=generator)
        tokens.append(int(token))
        logits_BTV, state = model(token.view(1, 1), state)
    return tokens
