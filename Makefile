# Everything runs in a virtual environment of its own, .venv; delete it to start afresh.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
STUBS := .stubs/.made

.PHONY: venv vllm test test-server lint format schema architectures demo clean

venv: $(STAMP)

$(STAMP): pyproject.toml requirements/constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements/constraints.txt -e '.[ort,tensorrt-rtx,dev]'
	touch $(STAMP)

# Types of TensorRT's bindings, which ship none: read off the installed module. Not committed, because they are the vendor's.
$(STUBS): $(STAMP) tests/tensorrt/vendor_stubs.py
	$(BIN)/python -m tests.tensorrt.vendor_stubs .stubs
	touch $@

lint: venv $(STUBS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	PYTHONPATH=.typing $(BIN)/lint-imports

# vLLM has an environment of its own, in the user's cache; once there, this takes no time.
vllm: venv
	$(BIN)/compile-sparse runtime install vllm

# Two processes, each test in one thread. Which takes what: tests/support/distribution.py.
test: venv lint vllm
	COMPILE_SPARSE_REQUIRE_VLLM=1 $(BIN)/python -m pytest -n 2 --durations=25

test-server: venv vllm
	COMPILE_SPARSE_REQUIRE_VLLM=1 $(BIN)/python -m pytest -m server tests/vllm

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

schema: venv
	$(BIN)/python -m compile_sparse.compiler.recipes.schema docs/recipe.schema.json

architectures: venv
	$(BIN)/python -m tests.unit.axes.architecture_table docs/architectures.md

demo: venv
	$(BIN)/python examples/tiny_llama.py

clean:
	rm -rf build dist .stubs .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
