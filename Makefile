# Everything runs in an environment of its own; nothing but a Python (3.11 to 3.13) is needed.
PYTHON ?= python3
VENV ?= .venv
WORKDIR ?= runs/quickstart
BIN := $(VENV)/bin

.PHONY: quickstart language test fast lint reference clean

quickstart: $(VENV)/.installed-quickstart  ## learn CartPole-v1 from nothing, draw plot.png
	$(BIN)/python -m experiments.control --config=configs/control_cartpole.py --workdir=$(WORKDIR)

language: $(VENV)/.installed-language  ## a language model learns arithmetic within a token budget, without backprop
	$(BIN)/python -m experiments.train --config=configs/arithmetic_eggroll.py --workdir=runs/arithmetic

test: $(VENV)/.installed-dev  ## the whole suite
	$(BIN)/python -m pytest -n 2 --import-mode=importlib $(ARGS)

fast: $(VENV)/.installed-dev  ## the suite without the tests marked slow
	$(BIN)/python -m pytest -n 2 --import-mode=importlib -m "not slow" $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

reference: $(VENV)/.installed-dev $(VENV)/.installed-reference  ## torch, transformers and rwkv, which `test` then compares models with

clean:
	rm -rf $(VENV)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# A stamp younger than the two files below says that the environment fits them.
$(VENV)/.installed-quickstart: EXTRAS = control,plot
$(VENV)/.installed-language: EXTRAS = language,plot
$(VENV)/.installed-dev: EXTRAS = dev
$(VENV)/.installed-reference: EXTRAS = reference
$(VENV)/.installed-%: setup.cfg pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --editable '.[$(EXTRAS)]'
	touch $@
