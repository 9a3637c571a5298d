"""A recurrent language model: a stack of `SLSTMBlock`."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

import xlstm_kernels as xk
from distill.blocks import SLSTMBlock

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


class LanguageModel(nn.Module):
    """Next-token logits; the embedding is also the output layer.

    forward(tokens_BT, state=None) -> (logits_BTV, state); `state` is a list with one entry a block.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab, config.width)
        self.blocks = nn.ModuleList(
            SLSTMBlock(
                *(config.width, config.heads, config.ffn),
                block_ratio=index / max(1, config.layers - 1),
                backend=config.backend,
            )
            for index in range(config.layers)
        )
        self.norm = nn.LayerNorm(config.width, bias=False)
        self._initialise()

    def _initialise(self) -> None:
        # Logits of unit variance at the start, and residual branches that do not add up with depth.
        nn.init.normal_(self.embedding.weight, std=self.config.width**-0.5)
        for block in self.blocks:
            assert isinstance(block, SLSTMBlock)
            block.reset_feed_forward(self.config.layers)

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
