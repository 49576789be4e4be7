# make demo and make test set everything up by themselves on a machine with Python, git and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
unexport PYTHONDONTWRITEBYTECODE  # else each of the tests' many processes compiles the sources anew

.PHONY: demo test lint check docs docs-serve wheel sanitize fuzz format clean
demo: $(READY)
	$(BIN)/squawq demo

test: $(READY)
	$(BIN)/python -m pytest -n auto --durations 20

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: lint
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,helm,docs]'
	$(BIN)/python -m pytest -n auto --durations 20

# The wheels as users get them: built, installed into a new environment, tried and tested there. TESTS: files of tests.
wheel:
	tools/check_wheel.sh $(PYTHON) $(TESTS)

# The documentation site, in site/: reference pages from the code, then the pages; a warning or broken link is an error,
# which --quiet would hide.
docs: $(VENV)/.docs
	$(BIN)/python tools/docs_reference.py docs/reference
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

docs-serve: docs
	$(BIN)/mkdocs serve

$(VENV)/.docs: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	touch $@

# The kernels under sanitizers; needs cmake and g++, and some minutes.
sanitize: $(READY)
	tools/sanitize.sh $(BIN)/python

# By hand: goes on until it is stopped or something is found. FUZZ: a file of a folder, or options of atheris.
fuzz: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[fuzz]'
	$(BIN)/python tools/fuzz.py $(FUZZ)

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(READY): pyproject.toml packages/demo/pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/*)
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e packages/demo -e '.[dev]'
	touch $(READY)

clean:
	rm -rf $(VENV)
