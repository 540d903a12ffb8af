# `make` lists the targets. Everything runs inside VENV; `setup` makes it once and is a no-op afterwards.
#   make test PYTHON=python3.12        the interpreter that VENV is made from
#   make test VENV=/path/to/env        your own environment, with detectron2 and torch: used as it is, never changed
#   make demo ARGS="..."               more arguments for the tool
PYTHON ?= python3
VENV   ?= .venv
ARGS   ?=
# Several threads in each of several processes would wait for each other more than work: one thread each.
JOBS   ?= 2
MMDET  ?= .venv-mmdet

# This checkout comes first, so that an environment of yours need not have the plugin installed.
RUN := PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}" "$(VENV)/bin/python"
DEMO_ROWS := ohem_128_nms0.7 ohem1to3_128_nms0.5 fl_gamma2_alpha0.25 ce_alpha0.75
SOURCES := focal_plugin tools benchmark tests examples configs setup.py

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-mmdet bench docs lint wheel clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## make VENV: torch, Detectron2, this plugin (once; 6 GB on Linux)
	@command -v "$(PYTHON)" >/dev/null || { echo "setup: no '$(PYTHON)' here. Type: make setup PYTHON=/path/to/python3.11" >&2; exit 1; }
	@"$(PYTHON)" tools/setup_env.py "$(VENV)"

demo: setup ## train FL, CE, OHEM and OHEM 1:3 on the embedded data set, and compare them in report/
	$(RUN) tools/reproduce.py --table 1d --profile digits --rows $(DEMO_ROWS) $(ARGS)

test: setup ## run the tests, in JOBS processes
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1}; export OMP_NUM_THREADS; \
	if $(RUN) -c "import xdist" 2>/dev/null; then set -- -n $(JOBS) --dist loadfile; else set --; fi; \
	$(RUN) -m pytest tests "$$@" $(ARGS)

test-mmdet: setup ## test focal_plugin.mmdet with MMDetection, which is put into MMDET (once; 60 MB)
	@test -d "$(MMDET)" || { rm -rf "$(MMDET).part"; \
	$(RUN) -m pip install -q --no-deps --target "$(MMDET).part" -r requirements/mmdet.txt && mv "$(MMDET).part" "$(MMDET)"; }
	PYTHONPATH="$(CURDIR):$(MMDET)" "$(VENV)/bin/python" -m pytest tests/test_mmdet.py $(ARGS)

bench: setup ## measure the losses beside fvcore's and torchvision's, and a training step beside stock RetinaNet's
	$(RUN) tools/benchmark_loss.py $(ARGS)
	$(RUN) benchmark/step.py

docs: setup ## build docs/ into site/, and check its links (puts mkdocs-material into VENV, if it is not there)
	@$(RUN) -c "import material" 2>/dev/null || $(RUN) -m pip install -q -r requirements/docs.txt
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict

lint: setup ## check style and formatting
	@$(RUN) -m ruff --version >/dev/null 2>&1 || { echo "lint: no ruff in $(VENV). Type: $(VENV)/bin/python -m pip install ruff" >&2; exit 1; }
	$(RUN) -m ruff check $(SOURCES)
	$(RUN) -m ruff format --check $(SOURCES)

wheel: setup ## build the wheel into dist/
	rm -rf build
	$(RUN) -m pip wheel . --no-deps --no-build-isolation --wheel-dir dist

clean: ## remove build products and caches; VENV, output/ and report/ stay
	rm -rf build dist site focal_plugin.egg-info .pytest_cache .ruff_cache
	find $(SOURCES) -name __pycache__ -prune -exec rm -rf {} +
