"""The package builds where there is only Python and a compiler, and says what it left out.

One build serves all tests: an sdist, unpacked, made into a wheel in a fresh environment.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
NVCC = shutil.which("nvcc")
CPU_FILES = {path.stem for path in (ROOT / "csrc" / "cpu").glob("*.cpp")}
# One worker runs them all, since they share a build.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("build")]
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc is not on PATH")


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Output of a command that must succeed; `environment` comes on top of a bare one."""
    done = attempt(*command, cwd=cwd, **environment)
    assert done.returncode == 0, done.stdout
    return done.stdout


def attempt(
    *command: str | Path, cwd: Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if not re.match(r"CUDA|XLSTM|CXX|PYTHON", k)}
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**kept, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def environment(path: Path) -> Path:
    """Python of a fresh virtual environment."""
    venv.create(path, with_pip=True, symlinks=True)
    return path / "bin" / "python"


@pytest.fixture(scope="module")
def path_without_nvcc(tmp_path_factory: pytest.TempPathFactory) -> str:
    """PATH, with each folder that has an nvcc replaced by one that has all the rest."""
    folders = []
    for folder in filter(os.path.isdir, os.environ["PATH"].split(os.pathsep)):
        if os.path.exists(os.path.join(folder, "nvcc")):
            shadow = tmp_path_factory.mktemp("bin")
            for tool in set(os.listdir(folder)) - {"nvcc"}:
                (shadow / tool).symlink_to(os.path.join(folder, tool))
            folder = str(shadow)
        folders.append(folder)
    return os.pathsep.join(folders)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked sdist, in a folder as people name theirs."""
    folder = tmp_path_factory.mktemp("sdist")
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
    # In a copy: the build backend writes into its working directory.
    copy = folder / "copy"
    listed = attempt("git", "ls-files", "-co", "--exclude-standard", cwd=ROOT)
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    run(sys.executable, "-c", code, cwd=copy)
    (archive,) = folder.glob("*.tar.gz")
    shutil.unpack_archive(archive, folder / "my code")
    return folder / "my code" / archive.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def wheel(tree: Path, path_without_nvcc: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built under isolation with neither torch nor nvcc in sight."""
    folder = tmp_path_factory.mktemp("wheel")
    python = environment(folder / "venv")
    command = [python, "-m", "pip", "-v", "wheel", "--no-deps", "-w", folder, tree]
    output = run(*command, cwd=folder, PATH=path_without_nvcc)
    assert output.count("nvcc not found") == 1, output
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of a second fresh environment that has the wheel, and this one's torch."""
    folder = tmp_path_factory.mktemp("installed")
    python = environment(folder / "venv")
    run(python, "-m", "pip", "install", "--no-deps", "--no-index", wheel, cwd=folder)
    (site,) = (folder / "venv").glob("lib/python*/site-packages")
    (site / "torch.pth").write_text(f"{Path(torch.__file__).parent.parent}\n")
    return python


@pytest.fixture(scope="module")
def objects(tree: Path, wheel: Path, path_without_nvcc: str) -> Path:
    """The build folder of `tree`, up to date for the Python that runs the tests."""
    (folder,) = (tree / "build").glob("temp.*")
    kernels = {path: path.stat().st_mtime_ns for path in folder.glob("_cpu/*.*.o")}
    run(sys.executable, "setup.py", "build_ext", cwd=tree, PATH=path_without_nvcc)
    assert kernels == {path: path.stat().st_mtime_ns for path in folder.glob("_cpu/*.*.o")}, (
        "another environment's headers rebuilt kernels that do not include them"
    )
    return folder


def test_sdist_holds_every_source(tree: Path) -> None:
    sources = {path.relative_to(ROOT / "csrc") for path in (ROOT / "csrc").rglob("*.[hc]*")}
    assert sources == {path.relative_to(tree / "csrc") for path in (tree / "csrc").rglob("*.[hc]*")}


