# One door for people and for CI. `make demo` and `make test` do everything on a fresh clone. Of the
# system `make demo` expects Python 3.10–3.13, and `make test` Java 17 too.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# What the demo needs, and neither torch, nor Spark, nor the tools of tests; by uv where there is one.
DEMO := $(VENV)/.demo
# All the rest on top, by pip. torch is pinned too: without a pin pip takes a CUDA build of several GB.
STAMP := $(VENV)/.installed

# The page's runtime, by npm. Without npm's registry all works but the page's mode on the device.
RUNTIME := src/pomona/web/assets/runtime/runtime.json
SET_UP := $(STAMP) $(RUNTIME)

# Spark's classes as the tests' JVMs map them: they start in 60 % of the time. The tests run without.
ARCHIVE := $(VENV)/spark.jsa

# Apart from the tests' environment: their requirements would meet those of the tests.
TOOLS := $(VENV)/tools

.PHONY: demo test check format docs site runtime lock audit clean

demo: $(DEMO)
	$(BIN)/pomona demo --out demo

test: $(SET_UP) $(ARCHIVE)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(STAMP)
	$(BIN)/python docs/generate_cli.py

# The documentation as static files in site/; look at it with python -m http.server --directory site
site: $(STAMP)
	$(BIN)/python docs/build_site.py

$(DEMO): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	if command -v uv >/dev/null; \
	  then uv pip install --python $(BIN)/python --editable '.[demo]' --constraint constraints.txt; \
	  else $(BIN)/python -m pip install --editable '.[demo]' --constraint constraints.txt; fi
	touch $(DEMO)

$(STAMP): $(DEMO)
	$(BIN)/python -m pip install --quiet --editable '.[all,dev]' --constraint constraints.txt
	touch $(STAMP)

$(ARCHIVE): tools/spark_archive.py | $(STAMP)
	$(BIN)/python tools/spark_archive.py $(ARCHIVE) >$(VENV)/spark.log 2>&1 || \
	  echo "no archive of Spark's classes ($(VENV)/spark.log): the tests take longer"

runtime: $(STAMP)
	$(BIN)/python tools/runtime.py

$(RUNTIME): package.json package-lock.json tools/runtime.py | $(STAMP)
	$(BIN)/python tools/runtime.py || \
	  echo "no runtime for browsers: the page won't answer on the device; make runtime tries again"

# What the images install, by version and hash; after a change of pyproject.toml or constraints.txt.
lock: $(TOOLS)
	$(TOOLS)/bin/python tools/lock.py

# Known vulnerabilities of what images and page use, and bills of materials: build/audit/
audit: $(TOOLS)
	tools/audit.sh $(TOOLS)/bin

$(TOOLS): tools/requirements.txt
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/python -m pip install --quiet --requirement tools/requirements.txt
	touch $(TOOLS)

clean:
	rm -rf $(VENV) demo build dist site src/pomona/web/assets/runtime
