"""One module over all ranks: DDP as `accelerate` has it, or torch's FSDP2."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs, PartialState
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers
from accelerate.utils import ProjectConfiguration
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from distill.errors import DistillError, Interrupted
from distill.losses.module import DistillModule
from distill.losses.taps import decoder_layers
from distill.training.recipe import PRECISIONS, LogConfig, LoopConfig

PATIENCE = timedelta(days=30)


def make_accelerator(loop: LoopConfig, log: LogConfig, folder: Path) -> Accelerator:
    """Of the processes that `accelerate launch` or torchrun began, or of this one alone."""
    state = PartialState(cpu=not torch.cuda.is_available())
    # FSDP2 casts by itself, and reduces gradients in float32 as DDP does with autocast.
    shards = loop.parallel == "fsdp2" and state.num_processes > 1
    precision = "float32" if shards else loop.precision
    _require_trackers(log.trackers)
    AcceleratorState._reset_state()  # the precision of another recipe that this process has run
    accelerator = Accelerator(
        mixed_precision=PRECISIONS[precision],
        cpu=state.device.type == "cpu",
        log_with=log.trackers or None,
        project_config=ProjectConfiguration(str(folder), logging_dir=str(folder / "logs")),
    )
    if "FSDP" in accelerator.distributed_type.value or "DEEPSPEED" in accelerator.distributed_type:
        raise DistillError(
            f"launch: distributed_type must be MULTI_GPU, with loop.parallel=fsdp2 to shard, got"
            f" {accelerator.distributed_type.value}"
        )
    return accelerator


def _require_trackers(names: list[str]) -> None:
    there = [str(tracker) for tracker in get_available_trackers()]
    for name in names:
        if name not in there:
            raise DistillError(
                f"recipe: log.trackers must be of those installed, {', '.join(there) or 'none'},"
                f" got {name!r}"
            )


class Inside(nn.Module):
    """What DDP or FSDP2 wraps: everything that touches a parameter runs in its forward."""

    def __init__(self, module: DistillModule):
        super().__init__()
        self.module = module

    def forward(
        self, *args: Any, function: Callable[[Any], Any] | None = None, **kwargs: Any
    ) -> Any:
        """The losses, or a function of the student."""
        return self.module(*args, **kwargs) if function is None else function(self.module.student)


class Wrapped:
    """A `DistillModule` over the ranks of an accelerator; calls give the losses of this rank."""

    def __init__(self, module: DistillModule, accelerator: Accelerator, loop: LoopConfig):
        if loop.activation_checkpointing:
            student = module.student
            old = student.gradient_checkpointing_enable
            getattr(student, "activation_checkpointing_enable", old)({"use_reentrant": False})
        self.accelerator, self.inside = accelerator, Inside(module)
        accelerator.ddp_handler = DistributedDataParallelKwargs(
            broadcast_buffers=False, find_unused_parameters=module.leaves_unused
        )
        self.shards = loop.parallel == "fsdp2" and accelerator.num_processes > 1
        if self.shards:
            self.call: Any = _shard(self.inside, accelerator, loop.precision)
        else:
            if accelerator.ddp_handler is not None:
                accelerator.ddp_handler.find_unused_parameters = module.leaves_unused
            self.call = accelerator.prepare_model(self.inside)

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, tuple[Tensor, Tensor]]:
        return self.call(*args, **kwargs)

    def sync(self, gradients: bool) -> AbstractContextManager[None]:
        """Whether the backward within adds ranks' gradients up, or leaves that to a later one."""
        return _nothing() if gradients else self._no_sync()

    def run(self, function: Callable[[Any], Any]) -> Any:
        """`function(student)` without gradients, with the weights that it needs at hand; all ranks
        call it."""
        training = self.inside.training
        self.inside.eval()
        try:
            with torch.no_grad():
                return self.inside(function=function)
        finally:
            self.inside.train(training)

    @contextmanager
    def _no_sync(self) -> Any:
        if not self.shards:
            with self.accelerator.no_sync(self.call):
                yield
            return
        self.call.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            self.call.set_requires_gradient_sync(True)

    def weights(self) -> dict[str, Tensor]:
        """The student's, whole and on the CPU; where they are sharded, on the main process alone,
        though all ranks call it."""
        state = self.inside.module.student.state_dict()
        whole = {
            name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in state.items()
        }
        if self.shards and not self.accelerator.is_main_process:
            return {}
        return {name: x.detach().cpu() for name, x in whole.items()}


def alone(accelerator: Accelerator, work: Callable[[], object]) -> None:
    """Do work on the main process alone. The others wait for it, for longer than a collective of
    theirs may take; what stops it stops them."""
    stop: BaseException | None = None
    group = None
    if accelerator.num_processes > 1:
        group = dist.new_group(backend="gloo", timeout=PATIENCE)
    if accelerator.is_main_process:
        try:
            work()
        except BaseException as error:
            stop = error
    if group is not None:
        reason = "" if stop is None else str(stop) or type(stop).__name__
        said = [(getattr(stop, "signum", None), reason)]
        dist.broadcast_object_list(said, src=0, group=group)
        if stop is None and (why := said[0]) != (None, ""):
            stop = DistillError(why[1]) if why[0] is None else Interrupted(why[0])
    if stop is not None:
        raise stop


def leave() -> None:
    """The other processes; the last thing that one does."""
    if dist.is_initialized():
        dist.destroy_process_group()


def clip(module: nn.Module, most: float | None) -> Tensor:
    """The norm of all gradients, which are scaled down to `most`."""
    parameters = [p for p in module.parameters() if p.grad is not None]
    limit = float("inf") if most is None else most
    norm = nn.utils.clip_grad_norm_(parameters, limit)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


@torch.no_grad()
def shard_teacher(teacher: Any, accelerator: Accelerator) -> None:
    """A part of each layer on each rank, gathered when it runs; all ranks call it."""
    if isinstance(teacher, FSDPModule):
        return
    policy = MixedPrecisionPolicy()
    _shard_layers(teacher.to(accelerator.device), accelerator, policy, reshard=True)
    # FSDP2 finds at a first call which module is the whole. Losses may leave the head out, and
    # would then make a whole of each layer.
    teacher(torch.zeros(1, 1, dtype=torch.int64, device=accelerator.device), use_cache=False)


def _shard(inside: Inside, accelerator: Accelerator, precision: str) -> FSDPModule:
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if precision == "bfloat16" else None, reduce_dtype=torch.float32
    )
    reshard = not inside.module.begins_within_layers
    inside.to(accelerator.device)
    _shard_layers(inside.module.student, accelerator, policy, reshard, root=inside)
    assert isinstance(inside, FSDPModule)
    return inside


def _shard_layers(
    model: Any,
    accelerator: Accelerator,
    policy: MixedPrecisionPolicy,
    reshard: bool,
    root: nn.Module | None = None,
) -> None:
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    options: dict[str, Any] = {"mesh": mesh, "mp_policy": policy, "reshard_after_forward": reshard}
    for layer in decoder_layers(model):
        fully_shard(layer, **options)
    # What the root is given is words, and log-probabilities that 16 bits would leave no digits of.
    options["mp_policy"] = replace(policy, cast_forward_inputs=False)
    fully_shard(model if root is None else root, **options)


@contextmanager
def _nothing() -> Any:
    yield


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor that may be sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
