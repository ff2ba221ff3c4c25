# `make demo` and `make test` do all the set-up on a machine that has Python 3.10 or newer and a C++
# compiler (SWA_FAST_NO_EXT=1 does without the compiler). Everything is installed into VENV.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml $(wildcard csrc/*)

.PHONY: help demo test test-gpu test-arm lint types bench bench-quick bench-record bench-report gpu-report wheel clean

help:
	@echo "make demo   install, train with SGD, EMA and SWA on scikit-learn's digits, compare (RUN=folder)"
	@echo "make test   install with the test extras and run the tests"
	@echo "make test-gpu  the tests marked gpu, on the CUDA device or, without one, under tests/gpusim"
	@echo "make test-arm  the CPU kernels compiled for ARM and run under qemu, beside those of this machine"
	@echo "make lint   ruff, clang-format"
	@echo "make types  mypy --strict"
	@echo "make wheel  build the wheel into dist/ and check it"
	@echo "make clean  remove everything that was built, but not $(VENV)"
	@echo "make bench-quick   two minutes: the main operations beside their competitors and the limit"
	@echo "make bench         everything that is timed, rows into OUT (runs/bench.csv)"
	@echo "make bench-record  the rows in bench/results again, then README and charts from them"
	@echo "make bench-report  README and charts from the rows in bench/results"
	@echo "make gpu-report    everything about this machine's GPU in MINUTES (8), into OUT (runs/gpu)"

# torch comes first and the build is not isolated, so that torch is fetched once.
$(VENV)/.torch: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "setuptools>=77" "torch>=2.11" ninja numpy
	touch $@

# One stamp for each extra of pyproject.toml: .venv/.train, .venv/.test, ...
$(VENV)/.%: $(VENV)/.torch $(SOURCES)
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/pip install --quiet --no-build-isolation --editable ".[$*]"
	touch $@

RUN ?= runs/demo
demo: $(VENV)/.train
	$(BIN)/swa-fast run digits --seeds 12 --threads 1 --out $(RUN) --overwrite
	@echo "curves: $(RUN)/curves.png   table: $(RUN)/report.md   each run: $(RUN)/seed1, ..."

# Processes share the cores, see tests/conftest.py.
test: $(VENV)/.test
	$(BIN)/pytest -n auto --dist worksteal

# Without a device the simulator's own tests come first: where they fail the others mean nothing.
GPUSIM := $(BIN)/python tests/gpusim run $(BIN)/python
test-gpu: export SWA_FAST_REQUIRE_GPU = 1
test-gpu: $(VENV)/.test
	if $(BIN)/python -c "import torch; exit(not torch.cuda.is_available())"; then \
	  $(BIN)/pytest -m gpu; \
	else \
	  $(GPUSIM) -m pytest tests/gpusim/tests && $(GPUSIM) -m pytest -n auto --dist worksteal -m gpu; \
	fi

# Debian's g++-aarch64-linux-gnu and qemu-user are needed.
test-arm: export SWA_FAST_TEST_ARM = 1
test-arm: $(VENV)/.test
	$(BIN)/pytest tests/test_arm.py

GPUSIM_SOURCES := $(wildcard tests/gpusim/src/*.cpp tests/gpusim/src/*.h tests/gpusim/tests/ext/*)
lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python bench/report.py --check
	$(BIN)/clang-format --dry-run --Werror csrc/* tests/arm/*.cpp $(GPUSIM_SOURCES)

types: $(VENV)/.dev
	$(BIN)/mypy

OUT ?= runs/bench.csv
bench: $(VENV)/.bench
	$(BIN)/python bench/run.py --out $(OUT)
	$(BIN)/python bench/bench_overhead.py

bench-quick: $(VENV)/.bench
	$(BIN)/python bench/run.py --quick

# BENCH_OPTIONS="--threads 1 --clock cpu" for a machine that has other work.
BENCH_OPTIONS ?=
bench-record: $(VENV)/.bench
	$(BIN)/python bench/run.py --device cpu $(BENCH_OPTIONS) --out bench/results/rows_cpu.csv
	$(BIN)/python bench/bench_overhead.py $(BENCH_OPTIONS) --out bench/results/overhead_cpu.csv
	$(BIN)/python bench/report.py

bench-report: $(VENV)/.bench
	$(BIN)/python bench/report.py

# A GPU's own machine, where nothing can be installed, needs the last line alone (with python3).
MINUTES ?= 8
gpu-report: OUT = runs/gpu
gpu-report: $(VENV)/.bench
	$(BIN)/python bench/gpu_report.py --minutes $(MINUTES) --out $(OUT)

# setuptools packs whatever lies in build/, so files renamed since would be in the wheel too.
wheel: $(VENV)/.dev
	rm -rf build dist
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m build --no-isolation --wheel
	$(BIN)/python .ci/check_wheel.py dist/*.whl

clean:
	rm -rf build dist runs *.egg-info swa_fast/*.so swa_fast/_build_info.json
	rm -f $(VENV)/.[a-z]*
	find . -name __pycache__ -not -path "./$(VENV)/*" -prune -exec rm -rf {} +
