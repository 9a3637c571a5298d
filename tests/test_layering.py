"""Who may import whom, what is named alike in every room, and how long things may get."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from xlstm_kernels.backends import load_cpu
from xlstm_kernels.ops.mlstm import shapes as mlstm_shapes
from xlstm_kernels.ops.recurrence import shapes as recurrence_shapes

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "xlstm_kernels"
SOURCE = ROOT / "csrc"

# The files of an operation's folder that have no role by name.
HELPERS = r"{op}\.(?!(api|op|reference|cpu|cuda|triton)$)\w+"
# Module (within xlstm_kernels, by regular expression) -> modules of the package that it may import.
# {op} is the operation's own folder. The first match counts.
MAY_IMPORT = {
    r"__init__": r"backends|cells|nn|compat|replace|ops\.\w+",
    r"__main__": r"|backends|ops\.recurrence\.(launch|launch_table)",
    r"backends": r"_cpu|_cuda",
    r"library|memory|gemm": r"backends",
    r"arguments": r"(?!)",
    r"testing": r"cells|backends|ops\.\w+",
    r"cells(\.\w+)?": r"cells\.\w+",
    r"nn(\.\w+)?": r"nn\.\w+|cells|arguments|backends|ops\.\w+\.(api|arguments)",
    # The libraries themselves are imported by their own file of compat alone.
    r"replace": r"compat\.(swap|handwritten)",
    r"compat(\.\w+)?": r"compat\.\w+|nn|cells|backends|arguments|ops\.\w+\.api",
    r"ops": r"ops\.\w+",
    r"ops\.(?P<op>\w+)": r"{op}\.api",
    # A step takes the options of a sequence, and its gradient is that of a short one.
    r"ops\.(?P<op>mlstm_step)\.(api|arguments)": r"{op}\.(op|reference|arguments|shapes)"
    r"|ops\.mlstm\.(api|arguments)|backends|cells|arguments",
    r"ops\.mlstm_step\.triton_kernel": r"ops\.mlstm\.triton_tiles|cells\.triton_math",
    # Another target of the same rows of student logits.
    r"ops\.(?P<op>kl_div)\.(compiled|verbs)": rf"{HELPERS}|memory|cells",
    r"ops\.(?P<op>kl_div)\.triton_launch": rf"{HELPERS}|cells|backends|memory",
    r"ops\.(?P<op>topk_kl_div)\.(cpu|cuda|compiled|triton)": rf"{HELPERS}|cells|backends|memory"
    r"|ops\.kl_div\.(compiled|options|ranks|rows|triton_launch|verbs)",
    r"ops\.(?P<op>topk_kl_div)\.op": rf"{{op}}\.(cpu|cuda|triton)|{HELPERS}|ops\.kl_div\.op"
    r"|backends",
    r"ops\.(?P<op>topk_kl_div)\.\w+": r"{op}\.(?!cpu$|cuda$|triton$)\w+"
    r"|ops\.kl_div\.(?!api$|cpu$|cuda$|triton$)\w+|cells",
    # Products, and then the rows of logits are those of kl_div and topk_kl_div.
    r"ops\.(?P<op>linear_kl_div)\.(?P<backend>cpu|cuda|triton)": rf"{HELPERS}|memory"
    r"|ops\.(topk_)?kl_div\.{backend}",
    r"ops\.(?P<op>linear_kl_div)\.\w+": r"{op}\.\w+|backends|library|cells|arguments|memory|gemm"
    r"|ops\.(topk_)?kl_div\.(?!api$|cpu$|cuda$|triton$)\w+",
    r"ops\.(?P<op>\w+)\.api": r"{op}\.(?!cpu$|cuda$|triton$)\w+|backends|cells(\.\w+)?|arguments",
    r"ops\.(?P<op>\w+)\.op": rf"{{op}}\.(cpu|cuda|triton)|{HELPERS}|backends|library|cells",
    r"ops\.(?P<op>\w+)\.(cpu|cuda|triton)": rf"{HELPERS}|backends|memory|arguments|cells(\.\w+)?",
    r"ops\.(?P<op>\w+)\.triton_launch": rf"{HELPERS}|cells(\.\w+)?|arguments|memory",
    r"ops\.(?P<op>\w+)\.\w+": rf"{HELPERS}|cells(\.\w+)?|arguments",
}
# What the programs around the package see of it.
PUBLIC = {"", "nn", "testing"}

# File within csrc (by regular expression) -> files that it may include. The first match counts.
MAY_INCLUDE = {
    r"bind\.cpp": r"launch\.h|common/.*|cpu/dispatch\.h|emulator/machine\.h"
    r"|cuda/(device|recurrence_launch|row_launch)\.h|Python\.h|pybind11/.*",
    r"launch\.h": r"cells/list\.h|common/dtype\.h",
    r"common/.*": r"common/.*",
    r"cells/.*": r"cells/.*|common/.*|launch\.h",
    r"cpu/.*": r"cpu/.*|cells/.*|common/.*|launch\.h",
    r"cuda/.*": r"cuda/.*|cells/.*|common/.*|launch\.h|cuda_\w+\.h|cooperative_groups\.h"
    r"|emulator/(shared|sync|mma)\.h",
    r"emulator/.*": r"emulator/.*|cuda_runtime\.h",
}
# Operations that run another's compiled kernels, and have none of their own.
KERNELS_OF = {"linear_kl_div": "kl_div"}
# Operations whose fused kernels are torch's.
WITHOUT_KERNELS = {"sliding_window_attention"}
SYSTEM_HEADER = r"[a-z_0-9]+|immintrin\.h|ucontext\.h|arm_neon\.h|unistd\.h|sys/\w+\.h"

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
# Longer than that, and why.
LONG_FILES: dict[str, str] = {}
LONG_FUNCTIONS = {
    "csrc/cpu/recurrence_backward.cpp:operator()": "a tile's buffers, chunks, states, in reverse",
    # Kernels, whose set-up and loop share what is in registers.
    "csrc/cuda/recurrence_backward.cu:__launch_bounds__": "matrix, units, chunks in reverse, steps",
    "csrc/cuda/recurrence_forward.cu:__launch_bounds__": "matrix, bias, units, steps",
    "csrc/cuda/recurrence_team_backward.cu:__launch_bounds__": "matrix, work, unit, steps",
    "csrc/cuda/recurrence_team_forward.cu:__launch_bounds__": "matrix, work, unit, steps",
    "distill/cli/demo.py:add": "one add_argument after the other",
    **{
        f"xlstm_kernels/ops/mlstm/{kernel}": "a kernel's parameters stand one on a line"
        for kernel in (
            "triton_dkeys.py:gates_kernel",
            "triton_dkeys.py:keys_kernel",
            "triton_dstates.py:dstates_kernel",
            "triton_gradients.py:queries_kernel",
            "triton_outputs.py:outputs_kernel",
            "triton_states.py:states_kernel",
        )
    },
    **{
        f"xlstm_kernels/ops/{kernel}": "a kernel's parameters stand one on a line"
        for kernel in (
            "kl_div/triton_kernel.py:kl_div_kernel",
            "mlstm_step/triton_kernel.py:step_kernel",
            "recurrence/triton_backward.py:backward_kernel",
            "recurrence/triton_forward.py:forward_kernel",
            "recurrence/triton_step.py:step_kernel",
            "sliding_window_attention/triton_keys.py:keys_kernel",
            "sliding_window_attention/triton_keys.py:sinks_kernel",
            "topk_kl_div/triton_kernel.py:topk_kl_div_kernel",
        )
    },
}


def tracked(*patterns: str) -> list[Path]:
    """Files under version control; where there is none (an unpacked sdist), all of them."""
    found = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", *patterns],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if found.returncode:
        return sorted(path for pattern in patterns for path in ROOT.rglob(pattern))
    return [path for line in found.stdout.splitlines() if (path := ROOT / line).exists()]


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def imports(path: Path) -> Iterator[str]:
    """Absolute names of the modules that a file imports, at the top or inside a function."""
    package = ["xlstm_kernels", *path.relative_to(PACKAGE).parts[:-1]] if in_package(path) else []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                name = f"{module}.{alias.name}"
                yield name if is_module(name) else module


def in_package(path: Path) -> bool:
    return path.is_relative_to(PACKAGE)


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def within(name: str) -> str | None:
    """The part of a module's name after `xlstm_kernels`, or None for another package's."""
    top, _, rest = name.partition(".")
    return rest if top == "xlstm_kernels" else None


def test_python_imports_follow_the_layers() -> None:
    wrong = []
    for path in tracked("xlstm_kernels/*.py"):
        name = module_name(path)
        room, allowed = next(
            (match, allowed)
            for room, allowed in MAY_IMPORT.items()
            if (match := re.fullmatch(room, name))
        )
        named = room.groupdict()
        allowed = allowed.replace("{op}", rf"ops\.{named.get('op')}")
        allowed = allowed.replace("{backend}", named.get("backend") or "")
        for imported in set(filter(lambda n: within(n) is not None, imports(path))):
            if not re.fullmatch(allowed, within(imported) or ""):
                wrong.append(f"{name} imports {imported}, may import {allowed}")
    assert not wrong, "\n".join(wrong)


def test_programs_import_public_names_only() -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in tracked("distill/*.py", "benchmarks/*.py")
        for name in imports(path)
        if within(name) not in (None, *PUBLIC)
    ]
    assert not wrong, "\n".join(wrong)


def test_cpp_includes_follow_the_layers() -> None:
    wrong = []
    for path in tracked("csrc/*.h", "csrc/*.cpp", "csrc/*.cu"):
        name = path.relative_to(SOURCE).as_posix()
        allowed = next(allowed for room, allowed in MAY_INCLUDE.items() if re.fullmatch(room, name))
        for included in re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)', path.read_text(), re.M):
            if not re.fullmatch(f"{allowed}|{SYSTEM_HEADER}", included):
                wrong.append(f"csrc/{name} includes {included}, may include {allowed}")
    assert not wrong, "\n".join(wrong)


def test_setup_does_not_import_torch() -> None:
    assert "torch" not in {name.partition(".")[0] for name in imports(ROOT / "setup.py")}


def test_one_module_reads_environment_variables() -> None:
    readers = [
        path.name
        for path in tracked("xlstm_kernels/*.py")
        if re.search(r"\b(environ|getenv|putenv)\b", path.read_text())
    ]
    assert readers == ["backends.py"]


def test_cold_import_loads_no_extension_and_no_triton() -> None:
    program = """if True:
        import sys, time
        import torch
        before, start = set(sys.modules), time.perf_counter()
        import xlstm_kernels
        print(f"{time.perf_counter() - start:.3f} s beyond torch's own import", file=sys.stderr)
        eager = {"triton", "xlstm_kernels._cpu", "xlstm_kernels._cuda"}
        print(*sorted(eager & (set(sys.modules) - before)))
    """
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    print(run.stderr)
    assert run.stdout.split() == []


def test_operations_are_named_alike_in_every_room() -> None:
    import xlstm_kernels as xk
    from benchmarks.cases import OPS as MEASURED
    from xlstm_kernels.backends import OPS, Backend

    readme = (ROOT / "README.md").read_text()
    folders = {path.parent.name for path in PACKAGE.glob("ops/*/op.py")}
    assert set(OPS) == folders, "each ops/<op>/op.py defines Op(<op>), imported by xlstm_kernels"
    missing = []
    for op in OPS.values():
        for function in op.functions or (op.name,):
            missing += [f"xk.{function}"] if function not in xk.__all__ else []
            missing += [f"{function} in benchmarks/cases.py"] if function not in MEASURED else []
            missing += [f"xk.{function} in README.md"] if f"`xk.{function}`" not in readme else []
        files = [f"xlstm_kernels/ops/{op.name}/{part}.py" for part in ("api", "op", "reference")]
        suffix = {Backend.CPU: "cpp", Backend.CUDA: "cu"}
        missing += [
            f"{backend.value} in the table of ops/{op.name}/op.py"
            for backend in Backend
            if (PACKAGE / f"ops/{op.name}/{backend.value}.py").exists()
            and backend not in {*op.table, Backend.REFERENCE}
        ]
        for backend, module in op.table.items():
            files.append(f"xlstm_kernels/ops/{op.name}/{backend.value}.py")
            if backend in suffix and op.name not in WITHOUT_KERNELS:
                kernel = KERNELS_OF.get(op.name, op.name)
                files.append(f"csrc/{backend.value}/{kernel}*.{suffix[backend]}")
            missing += [
                f"{module.__name__}.{function}"
                for function in ("supports", "forward")
                if not hasattr(module, function)
            ]
        files.append(f"tests/test_{op.name}*.py")
        missing += [name for name in files if not list(ROOT.glob(name))]
    assert not missing, f"missing: {', '.join(missing)}"


def test_every_backend_says_whether_it_is_available() -> None:
    from xlstm_kernels.backends import UNAVAILABLE, Backend

    assert set(UNAVAILABLE) == set(Backend) - {Backend.AUTO}


def test_cells_of_python_and_cpp_are_the_same() -> None:
    from xlstm_kernels.backends import load_cpu
    from xlstm_kernels.cells import CELLS

    python = [(name, cell.states) for name, cell in CELLS.items()]
    assert list(load_cpu().cells().items()) == python, "csrc/cells/list.h and CELLS differ"


def python_functions(path: Path) -> Iterator[tuple[str, int]]:
    """Names and lengths in lines, less the docstring."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0]
            documented = ast.get_docstring(node, clean=False) is not None
            docstring = (first.end_lineno or 0) - first.lineno + 1 if documented else 0
            yield node.name, (node.end_lineno or 0) - node.lineno + 1 - docstring


