# The few commands of this repository. Each makes what it needs first: `make demo` in a fresh clone is enough.

DEV   := .venv/.ready-dev
BIN   := .venv/bin
SRC   := $(wildcard core/src shared/*/src plugins/*/src contrib/*/src)
JOBS  ?= 3
BENCH ?= embedded
CHAOS := $(if $(SEED),--seed $(SEED)) $(if $(TASKS),--tasks $(TASKS)) $(if $(DISASTERS),--disasters $(DISASTERS)) \
	$(if $(DURATION),--duration $(DURATION))
PROJECTS := pyproject.toml $(wildcard core/pyproject.toml shared/*/pyproject.toml plugins/*/pyproject.toml contrib/*/pyproject.toml)

# Tests and demo start hundreds of Pythons: each would compile all that it imports, which is half of what a start costs.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup demo services test lint format types layers docs wheels bench chaos clean
help:          ## say what there is (the default)
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-8s %s\n", $$1, $$2}' Makefile
setup: $(DEV)  ## make .venv: every distribution editable, and the tools (WITH=pip: without uv)
demo: $(DEV)   ## see tasks run on this machine, with no server
	$(BIN)/python demo/run.py
services:      ## bring the servers that the tests start: Redis, RabbitMQ, celery-node (Debian)
	scripts/services
test: $(DEV)   ## run every test (ARGS="-k chain -x" goes to pytest; JOBS=1: one at a time)
	scripts/services --if-allowed
	$(BIN)/pytest --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)
lint: $(DEV)   ## check style and format
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
format: $(DEV) ## mend style and format
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .
types: $(DEV)  ## check types
	$(BIN)/mypy $(SRC)
layers: $(DEV) ## check that imports point downwards (.importlinter)
	$(BIN)/lint-imports --no-logo
docs: $(DEV) .venv/.ready-docs    ## build the pages into docs/_build/html
	$(BIN)/python -m sphinx -W -n -b html docs docs/_build/html
wheels: $(DEV) ## build every distribution, and gather what they depend on, into dist/
	scripts/wheels dist
bench: $(DEV) .venv/.ready-bench  ## measure against others, on the same work (BENCH=brokers: on Redis or RabbitMQ)
	$(BIN)/python benchmarks/$(BENCH).py $(ARGS)
chaos: $(DEV)  ## random disasters over a mixed load (SEED=… TASKS=… DISASTERS=… DURATION=seconds)
	$(BIN)/python tests/chaos/run.py $(CHAOS) $(ARGS)
clean:         ## remove everything that these commands made
	rm -rf .venv .services dist docs/_build .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

# One stamp a dependency group, older than a pyproject.toml only when that has changed since.
.venv/.ready-%: scripts/setup $(PROJECTS)
	scripts/setup $* && touch $@
