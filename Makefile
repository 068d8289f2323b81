# `make repro` and `make test` set everything up in .venv first; Python >= 3.11 and make are all they need.
# `make repro TORCH_INDEX=URL` takes torch from another index: that of its CPU builds needs no CUDA packages on Linux.
PYTHON ?= python3
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export OMP_WAIT_POLICY := PASSIVE

.PHONY: help checkout .venv lock repro test test-long lint smoke lab pretrained ablations ablations-all evidence docs bench fuzz \
	clean
.NOTPARALLEL:

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z.-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

.venv: .venv/installed  ## the environment, made anew when pyproject.toml or requirements.lock changes

checkout:
	@git rev-parse --git-dir >/dev/null 2>&1 || { echo "error: this folder is no git checkout (a ZIP has none), and DVC" \
	  "needs one; clone the repository, or run: git init && git add -A && git commit -m 'Start'" >&2; exit 1; }

.venv/installed: pyproject.toml requirements.lock
	@command -v "$(PYTHON)" >/dev/null || \
	  { echo "error: no '$(PYTHON)' found; install Python 3.11 or newer, or name one: make PYTHON=python3.12" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $$("$(PYTHON)" --version) is too old; Python 3.11 or newer is needed: make PYTHON=python3.12" >&2; exit 1; }
	@"$(PYTHON)" -c 'import platform as p; exit((p.system(), p.machine()) == ("Darwin", "x86_64"))' || \
	  { echo "error: there is no torch 2.13 for Intel Macs (x86_64), nor for the Python of one on an Apple chip;" \
	    "use another machine, or an arm64 Python: make PYTHON=/opt/homebrew/bin/python3" >&2; exit 1; }
	@echo "Installing harmonylib and what it needs into .venv (some minutes and GB the first time)"
	@"$(PYTHON)" -m venv .venv || \
	  { echo "error: '$(PYTHON) -m venv' failed; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	.venv/bin/python -m pip install --disable-pip-version-check $(if $(TORCH_INDEX),--extra-index-url "$(TORCH_INDEX)") \
	  -c requirements.lock -e ".[dev]" || { echo "error: the installation failed (see" \
	  "above); if no torch was found, there is none for $$("$(PYTHON)" -VV | tr '\n' ' ')on $$(uname -sm)" >&2; exit 1; }
	@touch $@

lock:  ## write requirements.lock from what is in .venv (after a change of pyproject.toml and a run that went well)
	.venv/bin/python -m pip freeze --exclude-editable | sed 's/+[a-z0-9.]*$$//' >requirements.lock

repro: checkout .venv  ## run the chain: `dvc repro` with the settings of params.yaml
	.venv/bin/dvc repro

test: checkout lint  ## lint, unit tests, then the whole chain under the smoke profile in a temporary clone
	.venv/bin/python -m pytest
	.ci/smoke

lint: .venv  ## ruff check and ruff format --check
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

smoke: checkout .venv  ## the whole chain under the smoke profile in a temporary clone
	.ci/smoke

lab: .venv  ## JupyterLab, to run and change the notebooks by hand
	.venv/bin/jupyter lab

pretrained: .venv  ## train what pretrained/ ships: make pretrained PHOTOS=folder [INDEX=photos.csv]
	@test -n "$(PHOTOS)" || { echo "error: name the photos: make pretrained PHOTOS=folder [INDEX=photos.csv]" >&2; exit 1; }
	@if test -f data/shipped/IHD_train.txt; then \
	  echo "data/shipped is there and is used as it is; remove it to make it of other photos"; \
	else \
	  .venv/bin/harmonylib make-data "$(PHOTOS)" data/shipped $(if $(INDEX),--index "$(INDEX)") --pairs 6000 --leave-out histogram; \
	fi
	.venv/bin/harmonylib profile shipped
	.venv/bin/dvc repro resunet diffharmony@harmonize
	.venv/bin/python -m harmonylib.models.weights artifacts/contrastive_resunet pretrained/contrastive-resunet
	.venv/bin/python -m harmonylib.models.weights artifacts/diffharmony/harmonize pretrained/diffharmony++
	cp artifacts/harmony_vae/harmonize/training.json pretrained/diffharmony++/vae/

ablations: .venv  ## the papers' ablation tables that fit a laptop: 2, 4, 5 and VI
	.venv/bin/dvc repro --glob 'ablations/dvc.yaml:table_*'
	.venv/bin/dvc repro --single-item --force report

ablations-all: .venv  ## every ablation; for the profiles gpu and paper
	.venv/bin/dvc repro ablations/dvc.yaml
	.venv/bin/dvc repro --single-item --force report

EVIDENCE = .venv/bin/python -m ablations.evidence "$(PHOTOS)" $(addprefix --index ,$(INDEX)) --jobs $(or $(JOBS),2)
evidence: checkout .venv  ## the claims with verdicts, 16 core-hours: make evidence PHOTOS=folder [INDEX="a.csv b.csv"]
	@test -n "$(PHOTOS)" || { echo "error: name the photos: make evidence PHOTOS=folder [INDEX=photos.csv]" >&2; exit 1; }
	test -f reports/evidence/power.json || { $(EVIDENCE) --pilot && .venv/bin/python -m report.power; }
	$(EVIDENCE)
	.venv/bin/dvc repro --single-item --force report

docs: .venv  ## after make repro: docs/course, docs/results.md, README's tables: make docs [LOG=what make repro printed]
	.venv/bin/python -m report.course $(LOG)
	.venv/bin/python -m benchmarks.cards

bench: .venv  ## ours against the plain implementation, timed in one run: a table and benchmarks/results.json
	.venv/bin/python -m benchmarks.run

fuzz: .venv  ## 10,000 generated inputs for everything that reads files and settings
	FUZZ_INPUTS=10000 .venv/bin/python -m pytest -q tests/test_fuzz.py

test-long: test fuzz  ## what takes long, too: 10,000 generated inputs, 1,000 odd uploads, README's commands, a wheel
	ODD_UPLOADS=1000 .venv/bin/python -m pytest -q tests/test_app.py -k odd
	.venv/bin/python -m pytest -q tests/long/*.py

clean:  ## remove .venv and tool caches; data, models and reports stay
	rm -rf .venv .pytest_cache .ruff_cache build dist *.egg-info
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
