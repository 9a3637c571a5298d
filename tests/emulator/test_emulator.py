"""The emulator computes what the hardware would, and catches the bugs that it is there for: they
are planted in fixtures.cu, and each build must find its kind."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
SOURCE = ROOT / "csrc"
SOUND = ["block_sum", "cluster", "handed_round", "chain", "mma_bf16", "mma_tf32"]
SANITIZERS = {"plain": "", "address": "address,undefined", "thread": "thread"}
# What must be found by which build, and the words that say so.
PLANTED = [
    ("address", "index_past_the_end", "AddressSanitizer: heap-buffer-overflow"),
    ("thread", "missing_barrier", "ThreadSanitizer: data race"),
    ("thread", "missing_await", "ThreadSanitizer: data race"),
    ("thread", "two_writers", "ThreadSanitizer: data race"),
    ("plain", "deadlock", "deadlock: 48 threads wait, 48 have ended; the first that waits is"),
    ("plain", "too_much_shared", "takes 16 bytes of shared memory, the launch asked for 4"),
]
KERNELS = {"two_writers": "two_writers_kernel", "missing_await": "handed_round_kernel"}
# One worker compiles each program, once.
pytestmark = [pytest.mark.xdist_group("emulator"), pytest.mark.medium]


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """fixtures.cu as a program, with each sanitizer; the emulator itself is compiled without."""
    folder = tmp_path_factory.mktemp("fixtures")
    compiler = [os.environ.get("CXX", "g++"), "-std=c++17", "-O1", "-g1", f"-I{SOURCE}"]
    objects = []
    for source in sorted((SOURCE / "emulator").glob("*.cpp")):
        objects.append(folder / f"{source.stem}.o")
        subprocess.run([*compiler, "-c", source, "-o", objects[-1]], check=True)
    builds = {}
    for name, sanitizer in SANITIZERS.items():
        builds[name] = folder / name
        flags = [f"-fsanitize={sanitizer}"] if sanitizer else []
        flags += ["-DXLSTM_EMULATED", f"-I{SOURCE / 'emulator' / 'include'}"]
        fixtures = ["-x", "c++", Path(__file__).parent / "fixtures.cu", "-x", "none"]
        subprocess.run([*compiler, *flags, *fixtures, *objects, "-o", builds[name]], check=True)
    return builds


def run(program: Path, fixture: str) -> subprocess.CompletedProcess[str]:
    options = {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "halt_on_error=1"}
    return subprocess.run(
        [program, fixture], capture_output=True, text=True, env={**os.environ, **options}
    )


@pytest.mark.parametrize("fixture", SOUND)
@pytest.mark.parametrize("build", SANITIZERS)
def test_sound_kernels_give_their_results(
    programs: dict[str, Path], build: str, fixture: str
) -> None:
    done = run(programs[build], fixture)
    assert done.returncode == 0 and done.stderr == "", done.stderr


@pytest.mark.parametrize(("build", "fixture", "words"), PLANTED)
def test_planted_bugs_are_found(
    programs: dict[str, Path], build: str, fixture: str, words: str
) -> None:
    done = run(programs[build], fixture)
    assert done.returncode != 0
    assert words in done.stderr, done.stderr
    if build != "plain":
        kernel = KERNELS.get(fixture, "block_sum_kernel")
        assert f"in {kernel}" in done.stderr or f" {kernel}" in done.stderr, done.stderr
