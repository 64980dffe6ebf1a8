# Two commands: `make demo` and `make test`. Everything else serves them.
#
#   PYTHON=python3.12 make test     another interpreter
#   make demo ARGS="--steps=200"    options of examples/train_trimodal.py
#
# Paths are relative throughout, so that a checkout may lie under a path with spaces.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
RUN    := $(BIN)/python

.PHONY: demo test test-slow test-kernels lint types wheel benchmarks clean help

help:
	@echo "make demo   train, sample and score the tri-modal model; report in runs/demo"
	@echo "make test   run the test suite"
	@echo "make lint types test-slow test-kernels wheel benchmarks clean"

# One environment, two levels of extras; a finished one is used again until
# pyproject.toml changes.
$(VENV)/examples.stamp: pyproject.toml
	@$(PYTHON) .ci/environment.py $(VENV) examples
$(VENV)/test.stamp: pyproject.toml
	@$(PYTHON) .ci/environment.py $(VENV) test

demo: $(VENV)/examples.stamp
	@$(RUN) examples/train_trimodal.py --workdir=runs/demo $(ARGS)

test: $(VENV)/test.stamp
	@$(RUN) -m pytest -n 2 -m "not slow" $(ARGS)

test-slow: $(VENV)/test.stamp
	@$(RUN) -m pytest -n 2 -m slow $(ARGS)

# Needs no other target: it finds or makes an environment of its own.
test-kernels:
	@$(PYTHON) .ci/kernels.py $(VENV)-kernels $(ARGS)

lint: $(VENV)/test.stamp
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .
	@$(RUN) -m codespell_lib

types: $(VENV)/test.stamp
	@$(RUN) -m mypy

wheel: $(VENV)/test.stamp
	@$(RUN) .ci/wheel.py

benchmarks: $(VENV)/test.stamp
	@$(RUN) -m pip install --quiet torch
	@$(RUN) benchmarks/train_step.py
	@$(RUN) benchmarks/data_pipeline.py
	@$(RUN) benchmarks/optimizer.py
	@$(RUN) benchmarks/samplers.py
	@$(RUN) benchmarks/sigmoid_cpu.py

clean:
	@rm -rf $(VENV) $(VENV)-kernels runs dist build
