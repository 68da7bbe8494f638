PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: environment demo test test-all types lint gpu-bundle

# The runtime of AMD's cards is built here where there is g++ (Debian: apt install g++); without, its tests are skipped.
environment: $(VENV)/.stamp

$(VENV)/.stamp: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -e '.[compile,cuda,dev]'
	$(BIN)/python -m llmc.runtime.hip.build --optional
	touch $@

demo: environment
	$(BIN)/llmc compile tests/data/tiny-python/model.safetensors --target cpu -o build/tiny-python.llmc --overwrite
	$(BIN)/llmc run build/tiny-python.llmc "def read_lines(path):" --max-tokens 48 --stats

test: environment lint types
	$(BIN)/pytest -n 2 -m 'not slow' -q

# Goes on where an earlier run of the same files was broken off; the counts are in build/test-all/table.md. Kernels
# have limits in seconds of computing: that of pytest, in seconds, is wide for machines with other work.
test-all: environment lint types
	$(BIN)/pytest -n 2 -q --resume -o timeout=3600

# What a machine with a card needs to measure, in one archive: CUDA_TARGET names its card, CARD_PYTHON its Python,
# QUANTIZE schemes that are measured beside the checkpoint's dtype.
CUDA_TARGET ?= cuda:sm_90
QUANTIZE ?= int4
CARD_PYTHON ?= $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
gpu-bundle: environment
	$(BIN)/python -m llmc.bench.bundle build/llmc-gpu.tar.gz --shape llama-3.2-1b --shape llama-3.1-8b \
		$(foreach scheme,$(QUANTIZE),--quantize $(scheme)) --target $(CUDA_TARGET) --python $(CARD_PYTHON)

# Type checkers read the installed package, not an editable one. build/lib would keep modules that are no more.
types: environment
	rm -rf build/types build/lib && $(BIN)/pip install --quiet --no-deps --target build/types .
	cd build && MYPYPATH=types ../$(BIN)/mypy --config-file ../pyproject.toml -p llmc

lint: environment
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
