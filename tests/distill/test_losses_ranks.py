"""The losses over ranks: gradients of one process, whatever the batch is split into."""

import pytest
import torch
import torch.distributed as dist
from hybrid_cases import hybrid, make_teacher, stir, tokens
from ranks import run_on_ranks
from torch.distributed.fsdp import fully_shard

from distill.losses.module import DistillModule, LossSpec
from xlstm_kernels.testing import relative_error

pytestmark = pytest.mark.slow

WEIGHTS = {"ce": 0.9, "topk_kl": 0.1, "hidden_mse": 0.5, "mixer_mse": 0.2, "attention": 0.3}
ROWS, LENGTH = 8, 12


def make_module(teacher_width=48):
    """A hybrid whose teacher is wider, so that there are projections too."""
    student = stir(hybrid.hybridize(make_teacher(), window=3, copy_weights=True))
    teacher = make_teacher(hidden_size=teacher_width)
    return DistillModule(student, teacher, [LossSpec(name) for name in WEIGHTS])


def batch():
    """Rows whose words count unequally often."""
    ids = tokens(LENGTH, B=ROWS)
    labels = ids.clone()
    for row in range(ROWS):
        labels[row, : row + 1] = -100
    return ids, labels


def global_counts(module, batches, over_ranks):
    with torch.no_grad():
        found = [module(*rows) for rows in batches]
    counts = torch.stack([sum(x[name][1] for x in found) for name in WEIGHTS])
    if over_ranks:
        dist.all_reduce(counts)
    return dict(zip(WEIGHTS, counts, strict=True))


def step(rank, ranks, micro_batches, way="wrapped"):
    """Gradients and losses of a step over `batch`, as a trainer takes it."""
    module = make_module()
    mine = [x[rank * ROWS // ranks :][: ROWS // ranks] for x in batch()]
    batches = list(zip(*(x.chunk(micro_batches) for x in mine), strict=True))
    counts = global_counts(module, batches, ranks > 1)
    wrapped = torch.nn.parallel.DistributedDataParallel(module) if ranks > 1 else module
    values = torch.zeros(len(WEIGHTS))
    for number, rows in enumerate(batches):
        if ranks > 1:
            wrapped.require_backward_grad_sync = number == len(batches) - 1
        call = wrapped if way == "wrapped" or ranks == 1 else wrapped.module
        found = call(*rows, weights=WEIGHTS)
        parts = {name: total / counts[name] for name, (total, _) in found.items()}
        values += torch.stack([x.detach() for x in parts.values()])
        # DDP takes the mean over ranks of what is a sum.
        (ranks * sum(WEIGHTS[name] * x for name, x in parts.items())).backward()
    if ranks > 1:
        dist.all_reduce(values)
    return values, {name: p.grad for name, p in module.named_parameters()}


def assert_same(got, want):
    assert relative_error(got[0], want[0]) <= 1e-5
    assert got[1].keys() == want[1].keys()
    assert all(relative_error(got[1][name], grad) <= 1e-4 for name, grad in want[1].items())


def sharded_step(rank, shards_teacher):
    """`step` of two ranks under FSDP2, the layers and what is outside of them apart."""
    module = make_module()
    if shards_teacher:
        for layer in module.teacher.model.layers:
            fully_shard(layer)
        fully_shard(module.teacher)
    for layer in module.student.model.layers:
        fully_shard(layer)
    fully_shard(module)
    rows = [x[rank * ROWS // 2 :][: ROWS // 2] for x in batch()]
    counts = global_counts(module, [rows], True)
    found = module(*rows, weights=WEIGHTS)
    parts = {name: total / counts[name] for name, (total, _) in found.items()}
    values = torch.stack([x.detach() for x in parts.values()])
    dist.all_reduce(values)
    (2 * sum(WEIGHTS[name] * x for name, x in parts.items())).backward()
    return values, {name: p.grad.full_tensor() for name, p in module.named_parameters()}


def before_the_head(rank, ranks, shards=False):
    """Gradients of a second step: DDP misses one when the next begins."""
    module = DistillModule(
        make_teacher(), make_teacher(hidden_size=48), [LossSpec("attention"), LossSpec("embedding")]
    )
    call = module
    if shards:
        for layer in module.student.model.layers:
            fully_shard(layer, reshard_after_forward=not module.begins_within_layers)
        fully_shard(module)
    elif ranks > 1:
        call = torch.nn.parallel.DistributedDataParallel(
            module, find_unused_parameters=module.leaves_unused
        )
    for _ in range(2):
        module.zero_grad()
        found = call(*(x[rank * ROWS // ranks :][: ROWS // ranks] for x in batch()))
        (ranks * sum(total for total, _ in found.values())).backward()
    grads = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    grads = {name: x.full_tensor() if shards else x for name, x in grads.items()}
    return {name: x for name, x in grads.items() if x.any()}


def every_way(rank):
    """In one group of processes, which take longer to start than to compute."""
    return {
        "wrapped": step(rank, 2, 1),
        "accumulated": step(rank, 2, 2),
        "past": step(rank, 2, 1, "past"),
        "sharded": sharded_step(rank, shards_teacher=False),
        "before the head": before_the_head(rank, 2),
        "before the head, sharded": before_the_head(rank, 2, shards=True),
        "teacher sharded": sharded_step(rank, shards_teacher=True),
    }


@pytest.fixture(scope="module")
def of_ranks():
    return run_on_ranks(2, every_way)


@pytest.fixture(scope="module")
def alone():
    return step(0, 1, 1)


def test_eight_rows_are_four_times_two(alone):
    assert_same(step(0, 1, 4), alone)


@pytest.mark.parametrize("way", ["wrapped", "accumulated", "sharded", "teacher sharded"])
def test_two_ranks_times_four_are_one_process(way, of_ranks, alone):
    for got in of_ranks:
        assert_same(got[way], alone)


def test_who_calls_past_ddp_gets_another_gradient(of_ranks, alone):
    """What is wrong with `wrapped.module(...)`: nobody adds the ranks' gradients up."""
    for got in of_ranks:
        errors = [relative_error(got["past"][1][name], grad) for name, grad in alone[1].items()]
        assert max(errors) > 0.1


@pytest.mark.parametrize("way", ["before the head", "before the head, sharded"])
def test_losses_that_leave_the_head_unused(way, of_ranks):
    want = before_the_head(0, 1)
    for got in of_ranks:
        assert got[way].keys() == want.keys()
        assert all(relative_error(got[way][name], grad) <= 1e-4 for name, grad in want.items())
