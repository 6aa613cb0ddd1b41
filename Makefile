# make test: set up everything and run the tests.   make demo: train, evaluate and draw a tiny MMCLIP on phantoms.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup test slow common lint demo clean

$(VENV)/ready: requirements.txt setup.py pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip "setuptools>=70" wheel
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet -r requirements.txt
	# for its label tables alone, which tests read; nothing imports it, so what it needs is left out
	$(BIN)/pip install --quiet --no-deps torchxrayvision==1.5.7
	touch $@

setup: $(VENV)/ready

test: setup
	$(BIN)/python -m pytest

slow: setup
	$(BIN)/python -m pytest -m slow

# the tests that transformers runs on every model of its own, of the version that is installed; its wheel lacks them
common: setup
	$(BIN)/python tests/fetch_transformers_tests.py
	$(BIN)/python -m pytest -m '' tests/test_transformers_common.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

demo: setup
	$(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no --num_cpu_threads_per_process 2 \
		examples/run_pretrain.py examples/configs/phantom_tiny.yaml --output_dir outputs/demo
	$(BIN)/python examples/run_zero_shot.py --model outputs/demo/checkpoint --phantoms 1000 --calibration_phantoms 500 \
		--output_dir outputs/demo

clean:
	rm -rf build dist *.egg-info outputs
