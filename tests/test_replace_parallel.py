"""A replaced model under DistributedDataParallel and FSDP, on two processes."""

import copy
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from layer_cases import Cell, Loop
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import xlstm_kernels as xk
from xlstm_kernels.testing import relative_error

RANKS = 2


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(6, 8, batch_first=True)
        self.loop = Loop(Cell(8, 8), 8)

    def forward(self, x):
        return self.loop(self.lstm(x)[0])[0]


class Logits(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(ids, use_cache=False).logits


def hugging_face():
    from test_replace_transformers import make_config, transformers

    return Logits(transformers.xLSTMForCausalLM(make_config()))


def block_stack():
    from test_replace_xlstm import make_stack

    return make_stack()


# The model, a batch of it for each rank, and the package that it is of.
MODELS = {
    "loop": (Model, lambda: torch.randn(RANKS, 4, 9, 6), "torch"),
    "hugging_face": (hugging_face, lambda: torch.randint(0, 60, (RANKS, 2, 32)), "transformers"),
    "xlstm": (block_stack, lambda: torch.randn(RANKS, 2, 20, 16), "xlstm"),
}


def train(model, x):
    """Three steps of gradient descent; the losses."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def on_a_rank(rank, name, wrap, folder):
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder) / "store"), RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    torch.manual_seed(0)
    make, data, _ = MODELS[name]
    model, x = make().train(), data()
    alone = copy.deepcopy(model)
    assert len(xk.replace_layers(model).replaced) >= 2
    model = DistributedDataParallel(model) if wrap == "ddp" else fully_shard(model)
    losses = train(model, x[rank])
    dist.all_reduce(losses)
    # The mean over ranks of each rank's gradient is the gradient of the whole batch.
    assert relative_error(losses / RANKS, train(alone, x.flatten(0, 1))) <= 1e-5
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("wrap", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", MODELS)
def test_two_ranks_take_the_course_of_one(name, wrap):
    package = MODELS[name][2]
    pytest.importorskip(package, reason=f"{package} is not installed: make test-compat")
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(on_a_rank, (name, wrap, folder), RANKS)
