"""Settings of every test: reproducible, and loud where memory is read before it is written."""

import os
from pathlib import Path

import hypothesis
import pytest
import torch

# Where there is no GPU, Triton's kernels run in its interpreter: on CPU tensors, and no faster than
# NumPy. Set before the package reads the environment.
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")

# CUDA kernels run on CPU tensors through the emulator, where `make emulated` has built it.
os.environ.setdefault(
    "XLSTM_CUDA_EMULATOR",
    "".join(map(str, Path(__file__).parents[1].glob("build/emulated/plain/*/_emulated*.so"))),
)

from xlstm_kernels.backends import CUDA_EMULATOR, TRITON_INTERPRETED, UNAVAILABLE

# The same examples in every run.
hypothesis.settings.register_profile(
    "fixed", derandomize=True, deadline=None, max_examples=25, database=None
)
hypothesis.settings.load_profile("fixed")


# The emulator takes its time. These run all of a kernel, and are what a fast run has of it.
QUICK_ON_EMULATOR = {
    *("test_dtypes", "test_packed_sequences", "test_slstm_options", "test_teams"),
    *("test_clusters", "test_one_step"),
    *("test_matches_torch", "test_reductions_and_weights", "test_hard_label_options_by_hand"),
    *("test_masked_vocabulary_equals_a_narrower_one", "test_inplace_gradient_of_views"),
    *("test_a_label_out_of_range_makes_its_row_nan", "test_an_id_out_of_range_makes_its_row_nan"),
    *("test_supports_by_their_formulas", "test_masked_and_missing"),
}

# Those of `backend` that bring their tensors to a GPU where Triton's kernels run there.
ON_ITS_DEVICE = {"test_against_the_oracle"}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """A test of a backend that this install lacks is skipped with the reason, not left out.

    On triton all tests are slow but those in test_*_triton*.py: in its interpreter a call takes
    long. Compiled for a GPU it runs those by case, which go there; tensors of others are not there.
    """
    missing = dict(UNAVAILABLE)
    if CUDA_EMULATOR is None:
        missing["cuda"] = "the emulator, which runs it on CPU tensors, is built by `make emulated`"
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        backend = params.get("backend") or getattr(params.get("case"), "backend", None)
        why = missing.get(backend)
        if backend == "cuda" and item.originalname not in QUICK_ON_EMULATOR:
            item.add_marker(pytest.mark.slow)
        if backend == "triton" and "triton" not in item.path.name:
            if TRITON_INTERPRETED:
                item.add_marker(pytest.mark.slow)
            elif "backend" in params and item.originalname not in ON_ITS_DEVICE:
                why = "its tensors are on the CPU"
        if why is not None:
            item.add_marker(pytest.mark.skip(reason=f"backend {backend!r}: {why}"))


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan():
    """torch.empty is filled with NaN, so that what a kernel does not write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def threads():
    """set(count) changes the size of torch's thread pool for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
