# The two commands of the README are `make bench` and `make test`; both need nothing but Python 3.11.
PYTHON ?= python3
VENV := .venv
# What takes some twenty minutes; without --methods `verbtune bench` runs in-context learning, LoRA and
# fine-tuning as well.
METHODS := majority,tfidf,zero-shot,zero-shot+batch,linear-probe,linear-probe+text,linear-probe+last,verbtune
BIN := $(VENV)/bin
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: bench test lint format wheel clean

bench: $(VENV)/bench
	$(BIN)/verbtune bench --methods $(METHODS) --seeds 3 --limit 100 --output bench-results

test: $(VENV)/dev
	$(BIN)/pytest

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Builds the wheel and runs it from where pip put it, away from this checkout.
wheel: $(VENV)/dev
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir dist .
	$(BIN)/pip install --quiet --no-deps --upgrade --target dist/installed dist/*.whl
	cd dist/installed && PYTHONPATH=. HF_HUB_OFFLINE=1 ../../$(BIN)/python -m verbtune show sentiment --model builtin/causal

clean:
	rm -rf $(VENV) dist bench-results

$(VENV)/pip:
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/bench: $(VENV)/pip pyproject.toml constraints.txt
	$(INSTALL) --editable ".[bench]"
	touch $@

$(VENV)/dev: $(VENV)/pip pyproject.toml constraints.txt
	$(INSTALL) --editable ".[dev]"
	touch $@
