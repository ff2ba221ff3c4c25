# `make demo` and `make test` do all the set-up on a machine that has Python 3.10 or newer and a C++
# compiler (SWA_FAST_NO_EXT=1 does without the compiler). Everything is installed into VENV.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml $(wildcard csrc/*)

.PHONY: help demo test test-gpu test-asan test-arm lint types docs bench bench-quick bench-record bench-report gpu-report wheel dist clean

help:
	@echo "make demo   install, train with SGD, EMA and SWA on scikit-learn's digits, compare (RUN=folder)"
	@echo "make test   install with the test extras and run the tests"
	@echo "make test-gpu  the tests marked gpu, on the CUDA device or, without one, under tests/gpusim"
	@echo "make test-asan  the C++ for CPUs under gcc's address and undefined-behaviour sanitizers"
	@echo "make test-arm  the CPU kernels compiled for ARM and run under qemu, beside those of this machine"
	@echo "make lint   ruff, clang-format"
	@echo "make types  mypy --strict"
	@echo "make docs   the documentation, as a site in build/docs"
	@echo "make wheel  build the wheel into dist/ and check it"
	@echo "make dist   what a release consists of, into dist/, and all checks of the package index"
	@echo "make clean  remove everything that was built, but not $(VENV)"
	@echo "make bench-quick   three minutes: the main operations beside their competitors and the limit"
	@echo "make bench         everything that is timed, rows into OUT (runs/bench.csv)"
	@echo "make bench-record  the rows in bench/results again, then pages and charts from them"
	@echo "make bench-report  README, docs and charts from the rows in bench/results"
	@echo "make gpu-report    everything about this machine's GPU in MINUTES (8), into OUT (runs/gpu)"

# torch comes first and the build is not isolated, so that torch is fetched once.
$(VENV)/.torch: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "setuptools>=77" "torch>=2.10" ninja numpy
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

# A build of its own, which comes before the editable one in the path. Python's own objects are
# allocated by malloc, so that they are watched, too; what Python leaves at its end is not a leak.
# Not Triton, whose compiler is foreign code, nor what forks or spawns.
ASAN_TESTS := $(addprefix tests/test_,update_op.py batch_norm_op.py watch.py at_once.py gather.py \
  rules.py storage.py averager.py averaged_model.py avg_fns.py applied.py hooks.py swag.py bn_lent.py)
test-asan: $(VENV)/.test
	rm -rf build/asan
	PATH="$(abspath $(BIN)):$$PATH" SWA_FAST_CUDA=0 SWA_FAST_SANITIZE=address,undefined \
	  $(BIN)/python setup.py --quiet build --build-base build/asan
	PYTHONPATH="$$(echo $(CURDIR)/build/asan/lib.*)" PYTHONMALLOC=malloc OMP_NUM_THREADS=2 \
	  LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  $(BIN)/pytest -p no:cacheprovider -k "not triton" $(ASAN_TESTS)
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

# Without network, and a warning is an error.
docs: $(VENV)/.docs
	$(BIN)/sphinx-build --fail-on-warning --keep-going --quiet -b html docs build/docs
	@echo "build/docs/index.html"

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
	$(BIN)/python bench/run.py --device cpu --threads 1 --ops update --models PreResNet-20 \
	    PreResNet-164 ResNet-50 "10,000 tiny tensors" $(BENCH_OPTIONS) \
	    --out bench/results/rows_cpu_one_thread.csv
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

# The wheel with the tag of a manylinux, which is that of this machine's glibc (cibuildwheel builds
# where it is the oldest), the source distribution, and the wheel without libraries.
dist: export PATH := $(abspath $(BIN)):$(PATH)
dist: wheel
	mkdir -p build/plain && mv dist/*.whl build/plain
	bash .ci/repair build/plain/*.whl dist
	python -m build --no-isolation --sdist
	SWA_FAST_NO_EXT=1 python -m build --no-isolation --wheel
	for wheel in dist/*.whl; do python .ci/check_wheel.py $$wheel || exit 1; done
	bash .ci/check_dist dist

clean:
	rm -rf build dist runs *.egg-info swa_fast/*.so swa_fast/_build_info.json
	rm -f $(VENV)/.[a-z]*
	find . -name __pycache__ -not -path "./$(VENV)/*" -prune -exec rm -rf {} +
