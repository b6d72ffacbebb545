# `make demo` and `make test` need Python 3.11+ and nothing else: they make .venv on first use.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PEERS ?= .venv-peers
# OpenMP's threads sleep while they wait: spinning, its default, halves the speed where the cores are shared.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test check format bench bench-peers peers clean

demo: $(VENV)/.ready
	$(BIN)/fastsae train

test: $(VENV)/.ready
	$(BIN)/python -m pytest -n auto --dist loadfile

check: $(VENV)/.ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.ready
	$(BIN)/python -m pytest benches

# Every pair, interleaved; peers that are not installed (make peers) are reported as not measured.
bench-peers: $(VENV)/.ready
	$(BIN)/python -m benches.peers.run --out benches/results/peers.json

# The SAELens tests use this environment where it exists.
peers: $(PEERS)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fastsae needs Python 3.11+; say make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch -e '.[dev]'
	touch $@

$(PEERS)/.ready: benches/peers/requirements.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check -r benches/peers/requirements.txt
	@# nnsight brings a torchvision for CUDA, which does not load beside torch's CPU build and takes transformers with it
	$(PEERS)/bin/python -c 'import torchvision' 2>/dev/null || $(PEERS)/bin/python -m pip uninstall --quiet --yes torchvision
	touch $@

clean:
	rm -rf $(VENV) $(PEERS)
