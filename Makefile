# Everything runs in .venv, which `make install` builds from requirements.lock; the other targets call it when
# it is missing or older than the lock. Another interpreter: make install PYTHON=python3.13

PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
INSTALLED := .venv/.installed

.DEFAULT_GOAL := install
.PHONY: install demo test check format app bench bench-fusion pocket docs clean

install: $(INSTALLED)

$(INSTALLED): requirements.lock pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed; name one with: make install PYTHON=..."; exit 1; }
	@echo "Installing into .venv (some minutes the first time) ..."
	@$(PYTHON) -m venv .venv
	@$(PIP) --requirement requirements.lock
	@$(PIP) --no-deps --no-build-isolation --editable .
	@touch $@

demo: install
	$(BIN)/fusion demo

# A test has one thread and one process some 2 GB: a process for each core, but not more than four.
test: install
	$(BIN)/python -m pytest -q --numprocesses auto --maxprocesses 4 --dist loadfile

check: install
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m ruff check .
	$(BIN)/python -m pyright --pythonpath $(BIN)/python
	$(BIN)/python -m pytest -q tests/test_architecture.py

format: install
	$(BIN)/python -m ruff format .
	$(BIN)/python -m ruff check --fix .

app: install
	$(BIN)/fusion studio

bench: install
	$(BIN)/python -m benchmarks

# Takes hours and can be resumed; a second process shares the work. A short run in minutes: make bench-fusion QUICK=1
bench-fusion: install
	$(BIN)/python -m benchmarks.laboratory $(if $(QUICK),--quick)

# Takes hours; run again, it resumes where it stopped. Needs npm for the artwork. On a GPU or in another size: docs/pocket.md.
# Trains from scratch; from the shipped weights: make pocket START=assets
# Another size, in a work folder of its own: make pocket WORK=... SIZES="--side 256 --factor 16 --channels 8"
# Autoencoder and denoiser by time instead of steps: make pocket TIME="--minutes 145"
FROM := $(if $(START),--start $(START)/pocket)
STAGE := $(BIN)/python -m tools.pocket $(if $(WORK),--work $(WORK)) $(SIZES)
# glibc keeps freed memory: fresh pages for every large tensor cost a tenth of a step.
pocket: export MALLOC_MMAP_THRESHOLD_ = 4294967296
pocket: export MALLOC_TRIM_THRESHOLD_ = 8589934592
pocket: export MALLOC_TOP_PAD_ = 268435456
pocket: install
	@$(PIP) --no-build-isolation --editable '.[pocket]'
	$(STAGE) artwork
	$(STAGE) tokenizer $(FROM)
	$(STAGE) autoencoder $(FROM) $(TIME)
	$(STAGE) latents
	$(STAGE) denoiser $(FROM) $(TIME)
	$(STAGE) judge $(FROM:/pocket=/pocket-clip)
	$(STAGE) classifier
	$(STAGE) evaluate
	$(STAGE) card

# A site in build/site; mkdocs is in an environment of its own, outside of requirements.lock.
docs: install
	$(BIN)/python -m tools.reference
	@test -x build/docs/bin/mkdocs || { $(PYTHON) -m venv build/docs && build/docs/bin/python -m pip install --quiet "mkdocs>=1.6"; }
	build/docs/bin/mkdocs build --quiet

# Adapters and pictures (out/) are kept.
clean:
	rm -rf .venv build dist .hypothesis .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