def test_wheel_holds_what_it_should(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert "xlstm_kernels/py.typed" in names
    assert {"distill/presets/linearize-paper.yaml", "distill/launch/8-gpus.yaml"} <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    compiled = [name for name in names if name.endswith(".so")]
    assert len(compiled) == 1 and compiled[0].startswith("xlstm_kernels/_cpu.")
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {
        "xlstm_kernels",
        "distill",
    }


def test_wheel_works_in_a_fresh_environment(installed: Path, tmp_path: Path) -> None:
    program = """if True:
        import torch, xlstm_kernels as xk
        from xlstm_kernels.testing import relative_error
        x = torch.randn(3, 17, 4, 2, 5, requires_grad=True)
        r = torch.randn(4, 2, 5, 5, requires_grad=True)
        h, _ = xk.slstm(x, r, backend="cpu")
        h.sum().backward()
        exact, _ = xk.slstm(x.double(), r.double(), backend="reference")
        assert relative_error(h, exact) < 1e-6, relative_error(h, exact)
        print(xk.__file__)
    """
    assert str(tmp_path.parent.parent) in run(installed, "-c", program, cwd=tmp_path)
    report = run(installed, "-m", "xlstm_kernels", cwd=tmp_path)
    assert "nvcc was not found when the package was installed" in report


def test_binary_knows_no_torch(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    (binary,) = tmp_path.glob("xlstm_kernels/_cpu.*")
    symbols = run("nm", "-D", "-C", binary, cwd=tmp_path)
    assert not re.findall(r".*(?:torch|c10|\bat::).*", symbols)
    assert not re.findall(r".* U .*xlstm.*", symbols), "declared and used, but not defined"
    exported = run("nm", "-D", "--defined-only", binary, cwd=tmp_path)
    assert [line.split()[-1] for line in exported.splitlines()] == ["PyInit__cpu"]
    libraries = re.findall(r"NEEDED.*\[([^.\]]+)", run("readelf", "-d", binary, cwd=tmp_path))
    assert set(libraries) <= {"libstdc++", "libm", "libgcc_s", "libc", "ld-linux-x86-64"}


def test_shared_code_is_not_compiled_for_one_instruction_set(objects: Path) -> None:
    """The linker keeps one of several equal inline functions, and it must run on every CPU."""
    leaks = []
    for path in objects.glob("_cpu/*.*.o"):
        isa = path.name.split(".")[1]
        for line in run("nm", "-C", "--defined-only", path, cwd=objects).splitlines():
            _, kind, symbol = line.split(maxsplit=2)
            if kind in "WVu" and "xlstm::" in symbol and f"xlstm::{isa}::" not in symbol:
                leaks.append(f"{path.name}: {symbol}")
    assert not leaks, "\n".join(leaks)
    # What is left, the standard library's, comes from the first object in this order.
    link = re.search(
        r"build xlstm_kernels._cpu.so: link (.*) \|", (objects / "build.ninja").read_text()
    )
    assert link is not None
    isas = [name.split(".")[1] for name in link.group(1).split() if name.count(".") == 2]
    order = ["baseline", "avx2", "avx512", "amx"]
    assert isas == sorted(isas, key=order.index)


def outdated(objects: Path) -> set[str]:
    """What ninja would build now."""
    ninja = shutil.which(
        "ninja", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    )
    return set(re.findall(r"-o (\S+\.o)", run(ninja or "ninja", "-n", "-v", cwd=objects)))


@pytest.mark.parametrize(
    ("header", "users"),
    [
        ("cpu/dispatch.h", {"bind", "dispatch"}),
        ("cells/lstm.h", {name for name in CPU_FILES if name.startswith("recurrence")}),
        ("launch.h", CPU_FILES | {"bind"}),
    ],
)
def test_edit_of_a_header_rebuilds_its_users(
    tree: Path, objects: Path, header: str, users: set[str]
) -> None:
    path = tree / "csrc" / header
    before = path.stat()
    assert outdated(objects) == set()
    os.utime(path)
    try:
        assert {Path(name).name.partition(".")[0] for name in outdated(objects)} == users
    finally:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("archs", ["", "ninety", "80;;90", "sm_90"])
def test_bad_architectures_are_named(tree: Path, tmp_path: Path, archs: str) -> None:
    (tmp_path / "nvcc").symlink_to("/bin/false")
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    command = [sys.executable, "setup.py", "build_ext", "-b", tmp_path, "-t", tmp_path]
    done = attempt(*command, cwd=tree, PATH=path, XLSTM_CUDA_ARCHS=archs)
    assert done.returncode != 0
    assert "XLSTM_CUDA_ARCHS must be compute capabilities such as '80;90a;100'" in done.stdout
    assert f"got {archs!r}" in done.stdout


def test_failing_nvcc_fails_the_build(tree: Path, objects: Path, tmp_path: Path) -> None:
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'broken on purpose' >&2\nexit 1\n")
    nvcc.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = attempt(*(sys.executable, "setup.py", "build_ext", "-b", tmp_path), cwd=tree, PATH=path)
    assert done.returncode != 0
    assert "broken on purpose" in done.stdout
    assert "compiling failed" in done.stdout
    assert not list(tmp_path.rglob("*.so"))


@needs_nvcc
def test_architectures_are_those_asked_for(tree: Path, objects: Path, tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "build_ext", "-b", tmp_path]
    run(*command, cwd=tree, XLSTM_CUDA_ARCHS="80,90a")
    (binary,) = tmp_path.glob("xlstm_kernels/_cuda.*")
    assert not re.findall(r"torch|c10|\bat::", run("nm", "-D", "-C", binary, cwd=tmp_path))
    program = "import _cuda; print(*_cuda.archs())"
    found = run(sys.executable, "-c", program, cwd=tmp_path, PYTHONPATH=str(binary.parent))
    assert found.split() == ["80", "90a"]
    if cuobjdump := find_cuobjdump(tmp_path):
        code = run(cuobjdump, "--list-elf", "--list-ptx", binary, cwd=tmp_path)
        assert set(re.findall(r"sm_\w+\.cubin", code)) == {"sm_80.cubin", "sm_90a.cubin"}
        assert set(re.findall(r"sm_\w+\.ptx", code)) == {"sm_90a.ptx"}


def find_cuobjdump(folder: Path) -> str | None:
    """It stands beside the real nvcc, which may be behind a wrapper on PATH."""
    here = re.search(r"_HERE_=(\S+)", run("nvcc", "--dryrun", "-E", "x.cu", cwd=folder))
    return shutil.which("cuobjdump", path=here.group(1)) if here else None
