"""Builds `xlstm_kernels._cpu` always, and `xlstm_kernels._cuda` when nvcc is found.

Nothing here imports torch, so `pip install .` works under build isolation. Environment:
  CXX                the C++17 compiler, g++ unless said otherwise; clang++ works too
  CUDA_HOME          where bin/nvcc is looked for before PATH
  XLSTM_CUDA_ARCHS   compute capabilities, "80;90a;100"; the last also goes in as PTX
  XLSTM_SANITIZE     value for -fsanitize=, "address,undefined" (`make sanitize`)
  XLSTM_EMULATED     1: builds `_emulated` alone, the CUDA sources for the host, which tests load
                     (`make emulated`; csrc/emulator/README.md)
"""

import os
import platform
import re
import shlex
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


def word(path: object) -> str:
    """A path as one word of a shell command that ninja runs, whatever characters are in it."""
    return shlex.quote(str(path)).replace("$", "$$")


# One object per kernel and instruction set; cpu/dispatch.cpp picks at run time. Plainest first: of
# inline functions of the standard library that several objects hold, the linker keeps the first.
AVX512 = "-mavx512f -mavx512dq -mavx512bw -mavx512vl -mfma -mf16c -mprefer-vector-width=512"
ISA_FLAGS = {
    "x86_64": {
        "baseline": "",
        "avx2": "-mavx2 -mfma -mf16c",
        "avx512": AVX512,
        "amx": f"{AVX512} -mavx512bf16 -mamx-tile -mamx-bf16",
    },
}
# Of an instruction set that has something to add to the one before it for these kernels only.
ISA_KERNELS = {"amx": ("mlstm_forward", "mlstm_backward")}
MACHINE = {"AMD64": "x86_64"}.get(platform.machine(), platform.machine())
SANITIZE = os.environ.get("XLSTM_SANITIZE", "")
EMULATED = os.environ.get("XLSTM_EMULATED") == "1"
CXX_FLAGS = (
    "-std=c++17 -fPIC -fvisibility=hidden -Wall -Wextra -Wno-psabi -Wno-ignored-attributes"
    " -Wno-uninitialized -Wno-maybe-uninitialized"  # gcc 12 warns inside its AVX-512 header
    " -ffp-contract=fast -fno-math-errno -fno-trapping-math"
) + (f" -O1 -g1 -fno-omit-frame-pointer -fsanitize={SANITIZE}" if SANITIZE else " -O3 -g0")
# -O1: the compiler takes as long as all tests that run through the result.
EMULATED_FLAGS = (
    f"-x c++ -O1 -Wno-unknown-pragmas -DXLSTM_EMULATED -I{word(SOURCE / 'emulator' / 'include')}"
)


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    path = os.environ.get("PATH", os.defpath)
    return shutil.which("nvcc", path=f"{home}/bin{os.pathsep}{path}" if home else path)


def find_ninja() -> str:
    try:
        import ninja
    except ImportError:
        return "ninja"
    return str(Path(ninja.BIN_DIR) / "ninja")


def cuda_archs() -> list[str]:
    asked = os.environ.get("XLSTM_CUDA_ARCHS", DEFAULT_CUDA_ARCHS)
    archs = [arch.strip() for arch in asked.replace(",", ";").split(";")]
    if not all(re.fullmatch(r"\d{2,3}[af]?", arch) for arch in archs):
        sys.exit(
            f"XLSTM_CUDA_ARCHS must be compute capabilities such as {DEFAULT_CUDA_ARCHS!r},"
            f" got {asked!r}"
        )
    return archs


def rules() -> str:
    """Ninja's rules. Only `bind` sees the headers of Python and pybind11."""
    cxx = os.environ.get("CXX", "g++")
    python = f"-I{word(pybind11.get_include())} -I{word(sysconfig.get_path('include'))}"
    compile_cxx = f"{cxx} -MMD -MF $out.d -I{word(SOURCE)} {CXX_FLAGS} $flags -c $in -o $out"
    exports = "-Wl,--version-script=exports" if sys.platform == "linux" else ""
    text = f"""
rule cxx
  command = {compile_cxx}
  description = {cxx} $out
  depfile = $out.d
  deps = gcc
rule bind
  command = {compile_cxx} {python} '-DXLSTM_SANITIZERS="{SANITIZE}"'
  description = {cxx} $out
  depfile = $out.d
  deps = gcc
rule link
  command = {cxx} -shared $in {f"-fsanitize={SANITIZE}" if SANITIZE else ""} {exports} -o $out
  description = link $out
"""
    if nvcc := find_nvcc():
        archs = cuda_archs()
        code = " ".join(f"-gencode arch=compute_{a},code=sm_{a}" for a in archs)
        text += f"""
rule nvcc
  command = {word(nvcc)} -MMD -MF $out.d -I{word(SOURCE)} -std=c++17 -O3 {code} $
      -gencode arch=compute_{archs[-1]},code=compute_{archs[-1]} $
      -Xcompiler -fPIC,-fvisibility=hidden '-DXLSTM_CUDA_ARCHS="{";".join(archs)}"' $
      -c $in -o $out
  description = nvcc $out
  depfile = $out.d
  deps = gcc
rule nvlink
  command = {word(nvcc)} -shared -cudart static $in $
      {exports and "-Xlinker=--version-script=exports"} -o $out
  description = link $out
"""
    return text


