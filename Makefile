# `make help` lists what one can do. Every target takes up what an earlier call left.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ROOMS := api tracking operator trainer
# Holds where the environment was made: it names that place throughout, and in a copy would run the original's code.
STAMP := $(VENV)/.heimdall-stamp
# What is imported is compiled once, whatever a machine thinks of that: torch alone takes seconds each time.
export PYTHONDONTWRITEBYTECODE :=
# A mirror that serves pip is to serve uv, which by itself knows neither pip's index nor whom the machine trusts.
UV_SYSTEM_CERTS ?= $(if $(wildcard /etc/ssl/cert.pem /etc/ssl/certs/*),1,0)
export UV_SYSTEM_CERTS
ifdef PIP_INDEX_URL
UV_DEFAULT_INDEX ?= $(PIP_INDEX_URL)
export UV_DEFAULT_INDEX
endif

.PHONY: help
help: ## List the targets
	@grep -hE '^[a-z][a-z-]*:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/\1\t\2/' | expand -t 16

# An environment that was copied or moved, or whose Python has gone, is not up to date, whatever its stamp's time.
ifneq "$(shell $(BIN)/python -c 'import pip' 2> /dev/null && cat $(STAMP) 2> /dev/null)" "$(CURDIR)"
.PHONY: stale
$(STAMP): stale
endif

$(STAMP): requirements/bootstrap.txt requirements/dev.txt $(ROOMS:%=%/pyproject.toml)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: set PYTHON=/path/to/python3.11")'
	@echo "→ development environment in $(VENV)"
	@case "$$($(BIN)/pip --version 2> /dev/null)" in \
		*" from $(CURDIR)/$(VENV)/"*) ;; \
		*) $(PYTHON) -m venv --clear $(VENV) ;; \
	esac
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/bootstrap.txt
	@index=$$($(BIN)/python -m pip config get global.index-url 2> /dev/null || true); \
		UV_DEFAULT_INDEX="$${UV_DEFAULT_INDEX:-$$index}" \
		$(BIN)/uv pip sync --quiet --python $(BIN)/python --require-hashes requirements/bootstrap.txt requirements/dev.txt
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation $(ROOMS:%=-e ./%)
	@printf '%s' "$(CURDIR)" > $(STAMP)

.PHONY: venv
venv: $(STAMP) ## Make the development environment (.venv)

.PHONY: check
check: venv ## Lint, types, room boundaries and unit tests: about a minute
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest -q -n 2 --dist loadfile -m "not slow" tests/unit

.PHONY: demo
demo: needs ## The whole way once: cluster, chart, recordings, a TrainingRun, its registered model
	@$(PYTHON) hack/demo

.PHONY: test
test: needs-test venv ## Lint, types, and the tests: unit, integration, e2e on a real cluster
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@$(PYTHON) hack/cluster parts helm kubeconform prometheus gitops-health minio
	@PYTHON="$(PYTHON)" hack/e2e --beside

.PHONY: e2e
e2e: needs venv ## The tests on a real cluster alone
	@PYTHON="$(PYTHON)" hack/e2e

.PHONY: external
external: needs venv ## Two releases on external services, over TLS: PostgreSQL, versitygw for S3, MLflow
	$(BIN)/pytest tests/e2e/chart/test_external.py

.PHONY: kueue
kueue: needs venv ## Queues, preemption and time limits of the real Kueue, as docs/howto/kueue.md tells them
	$(BIN)/pytest tests/e2e/test_kueue.py

.PHONY: argo
argo: venv ## Argo CD's own package over the recorded resources; it takes minutes to build
	@$(PYTHON) hack/cluster parts argo-health
	$(BIN)/pytest tests/unit/gitops

.PHONY: spread
spread: needs venv ## The workers of a group on two nodes, with the real trainer, whose image goes to both: 12 GB more
	HEIMDALL_SPREAD=1 $(BIN)/pytest tests/e2e/test_localizer_deaths.py -k two_workers

.PHONY: compose
compose: needs venv ## compose.yaml started, trained with, stopped and started again
	$(BIN)/pytest tests/e2e/test_compose.py

.PHONY: engine
engine: needs venv ## The cluster in a Docker engine that was there, with a mirror, and out of it again; and what a killed `up` leaves
	$(BIN)/pytest -s tests/e2e/test_engine.py tests/e2e/test_killed.py

.PHONY: chaos
chaos: needs venv ## Kill the operator at random and after each of its actions, take away what it stands on: a quarter of an hour
	HEIMDALL_CHAOS_S=300 HEIMDALL_CHAOS_FAULT_S=60 HEIMDALL_CHAOS_LIVES=7 HEIMDALL_CHAOS_TIMES=9 \
		$(BIN)/pytest -s tests/e2e/chaos

.PHONY: outages
outages: needs-test venv ## MLflow, PostgreSQL, MinIO stay away for three minutes in mid-training, each and all: half an hour
	HEIMDALL_OUTAGE_S=180 $(BIN)/pytest -s tests/integration/test_outages.py
	HEIMDALL_OUTAGE_S=180 $(BIN)/pytest -s tests/integration/test_tracking.py -k servers_are_away

.PHONY: fuzz
fuzz: needs venv ## 1,000 generated specs: each refused, failed with a reason, or trained
	HEIMDALL_FUZZ_SPECS=1000 $(BIN)/pytest -s tests/e2e/test_fuzz.py

.PHONY: bench-operator
bench-operator: venv needs ## The operator's latency and throughput next to the bare calls
	$(BIN)/python -m tests.bench.operator

.PHONY: bench-kopf
bench-kopf: venv needs ## Three ways to use kopf, with the same work: what decision 1 rests on
	$(BIN)/python -m tests.bench.kopf_ways

.PHONY: docs
docs: venv ## The documents as a site, in build/site; a link that leads nowhere is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "build/site/index.html"

.PHONY: diagrams
diagrams: ## Draw the documents' diagrams for the site, after a change of their text (needs npm and Chromium)
	@$(PYTHON) hack/diagrams.py

.PHONY: bench-science
bench-science: venv ## What the localizer learns, next to classical estimators and the bound of the physics
	$(BIN)/python -m tests.bench.science

.PHONY: bench-trainer
bench-trainer: venv ## What tracking, spectrogram, loader, Lightning and checkpoints cost a training
	$(BIN)/python -m tests.bench.trainer

.PHONY: needs
needs: ## Tell what is missing on this machine, and how to get it
	@$(PYTHON) hack/needs.py

.PHONY: needs-test
needs-test: ## The same for the tests, which start servers of their own
	@$(PYTHON) hack/needs.py --test

.PHONY: clean
clean: ## Take the cluster down and remove its cache
	@$(PYTHON) hack/cluster down --all

.PHONY: lock
lock: venv ## Resolve requirements/*.txt anew
	PATH="$(CURDIR)/$(BIN):$$PATH" hack/lock

.PHONY: generate
generate: venv ## Write what is generated: CRD and reference from the types, README and schema of the chart from its values
	$(BIN)/python -m heimdall_api.crd
	$(BIN)/python -m heimdall_api.reference
	$(BIN)/python hack/chart
