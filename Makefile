# Everything starts from a fresh clone: each target sets up .venv by itself, once.
#
#   make demo      plan, fine-tune, evaluate, export and reload a real model (no GPU needed)
#   make fresh     the demo's steps in a new clone, with a new .venv and an empty home and cache
#   make test      the tests                     make lint      ruff, mypy, clang-format
#   make build     only .venv, with every extra  make wheel     dist/*.whl
#   make gpu       the checks that need a card   make bench     the benchmarks
#   make accuracy  what is missing of the accuracy grid (hours; may be stopped and started again)
#   make gpu-kit   the same for a machine without a registry, in one folder to carry there
#   make sanitize  the op tests under ASan/UBSan make clean     remove build products (distclean: .venv too)
#
# PYTHON=python3.12 chooses the interpreter of .venv; PIP_FLAGS="..." goes to every pip install.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
# --no-build-isolation: the op library is compiled against the torch in .venv, not against a second download of it.
INSTALL := $(PY) -m pip install --quiet --disable-pip-version-check --no-build-isolation -c constraints.txt $(PIP_FLAGS)
SOURCES := $(shell find csrc -type f 2>/dev/null)
JOBS ?= $(shell n=$$(nproc); [ $$n -gt 4 ] && echo 4 || echo $$n)
BENCHES := $(wildcard bench/bench_*.py)

.PHONY: build demo fresh test lint format bench accuracy gpu gpu-kit gpu-sanitize sanitize wheel clean distclean

build: $(VENV)/.built

# What the build needs. torch goes first, at its pinned version, because the others would pull in the newest.
$(VENV)/.installed: constraints.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(INSTALL) setuptools wheel ninja
	$(INSTALL) torch
	touch $@

# qrosa itself, editable, with its compiled library, every extra and the development tools.
$(VENV)/.built: $(VENV)/.installed pyproject.toml setup.py $(SOURCES)
	$(INSTALL) --editable '.[all,dev]'
	touch $@

demo: build
	$(PY) bench/demo.py

fresh:
	$(PYTHON) bench/fresh.py

test: build
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) --dist loadfile -q $(TESTS)

lint: build
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/clang-format --dry-run --Werror $(filter %.h %.cpp %.cu %.cuh,$(SOURCES))

format: build
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $(filter %.h %.cpp %.cu %.cuh,$(SOURCES))

bench: build
	for script in $(BENCHES); do echo "== $$script" && $(PY) $$script || exit 1; done

# One thread a process: start it twice where two cores are free, both work on one table.
accuracy: build
	OMP_NUM_THREADS=1 $(PY) -m bench.accuracy.run
	$(PY) -m bench.accuracy.show && $(PY) bench/tables.py

# First the end-to-end tests with a tiny model, then the ops, then every figure. What fails does not keep the rest from
# running: a card may be here for an hour only. A card that hangs ends a test's process (timeout-method=thread).
GPU_TESTS := $(PY) -m pytest -m gpu -rs -q --timeout-method=thread
gpu: build
	status=0; \
	$(GPU_TESTS) tests/card || status=1; \
	$(GPU_TESTS) tests --ignore tests/card || status=1; \
	if command -v compute-sanitizer >/dev/null; then $(MAKE) gpu-sanitize || status=1; \
	  else echo "no compute-sanitizer on the PATH: memory, races and barriers are not checked"; fi; \
	$(PY) -m bench.gpu || status=1; \
	exit $$status

# build/gpu-kit: what "make gpu" needs on a machine with a card and torch, and without a registry.
gpu-kit: build
	$(PY) -m bench.gpu_kit

# Each tool of compute-sanitizer on a few shapes of every kernel, without PyTorch's caching allocator: in its segments an
# access past a tensor lands in the next one and passes. The tools are slow, and PyTorch's own kernels run under them too,
# so the three that look at synchronisation and at first reads get fewer shapes.
SANITIZER := PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 1 --tool
GPU_OPS := $(PY) -m pytest -m gpu -q tests/ops/test_cuda_ops.py -k
gpu-sanitize: build
	$(SANITIZER) memcheck $(GPU_OPS) "not 2048 and not 14336 and not huge"
	for tool in racecheck initcheck synccheck; do \
	  $(SANITIZER) $$tool $(GPU_OPS) "damaged or (sddmm and 65-shape) or (dequant and shape1) or (score and 33-shape)" || exit 1; done

# A copy of the tree with its CPU library under AddressSanitizer and UBSan, so that the one in use stays as it is.
SANITIZED := build/sanitize
sanitize: build
	rm -rf $(SANITIZED) && mkdir -p $(SANITIZED)
	cp -r csrc qrosa tests setup.py pyproject.toml $(SANITIZED)
	find $(SANITIZED) -name '*.so' -delete
	cd $(SANITIZED) && QROSA_SANITIZE=1 QROSA_WITHOUT_CUDA=1 $(abspath $(PY)) setup.py --quiet build_ext --inplace
	cd $(SANITIZED) && LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	  $(abspath $(PY)) -m pytest -q -p no:cacheprovider tests/ops

wheel: build
	$(PY) -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find qrosa -name '*.so' -delete
	rm -f $(VENV)/.built

distclean: clean
	rm -rf $(VENV)
