# Everything runs in .venv, which is made from constraints.txt on first use.
PYTHON ?= python3.11
BIN := .venv/bin
# An interpreter with "sentence-transformers[onnx,openvino]", for the benchmark of encoding; without, both are left out.
PEERS_PYTHON ?= $(BIN)/python
# One with autofaiss, for the benchmark of the index; it wants older pyarrow and numpy. Without, it is left out.
AUTOFAISS_PYTHON ?= $(BIN)/python
# Where the benchmarks keep vectors and indexes that take minutes to make.
BENCH_DATA ?= bench-data
TEST_PROCESSES ?= 3
export RAY_USAGE_STATS_ENABLED := 0

.PHONY: help setup test chaos parity bench lint types demo clean

help:
	@echo "make demo    whole job on an embedded corpus, then a search page"
	@echo "make test    the test suite          make chaos   every kill and injected fault"
	@echo "make lint    ruff                    make types   mypy"
	@echo "make bench   the acceptance figures  make parity  the model parity table"

setup: .venv/ready

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[cpu,test]"
	touch $@

demo: setup
	$(BIN)/pinakes demo

# Most tests wait for clusters: three processes of them, each with whole files, keep two cores busy.
test: setup
	RAY_AUTH_MODE=disabled $(BIN)/pytest -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

chaos: setup
	RAY_AUTH_MODE=disabled $(BIN)/pytest -m chaos tests/chaos

parity: setup
	$(BIN)/pytest -v tests/parity

bench: setup
	$(BIN)/python -m tests.bench.startup
	RAY_AUTH_MODE=disabled $(BIN)/python -m tests.bench.quality
	RAY_AUTH_MODE=disabled $(BIN)/python -m tests.bench.pipeline
	RAY_AUTH_MODE=disabled $(BIN)/python -m tests.bench.memory
	RAY_AUTH_MODE=disabled $(BIN)/python -m tests.bench.encode --peers-python $(PEERS_PYTHON)
	RAY_AUTH_MODE=disabled $(BIN)/python -m tests.bench.index --data $(BENCH_DATA) --peers-python $(AUTOFAISS_PYTHON)
	RAY_AUTH_MODE=disabled $(BIN)/python -m tests.bench.index_memory
	$(BIN)/python -m tests.bench.forecast --keep
	$(BIN)/python -m tests.bench.filters --data $(BENCH_DATA)
	RAY_AUTH_MODE=disabled $(BIN)/python -m tests.bench.serve --data $(BENCH_DATA)/serve

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis
