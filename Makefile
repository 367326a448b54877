# Every target makes the environment it needs by itself; none expects an active one, and an active one changes nothing.

SHELL := /bin/sh
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

unexport CONDA_PREFIX PIP_PREFIX PIP_TARGET PIP_USER PYTHONHOME PYTHONPATH VIRTUAL_ENV
# Where it is set, every process of the hundreds that the tests start would compile all that it imports anew.
unexport PYTHONDONTWRITEBYTECODE

# The Python that the environments are made with, 3.11 or newer; when empty, python3.11 or else python3.
PYTHON ?=
# What `make torch` installs. It is in no lock: which build of it is wanted depends on the machine.
TORCH ?= torch==2.13.0
# Arguments for pytest (`make test PYTEST_ARGS="-k lookahead"`) and more for the demo. Without any the tests run in two
# processes, each file in one of them; the folders in their order, so that the short files of tests/unit come last and
# both processes end at the same time.
PYTEST_ARGS ?= -n 2 --dist loadfile --no-loadscope-reorder
DEMO_ARGS ?=
BENCH_ARGS ?=
LOCK_ARGS ?=
FUZZ_INPUTS ?= 100000
FUZZ_ARGS ?=

BIN := .venv/bin
INSTALLED := .venv/.installed
PROTO_INSTALLED := .venv-proto/.installed
SCRIPTS := $(wildcard tools examples benchmarks)
CODE := client server $(SCRIPTS) $(wildcard tests)

# An environment holds absolute paths: one that came along with a moved or copied checkout would run the code of the old
# place, so it is made anew.
ifneq ($(shell cat $(INSTALLED) 2>/dev/null),$(CURDIR))
.PHONY: $(INSTALLED)
endif
ifneq ($(shell cat $(PROTO_INSTALLED) 2>/dev/null),$(CURDIR))
.PHONY: $(PROTO_INSTALLED)
endif

.PHONY: help setup torch demo up down test soak fuzz lint types fmt docs proto bench lock clean

help: ## Say what the targets are (the default)
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-7s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(INSTALLED) ## Make .venv from requirements.lock, with both distributions editable
	@echo "Ready. Next: 'make demo' trains a small network against a server, 'make help' lists the rest."

torch: $(INSTALLED) ## Add PyTorch to .venv, from where pip finds it; without it its tests skip
	@$(BIN)/python -m pip install --quiet '$(TORCH)'

demo: $(INSTALLED) ## Train on handwritten digits against a server on this machine (DEMO_ARGS)
	@$(BIN)/python examples/digits/demo.py $(DEMO_ARGS)

up: ## Start a server and workers in containers (WORKERS=4, KEDGE_PORT=50051, TLS=1, GPU=1)
	@docker/compose.sh up

down: ## End what `make up` has started; what the server holds stays in its volume
	@docker/compose.sh down

# The executable and not `python -m pytest`: the latter puts the root on sys.path, where client/ and server/ would be
# importable as namespace packages.
test: $(INSTALLED) ## Run the tests (PYTEST_ARGS)
	@$(BIN)/pytest $(PYTEST_ARGS)

soak: $(INSTALLED) ## Run the tests that take long (half an hour)
	@$(BIN)/pytest -m soak

fuzz: $(INSTALLED) ## Throw FUZZ_INPUTS=100000 at each decoder, RPC and weakness of the port (an hour)
	@KEDGE_FUZZ_INPUTS='$(FUZZ_INPUTS)' $(BIN)/pytest tests/fuzz -n 2 --dist worksteal --timeout 7200 $(FUZZ_ARGS)

lint: $(INSTALLED) $(PROTO_INSTALLED) ## Check style, layers, protos, and that what is generated is fresh
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/lint-imports --no-logo
	$(BIN)/hadolint docker/*.Dockerfile
	.venv-proto/bin/python tools/generate_protos.py --check
	tools/lint_protos.sh
	$(BIN)/python tools/generate_errors.py --check

docs: $(INSTALLED) ## Write what is generated from the catalogue of errors
	@$(BIN)/python tools/generate_errors.py

types: $(INSTALLED) ## Check types
	$(BIN)/mypy

fmt: $(INSTALLED) ## Format, and fix what can be fixed by itself
	$(BIN)/ruff check --fix-only $(CODE)
	$(BIN)/ruff format $(CODE)

proto: $(PROTO_INSTALLED) ## Generate client/src/kedge/v1 from proto/
	@.venv-proto/bin/python tools/generate_protos.py
	@rm -rf .mypy_cache # it remembers of a module that is new now that there was none

bench: $(INSTALLED) ## Measure, and write docs/benchmarks.md (half an hour, nothing else running; BENCH_ARGS)
	@$(BIN)/python benchmarks/report.py $(BENCH_ARGS)

lock: ## Resolve requirements.lock and requirements-proto.lock anew (LOCK_ARGS=--upgrade for the newest)
	@PYTHON='$(PYTHON)' tools/make_locks.sh $(LOCK_ARGS)

clean: ## Remove the environments, the caches and what was built
	rm -rf .venv .venv-proto .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	rm -rf dist client/dist server/dist
	find $(CODE) -type d -name __pycache__ -prune -exec rm -rf {} +

$(INSTALLED): requirements.lock pyproject.toml client/pyproject.toml server/pyproject.toml tools/make_venv.sh
	@PYTHON='$(PYTHON)' tools/make_venv.sh .venv requirements.lock client server

$(PROTO_INSTALLED): requirements-proto.lock tools/make_venv.sh
	@PYTHON='$(PYTHON)' tools/make_venv.sh .venv-proto requirements-proto.lock
