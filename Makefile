# The same commands on a laptop and in CI. Everything runs in .venv, which is created when it is missing.
PYTHON ?= python3
BIN := .venv/bin
# Packages that open_clip's captioning needs and that conflict with ours; only a child process of a benchmark sees them.
PEERS := .venv/peers/transformers-4.49
INSTALLED := .venv/.installed
READY := .venv/.ready
# Holds every pip command below to the tested torch; if pip is configured with CPU wheels, that is the CPU build.
export PIP_CONSTRAINT := constraints/cpu.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# The tests start the package hundreds of times: it is to be compiled once.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test test-slow bench bench-gpu check

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 14

setup: $(READY) ## create .venv with everything that tests and evaluation need

quickstart: $(INSTALLED) ## train a small model on drawn scenes, and write quickstart/report.html
	$(BIN)/contracap quickstart --out quickstart

test: $(READY) ## run the tests, without the slow ones, on two cores
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

test-slow: $(READY) ## run the slow tests, on two cores
	$(BIN)/python -m pytest -m slow tests/apps/test_quickstart.py # its targets are for both cores
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m slow --ignore tests/apps/test_quickstart.py

bench: $(READY) ## speed and memory next to open_clip, clip_benchmark and pycocoevalcap, some hours
	for name in data train generate zeroshot retrieval score; do $(BIN)/python -m benchmarks $$name --json runs/benchmarks/$$name.json || exit; done

bench-gpu: ## the same on a GPU and the tests marked gpu, by $(PYTHON): installs nothing, ends within 9 minutes
	PYTHONPATH=src $(PYTHON) -m benchmarks.gpu --out runs/benchmarks/gpu

check: $(READY) ## check format, lint, types and import directions
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyrefly check
	$(BIN)/python -m pytest -q tests/test_architecture.py

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("contracap needs Python 3.11 or later, and $(PYTHON) is " + sys.version.split()[0] + ": make PYTHON=/path/to/python3.11 ...")'
	$(PYTHON) -m venv .venv

# The package and its dependencies, for users.
$(INSTALLED): pyproject.toml constraints/cpu.txt | $(BIN)/python
	$(BIN)/python -m pip install --editable .
	@touch $(INSTALLED)

# The tests compare with open_clip, pycocoevalcap and clip_benchmark. They are installed without their dependencies, so that
# nothing replaces torch.
$(READY): pyproject.toml constraints/cpu.txt Makefile | $(BIN)/python
	$(BIN)/python -m pip install --editable '.[dev]'
	$(BIN)/python -m pip install --no-deps open_clip_torch==3.3.0 torchvision==0.28.0 timm==1.0.31 pycocoevalcap==1.2 clip_benchmark==1.6.2
	$(BIN)/python -m pip install --no-deps --upgrade --target $(PEERS) transformers==4.49.0 tokenizers==0.21.4 huggingface_hub==0.36.0
	@touch $(INSTALLED) $(READY)
	@$(BIN)/python -c 'import torch; print("torch", torch.__version__)'
	@java -version >/dev/null 2>&1 || echo "NOTE: no Java found. Caption metrics then use contracap's own tokenizer instead of the reference one, and the tests that compare the two are skipped. Install a Java runtime (Debian, Ubuntu: apt-get install default-jre-headless) to have both."
