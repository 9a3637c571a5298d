"""Builds `xlstm_kernels._cpu` always, and `xlstm_kernels._cuda` when nvcc is found.

Nothing here imports torch, so `pip install .` works under build isolation. Environment:
  XLSTM_CUDA_ARCHS   compute capabilities, "80;90a;100"; the last also goes in as PTX
  XLSTM_SANITIZE     value for -fsanitize=, "address,undefined" (for the test-suite)
  CUDA_HOME          where bin/nvcc is, when it is not on PATH
"""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
SOURCE = ROOT / "csrc"
DEFAULT_CUDA_ARCHS = "80;90a;100"

# One object per kernel and instruction set; the launcher picks at run time.
ISA_FLAGS = {
    "x86_64": {
        "baseline": "",
        "avx2": "-mavx2 -mfma -mf16c",
        "avx512": "-mavx512f -mavx512dq -mavx512bw -mavx512vl -mfma -mf16c"
        " -mprefer-vector-width=512",
    },
    "aarch64": {"baseline": ""},
    "arm64": {"baseline": ""},
}
MACHINE = {"AMD64": "x86_64"}.get(platform.machine(), platform.machine())
CXX_FLAGS = (
    "-std=c++17 -O3 -g0 -fPIC -fvisibility=hidden -Wall -Wextra -Wno-psabi -Wno-ignored-attributes"
    " -Wno-maybe-uninitialized"  # gcc 12 warns inside its own AVX-512 header
    " -ffp-contract=fast -fno-math-errno -fno-trapping-math"
)


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=f"{home}/bin" if home else None)


def find_ninja() -> str:
    try:
        import ninja

        return str(Path(ninja.BIN_DIR) / "ninja")
    except ImportError:
        return "ninja"


def gencode(archs: str) -> str:
    names = [a.strip() for a in archs.replace(",", ";").split(";") if a.strip()]
    if not names:
        sys.exit("XLSTM_CUDA_ARCHS is empty; expected compute capabilities such as '80;90a'")
    sass = [f"-gencode arch=compute_{a},code=sm_{a}" for a in names]
    return " ".join([*sass, f"-gencode arch=compute_{names[-1]},code=compute_{names[-1]}"])


class BuildNinja(build_ext):
    """Writes one build.ninja for all extensions; depfiles make header edits rebuild their users."""

    def build_extensions(self) -> None:
        temp = Path(self.build_temp).resolve()
        temp.mkdir(parents=True, exist_ok=True)
        includes = f"-I{SOURCE} -I{pybind11.get_include()} -I{sysconfig.get_path('include')}"
        sanitize = os.environ.get("XLSTM_SANITIZE", "")
        extra = f" -fsanitize={sanitize} -fno-omit-frame-pointer -g1" if sanitize else ""
        cuda = f"{gencode(os.environ.get('XLSTM_CUDA_ARCHS', DEFAULT_CUDA_ARCHS))}"
        cxx = os.environ.get("CXX", "g++")
        depfile = "  depfile = $out.d\n  deps = gcc\n"
        lines = [
            f"rule cxx\n  command = {cxx} -MMD -MF $out.d {includes} {CXX_FLAGS}{extra}"
            f" $flags -c $in -o $out\n{depfile}",
            f"rule link\n  command = {cxx} -shared $in{extra} -o $out\n",
            f"rule nvcc\n  command = {find_nvcc()} -MMD -MF $out.d -I{SOURCE} -std=c++17 -O3"
            f" {cuda} -DXLSTM_CUDA_ARCHS_BUILT=$archs -Xcompiler -fPIC,-fvisibility=hidden"
            f" $flags -c $in -o $out\n{depfile}",
            f"rule nvlink\n  command = {find_nvcc()} -shared -cudart static $in -o $out\n",
        ]
        for ext in self.extensions:
            lines += self.edges(ext, temp)
        (temp / "build.ninja").write_text("\n".join(lines) + "\n")
        command = [find_ninja(), "-C", str(temp), *(["-v"] if self.verbose > 1 else [])]
        if subprocess.run(command).returncode:
            sys.exit("xlstm_kernels: compiling failed, see the compiler's message above")
        for ext in self.extensions:
            target = Path(self.get_ext_fullpath(ext.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(temp / f"{ext.name}.so", target)

    def edges(self, ext: Extension, temp: Path) -> list[str]:
        """Ninja edges of one extension: its objects (CPU kernels once per ISA), then the link."""
        module = ext.name.rsplit(".", 1)[1]
        objects, lines = [], []

        def edge(rule: str, source: Path, name: str, flags: str) -> None:
            objects.append(f"{module}/{name}.o")
            lines.append(f"build {objects[-1]}: {rule} {source}\n  flags = {flags}\n")

        define = f"-DXLSTM_MODULE={module} -DXLSTM_BUILD{module.upper()}"
        edge("cxx", SOURCE / "bind.cpp", "bind", define)
        if module == "_cpu":
            edge("cxx", SOURCE / "cpu" / "dispatch.cpp", "dispatch", "")
            for isa, flags in ISA_FLAGS.get(MACHINE, {"baseline": ""}).items():
                for source in sorted(SOURCE.glob("cpu/*.cpp")):
                    if source.stem != "dispatch":
                        name = f"{source.stem}.{isa}"
                        edge("cxx", source, name, f"{flags} -DXLSTM_ISA={isa}")
        else:
            for source in sorted(SOURCE.glob("cuda/*.cu")):
                edge("nvcc", source, source.stem, "")
        link = "link" if module == "_cpu" else "nvlink"
        lines.append(f"build {ext.name}.so: {link} {' '.join(objects)}\n")
        return lines


extensions = [Extension("xlstm_kernels._cpu", [])]
if find_nvcc():
    extensions.append(Extension("xlstm_kernels._cuda", []))
else:
    print("xlstm_kernels: nvcc not found, building without the CUDA backend", file=sys.stderr)

setup(ext_modules=extensions, cmdclass={"build_ext": BuildNinja})
