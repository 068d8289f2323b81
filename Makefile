# `make repro` and `make test` set everything up in .venv first; Python >= 3.11 and make are all they need.
PYTHON ?= python3
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export OMP_WAIT_POLICY := PASSIVE

.PHONY: help .venv repro test lint smoke lab pretrained ablations ablations-all bench fuzz clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z.-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

.venv: .venv/installed  ## the environment, made anew when pyproject.toml changes

.venv/installed: pyproject.toml
	@command -v "$(PYTHON)" >/dev/null || \
	  { echo "error: no '$(PYTHON)' found; install Python 3.11 or newer, or name one: make PYTHON=python3.12" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $$("$(PYTHON)" --version) is too old; Python 3.11 or newer is needed: make PYTHON=python3.12" >&2; exit 1; }
	@echo "Installing harmonylib and what it needs into .venv (some minutes and GB the first time)"
	@"$(PYTHON)" -m venv .venv || \
	  { echo "error: '$(PYTHON) -m venv' failed; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	.venv/bin/python -m pip install --disable-pip-version-check -e ".[dev]"
	@touch $@

repro: .venv  ## run the chain: `dvc repro` with the settings of params.yaml
	.venv/bin/dvc repro

test: lint  ## lint, unit tests, then the whole chain under the smoke profile in a temporary clone
	.venv/bin/python -m pytest
	.ci/smoke

lint: .venv  ## ruff check and ruff format --check
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

smoke: .venv  ## the whole chain under the smoke profile in a temporary clone
	.ci/smoke

lab: .venv  ## JupyterLab, to run and change the notebooks by hand
	.venv/bin/jupyter lab

pretrained: .venv  ## train what pretrained/ ships: make pretrained PHOTOS=folder [INDEX=photos.csv]
	@test -n "$(PHOTOS)" || { echo "error: name the photos: make pretrained PHOTOS=folder [INDEX=photos.csv]" >&2; exit 1; }
	@if test -f data/shipped/IHD_train.txt; then \
	  echo "data/shipped is there and is used as it is; remove it to make it of other photos"; \
	else \
	  .venv/bin/harmonylib make-data "$(PHOTOS)" data/shipped $(if $(INDEX),--index "$(INDEX)") --variants 1 --size 256; \
	fi
	.venv/bin/harmonylib profile shipped
	.venv/bin/dvc repro resunet diffharmony@harmonize
	.venv/bin/python -m harmonylib.weights artifacts/contrastive_resunet pretrained/contrastive-resunet
	.venv/bin/python -m harmonylib.weights artifacts/diffharmony/harmonize pretrained/diffharmony++
	cp artifacts/harmony_vae/harmonize/training.json pretrained/diffharmony++/vae/

ablations: .venv  ## the papers' ablation tables that fit a laptop: 2, 4, 5 and VI
	.venv/bin/dvc repro --glob 'ablations/dvc.yaml:table_*'
	.venv/bin/dvc repro --single-item --force report

ablations-all: .venv  ## every ablation; for the profiles gpu and paper
	.venv/bin/dvc repro ablations/dvc.yaml
	.venv/bin/dvc repro --single-item --force report

bench: .venv  ## ours against the plain implementation, timed in one run: a table and benchmarks/results.json
	.venv/bin/python -m benchmarks.run

fuzz: .venv  ## 10,000 generated inputs for everything that reads files and settings
	FUZZ_INPUTS=10000 .venv/bin/python -m pytest -q tests/test_fuzz.py

clean:  ## remove .venv and tool caches; data, models and reports stay
	rm -rf .venv .pytest_cache .ruff_cache build dist *.egg-info
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
