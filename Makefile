# `make train` and `make test` install everything into .venv once, then do their work.
#
#   make train ARGS="--config launch/configs/brats.yaml --data.root FOLDER"
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
ARGS ?=

.PHONY: train test lint clean

train: $(VENV)/installed
	$(BIN)/deepspeed launch/train.py $(ARGS)

test: $(VENV)/installed lint
	$(BIN)/python -m pytest -n 2 --dist loadfile --durations 10 $(ARGS)

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# self-attention-cv asks for torchvision, of which the parity tests need nothing: hence --no-deps.
$(VENV)/installed: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install -c constraints.txt --no-deps self-attention-cv
	touch $@

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache *.egg-info
