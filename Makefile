.PHONY: help setup demo lab export run wheels carried readme docs check test test-all bench experiments clean
.NOTPARALLEL:
PY ?= python3
VENV ?= .venv
N ?= 2
BIN = $(VENV)/bin
TOOL = $(BIN)/python nbs/_tools
PYTEST = $(BIN)/python -m pytest -n $(N) --dist worksteal
META = settings.ini setup.py pyproject.toml constraints.txt
CARRIED = nbdev nbclient ipykernel pillow matplotlib numpy einops safetensors tqdm
INSTALL = $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e

help:      ## show this list
	@sed -n 's/^\([a-z-]*\): .*## /\1	/p' $(MAKEFILE_LIST) | expand -t 13
setup:     $(VENV)/.dev ## install the package and all tools into .venv
demo:      $(VENV)/.train ## train a small Reformer and let it write, in a few minutes on a CPU
	rm -rf out/demo
	$(BIN)/reformer-nb train --out out/demo
lab:       $(VENV)/.dev ## open the notebooks
	$(BIN)/jupyter lab --notebook-dir nbs
export:    $(VENV)/.dev ## notebooks -> reformer_nb
	$(TOOL)/export.py
run:       $(VENV)/.dev ## run notebooks, store their outputs; NB="nbs/01_hashing.ipynb" FLAGS="slow cuda"
	$(TOOL)/nbrun.py $(NB) --flags "$(FLAGS)"
wheels:    | $(BIN)/python ## download what `make carried` installs; FOR="--python-version 3.12 --platform manylinux_2_28_x86_64" for another machine
	$(BIN)/python -m pip download -q --disable-pip-version-check -c constraints.txt --only-binary :all: -d wheels $(FOR) $(CARRIED)
carried:   ## set up `make run` from wheels/, without a network, beside the torch and triton that are there
	@test -d wheels || { echo "There is no folder wheels; run 'make wheels' where there is a network, and carry it here"; exit 1; }
	test -x $(BIN)/python || $(PY) -m venv --system-site-packages $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-index --find-links wheels $(CARRIED)
	$(BIN)/python -c 'import torch, triton'
	@touch $(VENV)/.dev
readme:    $(VENV)/.dev ## nbs/index.ipynb -> README.md
	$(TOOL)/readme.py
docs:      $(VENV)/.dev ## notebooks and their stored outputs -> docs
	$(TOOL)/docs.py
check:     $(VENV)/.dev ## lint, and see whether all that is made from the notebooks is up to date
	$(TOOL)/check.py
test:      check ## the check, then every notebook and tests/
	$(PYTEST)
test-all:  check ## the same with whole grids and slow cells and tests
	$(PYTEST) --all --flags "slow $(FLAGS)"
bench:     $(VENV)/.dev ## time and memory beside reformer_pytorch, Hugging Face and full attention -> nbs/experiments/results; ARGS=--quick takes minutes
	$(BIN)/python nbs/experiments/speed.py $(ARGS)
experiments: $(VENV)/.dev ## what the tables of nbs/experiments still lack, in hours
	$(BIN)/python nbs/experiments/duplication.py small ablation table half peers
	$(BIN)/python nbs/experiments/text.py
	$(BIN)/python nbs/experiments/memory_law.py
	$(BIN)/python nbs/experiments/decoding.py
	$(BIN)/python nbs/experiments/recurrence.py
clean:     ## remove what builds and runs leave; .venv stays
	rm -rf _proc build dist out *.egg-info .pytest_cache .ruff_cache .hypothesis

$(BIN)/python:
	@$(PY) -c 'import sys; sys.exit(sys.version_info < (3,11))' || \
	  { $(PY) --version; echo 'Python 3.11 or newer is needed; name one, as in: make PY=python3.12'; exit 1; }
	$(PY) -m venv $(VENV)
$(VENV)/.train: $(META) | $(BIN)/python
	$(INSTALL) '.[train]'
	@touch $@
$(VENV)/.dev: $(META) | $(BIN)/python
	$(INSTALL) '.[dev,bench]'
	@touch $@ $(VENV)/.train
