# HiveFabric. `make` shows what there is; `make demo` and `make test` set up everything they need.
SHELL := /bin/bash
# Where Python must not keep what it has compiled, as in many images, each command takes three times as long to start.
export PYTHONDONTWRITEBYTECODE :=
.DEFAULT_GOAL := help
PYTHON ?= python3
BIN := .venv/bin
COMPOSE = $(shell docker compose version >/dev/null 2>&1 && echo docker compose || echo docker-compose)
MEMBERS := proto libs/common services/api-gateway services/scheduler services/registry services/llm-router services/audit executor cli
CONTRACTS := libs/common/tests/eventlog libs/common/tests/bus services/audit/tests/test_relay.py

.PHONY: help setup demo example-research example-self-consistency example-map-reduce test lint format up down bench bench-long bench-peers hostile cgroups wasi-testsuite chaos storm mutations simulate simulate-bugs compose compose-test contract-containers proto requirements clean

help: ## show this
	@awk -F':.*## ' '/^[a-z-]+:.*## / { printf "  make %-24s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: .venv/.ready ## a .venv with everything in it; .venv/bin/hive is the command
	@$(BIN)/python -m compileall -q -x /guest/ $(MEMBERS)
	@$(BIN)/python -m hive_executor.sandbox.warm >/dev/null

.venv/.ready: requirements.txt requirements-dev.txt requirements-setup.txt $(MEMBERS:%=%/pyproject.toml)
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || { echo "HiveFabric needs Python 3.11, 3.12 or 3.13; $(PYTHON) is $$($(PYTHON) -V)."; echo "(biscuit-python, for capability tokens, has no wheel for 3.14 yet.) Say which with: make PYTHON=/path/to/python3"; exit 1; }
	@echo "setting up .venv (once; some minutes on a slow line)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements-setup.txt
	@$(BIN)/uv pip install --quiet --system-certs --compile-bytecode --python $(BIN)/python --require-hashes -r requirements-dev.txt
	@$(BIN)/uv pip install --quiet --system-certs --python $(BIN)/python --no-deps --no-build-isolation $(MEMBERS:%=-e ./%)
	@touch $@
	@echo 'set up; now the command is at hand with: export PATH="$$PWD/.venv/bin:$$PATH"'

demo: setup ## run the code review over this repository's own Python files, on a real stack in a scratch home
	@$(BIN)/python examples/code-review/demo.py

example-research: setup ## answer a question from docs/adr with a small local model: explorers, critics, an integrator
	@$(BIN)/python examples/research/run.py $(ARGS)

example-self-consistency: setup ## ask a model that is mostly wrong several times, and let the answers vote
	@$(BIN)/python examples/self-consistency/run.py $(ARGS)

example-map-reduce: setup ## index this repository on two executors that have to agree; what nothing names
	@$(BIN)/python examples/map-reduce/run.py $(ARGS)

test: setup ## all tests, the short seeded chaos included, in two processes (WORKERS=3 where nothing else runs, 0: in one)
	@$(BIN)/pytest -q -n $${WORKERS:-2} --dist loadfile --no-loadscope-reorder

lint: .venv/.ready ## ruff, mypy --strict, import contracts
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-cache

format: .venv/.ready ## rewrite the sources as the linter wants them
	@$(BIN)/ruff check --fix . ; $(BIN)/ruff format .

up: setup ## start an installation in the background (HIVE_HOME, or ~/.hivefabric)
	@$(BIN)/hive up --detach

down: ## stop it
	@$(BIN)/hive down

bench: setup ## measure, each figure beside its reference in the same run (a part: python -m benchmarks.models)
	@$(BIN)/python -m benchmarks

bench-long: setup ## 100,000 tasks in the log beside 1,000, and restarts with them; some fifteen minutes
	@$(BIN)/python -m benchmarks.long

bench-peers: setup ## install what the benchmarks compare with, in an environment of its own
	@$(BIN)/python -m benchmarks.peer_runs

hostile: setup ## the whole corpus of guests that mean harm: large compile bombs, 300 random modules
	@HIVE_HOSTILE=full $(BIN)/pytest -q -rP executor/tests/sandbox/test_hostile.py executor/tests/sandbox/test_hostile_calls.py

cgroups: setup ## the cgroup tests under a kernel with version 2 (takes user-mode-linux); some three minutes
	@bash executor/tests/sandbox/cgroup2.sh

wasi-testsuite: setup ## the programs of the public WASI test suite, from a checkout: SUITE=/path/to/wasi-testsuite/tests
	@HIVE_WASI_TESTSUITE=$(SUITE) $(BIN)/pytest -q -rPs executor/tests/sandbox/test_wasi_programs.py -k public_suite

chaos: setup ## the long chaos runs: every process killed at random moments, more seeds
	@HIVE_CHAOS_ROUNDS=$${HIVE_CHAOS_ROUNDS:-10} $(BIN)/pytest -q -m chaos tests/chaos

storm: setup ## 5,000 tasks while everything is killed, stopped and cut, from a seed (SEED=1 TASKS=5000); one line of JSON
	@$(BIN)/python -m tests.chaos.storm --seed $${SEED:-1} --tasks $${TASKS:-5000}

mutations: setup ## take out each safeguard in a copy of the tree: its tests and its storm have to notice; half an hour
	@$(BIN)/python -m tests.chaos.mutations --storms

simulate: setup ## the scheduler's code in made-up worlds, in virtual time (SEEDS=1000 SEED=1 TRACE=1 shows one)
	@$(BIN)/python -m tests.simulation --seed $${SEED:-1} $(if $(TRACE),--trace,--seeds $${SEEDS:-1000})

simulate-bugs: setup ## plant bugs in a copy of the tree: the simulation has to find each; some ten minutes
	@$(BIN)/python -m tests.simulation.bugs

compose: ## check docker-compose.yml, and build its images
	@$(COMPOSE) config --quiet
	@$(COMPOSE) build

contract-containers: .venv/.ready ## the suites of log and bus against Postgres and NATS in containers
	@HIVE_TEST_SERVERS=containers TESTCONTAINERS_RYUK_DISABLED=$${TESTCONTAINERS_RYUK_DISABLED:-true} \
	  $(BIN)/pytest -q -p no:cacheprovider $(CONTRACTS)

compose-test: contract-containers ## docker-compose.yml on the engine of this machine: a job, restarts, metrics; some minutes
	@HIVE_COMPOSE_TEST=1 $(BIN)/pytest -q -x tests/compose

proto: .venv/.ready ## generate the gRPC stubs again; without a diff unless a contract changed
	@PYTHON=$(CURDIR)/$(BIN)/python bash proto/generate.sh

EXPORT := $(BIN)/uv export -q --frozen --no-annotate --no-header --no-emit-workspace --all-packages
requirements: .venv/.ready ## pin every dependency again, with hashes
	@$(BIN)/uv lock -q
	@$(EXPORT) --no-dev --extra cache -o requirements.txt >/dev/null
	@$(EXPORT) --all-extras -o requirements-dev.txt >/dev/null
	@grep -A400 -m1 '^uv==' requirements-dev.txt | awk 'NR==1 || /^ /{print; next} {exit}' > requirements-setup.txt

clean: ## remove the .venv and all caches
	@rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis
