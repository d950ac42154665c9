# A fresh Debian 12 needs git, make and Python 3.11, and then only `make demo` or `make test`.
# Root has missing Debian packages installed; anybody else is told which ones to install.

# The first interpreter that is new enough. Any other: make PYTHON=/path/to/python3
PYTHON ?= $(shell for python in python3 python3.11 python3.12 python3.13 python3.14; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& command -v $$python && break; done)
VENV := .venv
RUN := $(VENV)/bin
FUZZ_SECONDS ?= 60
FUZZ_TARGETS ?= stream resumed preempt return-path handoff firecracker answers journal channel texts
CACHE := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/postcopyd

# What the tests use beside Python: a real QEMU (qemu-system-x86), its boot-sector guest (binutils),
# the checker of its Linux guest and the destination in C that the bench compares with (gcc,
# libc6-dev), systemd-analyze for the unit files (systemd), and a machine of its own with a systemd
# that has booted (debootstrap, systemd-container).
DEBIAN_PACKAGES := qemu-system-x86 binutils gcc libc6-dev systemd debootstrap systemd-container

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export MYPY_CACHE_DIR := $(CACHE)/mypy
PIP_INSTALL := $(RUN)/python -m pip install -qq --editable

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help demo test lint format bench bench-vm torture soak fuzz clean compiled debian-packages guests machine

help: ## List the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 16

demo: compiled ## Migrate a guest into a process on this machine and verify its memory
	@$(RUN)/postcopyctl demo

test: debian-packages guests machine lint compiled ## Install what the tests need, lint, run all tests
	$(RUN)/python -m pytest

lint: $(VENV)/installed-dev ## Check style, formatting, types and the order of imports
	$(RUN)/ruff check
	$(RUN)/ruff format --check
	$(RUN)/mypy
	$(RUN)/lint-imports

format: $(VENV)/installed-dev ## Format the code and sort its imports
	$(RUN)/ruff check --select I --fix
	$(RUN)/ruff format

bench: debian-packages $(VENV)/installed-dev compiled ## Measure against a destination written in C (ARGS="--quick --json FILE")
	@$(RUN)/python -m tests.bench $(ARGS)

bench-vm: debian-packages guests compiled ## Migrate a checked guest, by QEMU itself and by postcopyd (ARGS="--quick")
	@$(RUN)/python -m tests.bench_vm $(ARGS)

torture: debian-packages guests compiled ## Go through every case of the matrices that `make test` takes samples of
	$(RUN)/python -m pytest tests/torture --full --timeout 7200 $(ARGS)

soak: $(VENV)/installed-dev compiled ## Run 16 migrations at a time for an hour, with faults of all kinds (ARGS="--minutes 5")
	@$(RUN)/python -m tests.torture.soak $(ARGS)

fuzz: $(VENV)/installed-dev ## Fuzz each reader of what comes from outside for FUZZ_SECONDS (60)
	for target in $(FUZZ_TARGETS); do $(RUN)/python -m tests.fuzz $$target \
		--seconds $(FUZZ_SECONDS) --corpus $(CACHE)/fuzz/$$target || exit 1; done

clean: ## Remove the virtual environment and what tools have left behind
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis \
		.import_linter_cache .grimp_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# As pip compiles a package: guests wait while a daemon that was killed is started again.
compiled: $(VENV)/installed
	@$(RUN)/python -m compileall -q postcopyd tests

debian-packages:
	@tests/install-debian $(DEBIAN_PACKAGES)

# A newer QEMU beside Debian's own, and the kernel of its guest: below $(CACHE), nothing is installed.
guests: debian-packages $(VENV)/installed-dev
	@$(RUN)/python -m tests.interop.fetch

# A Debian that is booted in a container: below $(CACHE) as well.
machine: debian-packages $(VENV)/installed-dev
	@$(RUN)/python -m tests.system.image

$(VENV)/bin/python:
	@$(or $(PYTHON),false) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo \
		"postcopyd needs Python 3.11 or newer: install it, or make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || tests/install-debian \
		"$$($(PYTHON) -c 'import sys; print("python3.%d-venv" % sys.version_info.minor)')"
	$(PYTHON) -m venv $(VENV)

# Stamps: nothing is installed again until pyproject.toml changes.
$(VENV)/installed: pyproject.toml | $(VENV)/bin/python
	$(PIP_INSTALL) .
	@touch $@

$(VENV)/installed-dev: pyproject.toml | $(VENV)/bin/python
	$(PIP_INSTALL) '.[dev]'
	@touch $@ $(VENV)/installed
