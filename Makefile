# Two commands: `make demo` takes the tutor from base model to chat, `make test` runs every test.
# Everything lives in .venv. `make test LOCK=newest` does the same with the newest libraries, in .venv-newest.
PYTHON ?= python3
LOCK   ?= default
VENV   := .venv$(if $(filter-out default,$(LOCK)),-$(LOCK))
BIN    := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
export TOKENIZERS_PARALLELISM := false
export OMP_WAIT_POLICY ?= passive

.PHONY: help setup hooks demo test browser lab course gpu check fold levels docs checkpoints clean
help:            ## show this list
	@grep -E '^[a-z]+: .*##|^[a-z]+: *##' Makefile | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(VENV)/.ready-test ## make the whole environment (each target makes what it needs when that is missing)
# What runs the demo, and on top of it what JupyterLab needs, and the tests. An interrupted one goes on where it was.
$(VENV)/.ready-%: pyproject.toml constraints/$(LOCK).txt tests/install.py
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] + ". Try: make $(MAKECMDGOALS) PYTHON=python3.12") if sys.version_info < (3, 11) else None'
	$(PYTHON) tests/install.py $(VENV) $(LOCK) $*

demo: $(VENV)/.ready-demo ## base model to chat, every step measured (about 2 minutes)
	llmcourse demo

test: $(VENV)/.ready-test ## run every test: units, equality proofs, notebooks, browser
	python -m pytest $(if $(JOBS),-n $(JOBS) --no-loadscope-reorder)

browser: $(VENV)/.ready-test ## install a browser for the tests that need one, if there is none
	python tests/browser.py

lab: $(VENV)/.ready-lab ## open JupyterLab at the map of the course
	jupyter lab nbs/index.ipynb

course: $(VENV)/.ready-lab ## run all chapters under papermill, to artifacts/
	python tests/notebooks.py

gpu: $(VENV)/.ready-test ## measure the course on this machine's graphics card: artifacts/gpu/
	python tests/gpu.py

check: $(VENV)/.ready-test ## the quick tests before a commit: exported, clean, folded, linted (about a minute)
	python -m pytest tests/test_house.py tests/test_hooks.py

fold: $(VENV)/.ready-test ## make notebooks ready for a commit: export, clean, fold
	nbdev-export
	nbdev-clean
	python tests/fold.py

levels: $(VENV)/.ready-test ## draw who imports whom: nbs/images/levels.svg
	python tests/levels.py

hooks: $(VENV)/.ready-test ## let git merge notebooks cell by cell, in this clone only (part of setup)
	python tests/hooks.py

docs: $(VENV)/.ready-test ## prepare the site in _proc/ and render it to _docs/ (needs quarto)
	python tests/build_docs.py

checkpoints: $(VENV)/.ready-demo ## rebuild the tutor's checkpoints from nothing (about 20 minutes on two cores)
	llmcourse checkpoints

clean:           ## remove what the targets made, not the environments
	rm -rf artifacts runs _docs _proc build dist .pytest_cache .ruff_cache .hypothesis
