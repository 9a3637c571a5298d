"""The sanitizers of `make sanitize` watch: a clean run of a blind build would prove nothing."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from xlstm_kernels.backends import load_cpu

WANTED = os.environ.get("XLSTM_SANITIZE", "")
pytestmark = pytest.mark.skipif(not WANTED, reason="only in `make sanitize`")


def test_the_build_in_use_is_the_sanitized_one() -> None:
    assert load_cpu().sanitizers == WANTED


def test_write_beyond_a_buffer_is_reported() -> None:
    program = """if True:
        import torch
        from xlstm_kernels.backends import load_cpu
        x, r = torch.zeros(1, 9, 4, 1, 7), torch.zeros(4, 1, 7, 7)
        h_too_short, last = torch.zeros(1, 8, 1, 7), torch.zeros(4, 1, 1, 7)
        load_cpu().recurrence_forward(
            0, 1, (1, 9, 1, 7), 0, x.data_ptr(), x.stride()[:4], r.data_ptr(), 0, 0, 0.0,
            h_too_short.data_ptr(), last.data_ptr(), 0, 0)
    """
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in run.stderr
    assert "ForwardTask" in run.stderr, "the stack names the kernel"