def cpp_functions(path: Path) -> Iterator[tuple[str, int]]:
    """Names and lengths in lines: a body is what braces hold after a parameter list."""
    text = re.sub(r"//[^\n]*|^\s*#(?:[^\n\\]|\\\n|\\.)*", "", path.read_text(), flags=re.M)
    text = re.sub(r'"(?:[^"\\\n]|\\.)*"', '""', text)
    depth, opened = 0, None  # `opened`: (name, depth, offset) of the function under way
    header_start = 0
    for match in re.finditer(r"[{};]", text):
        header = text[header_start : match.start()]
        if match.group() == "{":
            name = re.search(r"(operator\s*\S+?|\w+)\s*\(", header)
            if opened is None and name and not re.search(r"\b(namespace|enum)\b|=\s*$", header):
                opened = (name.group(1), depth, header_start + len(header) - len(header.lstrip()))
            depth += 1
        elif match.group() == "}":
            depth -= 1
            if opened is not None and depth == opened[1]:
                yield opened[0], text.count("\n", opened[2], match.end()) + 1
                opened = None
        header_start = match.end()


def test_files_and_functions_are_short() -> None:
    too_long = []
    for path in tracked("*.py", "*.cpp", "*.h", "*.cu"):
        name = path.relative_to(ROOT).as_posix()
        lines = path.read_text().count("\n")
        if lines > MAX_FILE_LINES:
            too_long.append((name, lines))
        found = python_functions(path) if path.suffix == ".py" else cpp_functions(path)
        for function, length in found:
            if length > MAX_FUNCTION_LINES:
                too_long.append((f"{name}:{function}", length))
    excused = {**LONG_FILES, **LONG_FUNCTIONS}
    wrong = [f"{name}: {lines} lines" for name, lines in too_long if name not in excused]
    assert not wrong, "shorten, or give a reason in this file:\n" + "\n".join(wrong)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("int f(int a) {\n  if (a) {\n    g();\n  }\n}\n", [("f", 5)]),
        ("struct S {\n  int f() { return 1; }\n  int g();\n};\n", [("f", 1)]),
        ('void f(A a,\n       B b) {\n  g("{", [&](int i) { h(i); });\n}\n', [("f", 4)]),
        ("#define M(x) {x\nconst Isa k[] = {{1, 2}};\n", []),
    ],
)
def test_cpp_functions_are_found(
    text: str, expected: list[tuple[str, int]], tmp_path: Path
) -> None:
    (tmp_path / "a.cpp").write_text(text)
    assert list(cpp_functions(tmp_path / "a.cpp")) == expected


def test_shapes_agree_with_the_kernels():
    assert load_cpu().checkpoint_interval == recurrence_shapes.CHECKPOINT_INTERVAL
    assert load_cpu().state_interval == mlstm_shapes.STATE_INTERVAL
