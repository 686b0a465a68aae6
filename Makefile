# `make train` and `make test` install everything into .venv once, then do their work. The tests run on a CPU; those of
# the kernels run again in Triton's interpreter, and the kernels are compiled for GPUs that need not be there.
#
#   make train ARGS="--config launch/configs/brats.yaml --data.root FOLDER"
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
ARGS ?=

.PHONY: train test lint clean

train: $(VENV)/installed
	$(BIN)/deepspeed launch/train.py $(ARGS)

test: export OMP_NUM_THREADS = 1 # for each of two workers
test: $(VENV)/installed lint
	$(BIN)/python -m pytest --slow -n 2 --dist loadfile --no-loadscope-reorder --durations 10 $(ARGS)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m kernel
	$(BIN)/python -m benchmarks.aot

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# self-attention-cv asks for torchvision, but the parity tests need nothing of it: hence --no-deps.
$(VENV)/installed: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install -c constraints.txt --no-deps self-attention-cv
	touch $@

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache *.egg-info
