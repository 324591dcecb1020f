# Two commands do everything, set-up included:
#   make reproduce   the main job: draws RefShapes, trains the core ablation of the paper's Table 2, prints it beside the paper
#   make test        export check, all notebooks, pytest, browser tests, lint
# One more makes the course readable in any browser, with the network off:
#   make site        the chapters as static pages in build/site
# A virtual environment of your own is used with  make VENV=/path/to/env ...

VENV   ?= .venv
PYTHON ?= python3
EXTRAS ?= dev
BIN    := $(VENV)/bin
READY  := $(VENV)/.refseg-installed
PAGES  := $(VENV)/.refseg-site
JOBS   ?= 2
NB     ?= nbs/*.ipynb

.PHONY: reproduce test lab site growth bench export readme run lint clean

# Install the package with the extras that are named: by uv, which is brought where it is missing (pip's resolver
# takes minutes over the notebooks' packages), and by pip where uv cannot
packages = -c constraints.txt -e '.[$(1)]'
install = [ -x $(BIN)/python ] || if command -v uv >/dev/null; then uv venv -q --python $(PYTHON) $(VENV); else $(PYTHON) -m venv $(VENV); fi; \
  uv=$$(command -v uv) || { $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt uv && uv=$(BIN)/uv; }; \
  { [ -n "$$uv" ] && "$$uv" pip install -q --compile-bytecode --python $(BIN)/python $(packages); } \
  || $(BIN)/python -m pip install -q --disable-pip-version-check $(packages)

$(READY): settings.ini setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "refseg_nb needs Python 3.11 or newer; name one with  make PYTHON=python3.12 ..."; exit 1; }
	@$(call install,$(EXTRAS))
	@touch $(READY)

reproduce: $(READY)
	$(BIN)/refseg reproduce --budget quick

test: $(READY)
	@PATH="$(abspath $(BIN)):$$PATH" JOBS=$(JOBS) bash tests/run_all.sh

lab: $(READY)
	$(BIN)/jupyter lab nbs/00_tour.ipynb

# The course as static pages; nothing is run, the committed outputs are shown
$(PAGES): $(READY)
	@$(call install,site)
	@touch $(PAGES)

site: $(PAGES)
	$(BIN)/python site/build.py

# Time and memory as the work grows (chapter 21d); what results/scaling/growth.json holds is not measured again
growth: $(READY)
	$(BIN)/python -m refseg_nb.bench.growth

# SHNet as published against SHNet as computed here (chapter 21); a record in results/bench is not measured again
bench: $(READY)
	$(BIN)/python -m refseg_nb.bench.savings
	$(BIN)/python -m refseg_nb.bench.imports

# From the notebooks to the package, and to the README
export: $(READY)
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean

readme: $(READY)
	$(BIN)/python -m refseg_nb.course readme

# Run chapters and keep their outputs:  make run NB=nbs/05_pictures.ipynb
run: $(READY)
	$(BIN)/python -m refseg_nb.course stubs $(NB)
	$(BIN)/nbdev_export
	$(BIN)/jupyter execute --inplace $(NB)
	$(BIN)/nbdev_clean

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check -q nbs tests site setup.py
	$(BIN)/lint-imports --no-logo

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
