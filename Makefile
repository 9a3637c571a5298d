# `make install` and `make demo` are all a first look needs. `make help` lists the rest.

# What `make install` made; where it was not run, the environment at hand.
PYTHON ?= $(shell test -x .venv/bin/python && echo .venv/bin/python || echo python3)
SCRIPTS = $(shell $(PYTHON) -c "import sysconfig; print(sysconfig.get_path('scripts'))")
# The release that the project's own numbers and tests come from; any torch >= 2.10 works:
# `make install TORCH=torch` takes the newest, `make install TORCH=/path/to/torch.whl` a file.
TORCH ?= torch==2.13.0

# The tests of each operation, which also run under every instruction set and under the sanitizers.
OP_TESTS = $(sort $(wildcard $(patsubst xlstm_kernels/ops/%/op.py,tests/test_%*.py,$(wildcard xlstm_kernels/ops/*/op.py))))
# One thread a worker: two thread pools would fight for the cores. Tests that share a build stay on
# one worker.
PYTEST = $(PYTHON) -m pytest -q
PARALLEL = OMP_NUM_THREADS=1 $(PYTEST) -n 2 --dist loadgroup
# Best first; a plain run takes the first.
ISAS = $(shell $(PYTHON) -c "from xlstm_kernels.backends import load_cpu; print(*load_cpu().supported_isas())")
SANITIZED = build/sanitized
COMPAT = build/compat
# Python 3.10 has no reader of TOML; pytest brings it one.
define COMPAT_EXTRA
try:
    import tomllib
except ImportError:
    import tomli as tomllib
with open("pyproject.toml", "rb") as file:
    print(*tomllib.load(file)["project"]["optional-dependencies"]["compat"])
endef
export COMPAT_EXTRA
# The oldest Triton that this works with, which torch 2.10 and 2.11 bring along.
OLDEST_TRITON = build/triton-3.6
comma = ,

# setup.py's build of the CUDA kernels for the host, into the folder $(1), for sanitizer $(2) or none.
# ninja would ask for make's job server, which does not reach it.
EMULATED = build/emulated
BUILD_EMULATED = MAKEFLAGS= XLSTM_EMULATED=1 XLSTM_SANITIZE=$(2) $(PYTHON) setup.py --quiet build_ext \
  --build-lib $(EMULATED)/$(1) --build-temp $(EMULATED)/$(1)/temp

.PHONY: help install demo ci check test test-fast test-isas test-compat test-oldest-triton emulated sanitize sanitize-emulated emulated-address emulated-thread kernels gpu lint format bench clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

install: .venv/bin/python  ## torch and this package, editable, with everything it can use, in .venv
	.venv/bin/python -m pip install --quiet "$(TORCH)"
	.venv/bin/python -m pip install --quiet -e ".[distill,bench,test,lint]"
	.venv/bin/python -m xlstm_kernels

.venv/bin/python:
	python3 -m venv .venv

demo:  ## distil a language model on this machine, in a few minutes
	$(PYTHON) -m distill demo

ci: lint test-isas emulated sanitize-emulated  ## what CI runs: all but slow tests and the CPU's sanitizers
	$(PARALLEL) -m "not slow"
	$(MAKE) test-oldest-triton MARKED='"not slow"'

check: lint test test-compat test-oldest-triton sanitize sanitize-emulated  ## everything that must hold before a change goes in

test: emulated test-isas  ## every test, the operations under each instruction set of this CPU
	$(PARALLEL)

test-fast: emulated  ## the quick tests, on one instruction set, while you work
	$(PARALLEL) -m "not slow and not medium"

# Triton's kernels know no instruction set, and their interpreter is not what is to be sanitized.
test-isas:
	@set -e; for isa in $(wordlist 2, 9, $(ISAS)); do \
	  echo "operations on $$isa"; \
	  XLSTM_CPU_ISA=$$isa $(PARALLEL) -m "not slow" -k "not triton and not cuda" $(OP_TESTS); \
	done

emulated:  ## the CUDA kernels for the host, which tests run on CPU tensors
	@$(call BUILD_EMULATED,plain)

# A build of its own beside the installed one; `pytest`, unlike `python -m pytest`, does not put the
# source tree before it. Leaks are not looked for: Python and torch keep much until the process ends.
sanitize: export XLSTM_SANITIZE = address,undefined
sanitize:  ## the operations' tests on a build with AddressSanitizer and UBSan
	$(PYTHON) setup.py --quiet build --build-lib $(SANITIZED)/lib --build-temp $(SANITIZED)/temp
	@set -e; for isa in $(ISAS); do \
	  echo "operations on $$isa, sanitized"; \
	  XLSTM_CPU_ISA=$$isa PYTHONPATH=$(SANITIZED)/lib:. OMP_NUM_THREADS=1 \
	  LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	  $(SCRIPTS)/pytest -q -n 2 -m "not slow" -k "not triton and not cuda" tests/test_sanitizers.py $(OP_TESTS); \
	done

# Beside the environment: where xlstm is installed, transformers builds its layers from that.
$(COMPAT): pyproject.toml
	rm -rf $@
	$(PYTHON) -m pip install --quiet --no-deps --target $@ $$($(PYTHON) -c "$$COMPAT_EXTRA")
	touch $@

test-compat: $(COMPAT)  ## what we stand in for and replace, against the packages themselves
	PYTHONPATH=$(COMPAT) $(PARALLEL) tests/test_compat.py tests/test_replace*.py

$(OLDEST_TRITON):
	$(PYTHON) -m pip install --quiet --no-deps --target $@ triton==3.6.0

# What one release folds into a constant or takes as an argument, another refuses to compile.
test-oldest-triton: $(OLDEST_TRITON)  ## Triton's kernels, compiled for one chip by the oldest release
	PYTHONPATH=$(OLDEST_TRITON) $(PARALLEL) -m $(or $(MARKED),"") \
	  -k "sm_90 or hopper or compilation" tests/test_*_compile.py

kernels:  ## what nvcc made of the CUDA kernels, and what they should take, into docs/kernels.md
	$(PYTHON) setup.py --quiet build_ext --inplace
	$(PYTHON) tests/cuda_kernels.py docs/kernels.md

# What no other target can: the CUDA module's and Triton's kernels as compiled for the GPU at hand.
# `make gpu GPU="--op slstm --budget-s 540"` does a part, and what it did is not done again.
gpu:  ## on a machine with a GPU: its tests, natively, and what it measures
	$(PYTHON) -m benchmarks.gpu $(GPU)

# One beside the other: each is a single process.
sanitize-emulated:  ## the CUDA kernels' tests on builds with AddressSanitizer and ThreadSanitizer
	@$(MAKE) --no-print-directory -j 2 --output-sync=target emulated-address emulated-thread

# The kernels alone are instrumented; torch is not looked at. Python loads no libstdc++, in which a
# sanitizer looks for what throws exceptions as it starts. A sanitizer ends the process before pytest
# would show what it captured of its report.
emulated-address: SANITIZERS = address,undefined
emulated-address: SANITIZER_LIBRARY = libasan.so
emulated-address: CHOSEN = cuda
emulated-thread: SANITIZERS = thread
emulated-thread: SANITIZER_LIBRARY = libtsan.so
# It takes twenty times as long as the other: each kind of kernel and of launch. RACES=cuda: all.
emulated-thread: CHOSEN = $(or $(RACES),cuda and (test_dtypes or test_packed_sequences \
  or test_slstm_options or test_teams or test_clusters or test_one_step or scale_rows \
  or (every_cut and 2500)))
emulated-address emulated-thread: emulated-%:
	@$(call BUILD_EMULATED,$*,$(SANITIZERS))
	@echo "CUDA kernels on the emulator, $* sanitizer"
	@LD_PRELOAD="$$(g++ -print-file-name=$(SANITIZER_LIBRARY)) $$(g++ -print-file-name=libstdc++.so.6)" \
	  OMP_NUM_THREADS=1 \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	  TSAN_OPTIONS=halt_on_error=1:ignore_noninstrumented_modules=1 \
	  XLSTM_CUDA_EMULATOR=$$(echo $(EMULATED)/$*/xlstm_kernels/_emulated*.so) \
	  $(PYTEST) $(OP_TESTS) tests/test_cuda.py -p no:cacheprovider --capture=sys \
	    -m "not slow" -k "not triton and $(CHOSEN)"

lint:  ## formatting, lint and types
	@$(PYTHON) -c "import ruff, mypy" 2>/dev/null || { echo "lint: $(PYTHON) has no ruff or mypy;" \
	  "run 'make install', or name another with PYTHON="; exit 1; }
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' | xargs $(SCRIPTS)/clang-format --dry-run -Werror
	$(PYTHON) -m mypy

format:  ## what `make lint` asks for, as far as tools can do it
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .
	git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' | xargs $(SCRIPTS)/clang-format -i

bench:  ## measure this machine, append to benchmarks/results, write the README's tables
	$(PYTHON) -m benchmarks run --save
	$(PYTHON) -m benchmarks report

clean:  ## remove what builds leave behind; .venv and runs stay
	rm -rf build dist *.egg-info xlstm_kernels/*.so .pytest_cache .mypy_cache .ruff_cache