def escaped(path: Path) -> str:
    """A path as ninja reads it beside others; in commands it quotes them itself."""
    return re.sub(r"[$ :]", r"$\g<0>", str(path))


def edges(ext: Extension) -> str:
    """Ninja's edges of one extension: its objects (CPU kernels once per ISA), then the link."""
    module = ext.name.rsplit(".", 1)[1]
    build = "_CPU" if module == "_cpu" else "_CUDA"
    define = f"-DXLSTM_MODULE={module} -DXLSTM_BUILD{build}"
    if EMULATED:
        define += " -DXLSTM_EMULATED"
    objects = [("bind", SOURCE / "bind.cpp", f"{module}/bind.o", define)]
    if module == "_cpu":
        kernels = sorted(SOURCE.glob("cpu/*.cpp"))
        kernels.remove(dispatch := SOURCE / "cpu" / "dispatch.cpp")
        objects.append(("cxx", dispatch, "_cpu/dispatch.o", ""))
        for isa, flags in ISA_FLAGS.get(MACHINE, {"baseline": ""}).items():
            for source in kernels:
                if source.stem not in ISA_KERNELS.get(isa, (source.stem,)):
                    continue
                name = f"_cpu/{source.stem}.{isa}.o"
                objects.append(("cxx", source, name, f"{flags} -DXLSTM_ISA={isa}"))
    for source in sorted(SOURCE.glob("cuda/*.cu")) if build == "_CUDA" else ():
        rule, flags = ("cxx", EMULATED_FLAGS) if EMULATED else ("nvcc", "")
        objects.append((rule, source, f"{module}/{source.stem}.o", flags))
    # The emulator tells the sanitizers what they need to know; it is not what they look at.
    for source in sorted(SOURCE.glob("emulator/*.cpp")) if EMULATED else ():
        objects.append(("cxx", source, f"{module}/{source.stem}.o", "-fno-sanitize=all"))
    text = "".join(
        f"build {o}: {rule} {escaped(s)}\n  flags = {flags}\n" for rule, s, o, flags in objects
    )
    link = "nvlink" if module == "_cuda" else "link"
    return f"{text}build {ext.name}.so: {link} {' '.join(o for _, _, o, _ in objects)} | exports\n"


def write(path: Path, text: str) -> None:
    """Leaves the time stamp of an unchanged file alone: ninja rebuilds what is newer."""
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


class BuildNinja(build_ext):
    """Runs one build.ninja for all extensions."""

    def build_extensions(self) -> None:
        if not find_nvcc() and not EMULATED:
            print("xlstm_kernels: nvcc not found, building without CUDA", file=sys.stderr)
        # An editable install gets a fresh build_temp each time, which would compile everything.
        tag = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        temp = ROOT / "build" / f"editable.{tag}" if self.editable_mode else Path(self.build_temp)
        temp.mkdir(parents=True, exist_ok=True)
        write(temp / "exports", "{ global: PyInit_*; local: *; };\n")
        write(temp / "build.ninja", rules() + "".join(map(edges, self.extensions)))
        command = [find_ninja(), "-C", str(temp), *(["-v"] if self.verbose > 1 else [])]
        if subprocess.run(command).returncode:
            sys.exit("xlstm_kernels: compiling failed, the compiler's message is above")
        for ext in self.extensions:
            target = Path(self.get_ext_fullpath(ext.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(temp / f"{ext.name}.so", target)


modules = ["_cpu", "_cuda"] if find_nvcc() and not SANITIZE else ["_cpu"]
if EMULATED:
    modules = ["_emulated"]
setup(
    ext_modules=[Extension(f"xlstm_kernels.{module}", []) for module in modules],
    cmdclass={"build_ext": BuildNinja},
)
