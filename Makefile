# make train | compare | docs | test | test-slow | test-versions | test-nodes: each sets up .venv by itself; a second call
# does not install again. make gpu-check: on a machine with a GPU.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
READY := .venv/.ready
LONGER := --timeout 900 -o faulthandler_timeout=960

.PHONY: setup train compare docs test test-slow test-versions test-nodes gpu-check
setup: $(READY)

$(READY): pyproject.toml .ci/constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint .ci/constraints.txt --editable '.[dev]'
	touch $@

train: $(READY)
	$(BIN)/torchrun --nproc-per-node 2 launch/train.py +norm=syncbn

compare: $(READY)
	$(BIN)/python launch/compare.py

# The pages of docs/ as a site that needs no network: open site/index.html.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

test: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	@$(BIN)/mypy >.venv/mypy.txt 2>&1 & types=$$!; \
	$(BIN)/python -m pytest -m "not slow and not nodes"; tests=$$?; \
	wait $$types; types=$$?; cat .venv/mypy.txt; exit $$((tests + types))

.venv/.ready-frameworks: $(READY)
	$(BIN)/python -m pip install --quiet --constraint .ci/constraints.txt --editable '.[dev,frameworks,parity,mnist]'
	touch $@

# It installs the packages that docs/frameworks.md and docs/weights.md are about (2 GB), and one that holds images.
test-slow: .venv/.ready-frameworks
	$(BIN)/python -m pytest -m slow $(LONGER)

# Other versions of torch and Python, each in an environment of its own: it needs these versions of Python, and some 30 GB.
test-versions: $(READY)
	$(BIN)/nox

.venv/.ready-ray: $(READY)
	$(BIN)/python -m pip install --quiet --constraint .ci/constraints.txt --editable '.[dev,ray]'
	touch $@

# Linux and root; it says first what else is missing, and installs nothing but Ray (0.5 GB).
test-nodes: .venv/.ready-ray
	$(BIN)/python -m pytest -m nodes $(LONGER)

# Sets nothing up: a machine with a GPU may have no network. ARGS='--device cpu' runs what a CPU can.
gpu-check:
	$(if $(wildcard $(READY)),$(BIN)/python,python3) launch/gpu_check.py $(ARGS)
