# Everything runs in an environment of its own; nothing but a Python (3.11 to 3.13) is needed.
PYTHON ?= python3
VENV ?= .venv
WORKDIR ?= runs/quickstart
BIN := $(VENV)/bin

# The suite in two parts, as tests/conftest.py explains; a part without tests (5) is no failure.
PYTEST = $(BIN)/python -m pytest -n 2 --dist worksteal
define pytest
	$(PYTEST) -m "$(2) not optimised" $(1) || [ $$? -eq 5 ]
	FULL_COMPILE=1 $(PYTEST) -m "$(2) optimised" $(1) || [ $$? -eq 5 ]
endef

.PHONY: quickstart language test fast lint reference clean

quickstart: $(VENV)/.installed-quickstart  ## learn CartPole-v1 from nothing, draw plot.png
	$(BIN)/python -m experiments.control --config=configs/control_cartpole.py --workdir=$(WORKDIR)

language: $(VENV)/.installed-language  ## a language model learns arithmetic within a token budget, without backprop
	$(BIN)/python -m experiments.train --config=configs/arithmetic_eggroll.py --workdir=runs/arithmetic

test: $(VENV)/.installed-dev  ## the whole suite
	$(call pytest,$(ARGS))

fast: export ONE_CASE = 1
fast: $(VENV)/.installed-dev  ## one case of every test that is not marked slow
	$(call pytest,$(ARGS),not slow and)

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
