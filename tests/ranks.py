"""Processes that form a gloo group, for tests of what is split over `torch.distributed`."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def run_on_ranks(
    ranks: int, function: Callable[..., Any], *arguments: Any, timeout_s: float = 120.0
) -> list[Any]:
    """What `function(rank, *arguments)` returns on each rank. Where one fails or time runs out, all
    are killed: AssertionError with its traceback."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(
                target=_rank, args=(rank, ranks, folder, timeout_s, function, arguments)
            )
            for rank in range(ranks)
        ]
        try:
            for process in processes:
                process.start()
            deadline = time.monotonic() + timeout_s
            running = {process.sentinel: process for process in processes}
            while running and not any(process.exitcode for process in processes):
                ended = wait(running, timeout=max(0.0, deadline - time.monotonic()))
                if not ended:
                    break
                for sentinel in ended:
                    running.pop(sentinel).join()
        finally:
            for process in processes:
                process.kill()
                process.join()
        failures = [path.read_text() for path in sorted(Path(folder).glob("*.txt"))]
        codes = [process.exitcode for process in processes]
        assert codes == [0] * ranks, "\n".join([f"exit codes {codes}", *failures])
        return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(ranks)]


def _rank(
    rank: int,
    ranks: int,
    folder: str,
    timeout_s: float,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # needs no host name that resolves
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=ranks,
            timeout=timedelta(seconds=timeout_s),
        )
        torch.save(function(rank, *arguments), Path(folder) / f"{rank}.pt")
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        (Path(folder) / f"{rank}.txt").write_text(f"rank {rank}:\n{traceback.format_exc()}")
        raise SystemExit(1) from None
