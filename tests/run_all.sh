#!/usr/bin/env bash
# Everything that must hold, cheapest first. `make test` calls it inside the project's environment.
set -euo pipefail
cd "$(dirname "$0")/.."
jobs=${JOBS:-2}
export OMP_NUM_THREADS=1 REFSEG_DATA="${REFSEG_DATA:-$(mktemp -d)}" JUPYTER_PLATFORM_DIRS=1 MPLBACKEND=agg
step() { printf '\n== %s (%s s so far)\n' "$1" "$SECONDS"; }

step "lint"
ruff check .
ruff format --check -q nbs tests site setup.py

step "the order of the rooms"
lint-imports --no-logo

step "the package is what the notebooks export, and the notebooks are clean"
fingerprint() { find refseg_nb nbs -name '*.py' -o -name '*.ipynb' | sort | xargs sha256sum | sha256sum; }
before=$(fingerprint)
nbdev_export
nbdev_clean
if [ "$before" != "$(fingerprint)" ]; then
  echo "Notebooks and package disagreed (or a notebook was not clean). Both are now exported and cleaned: look at the difference and commit it."
  git --no-pager diff --stat -- refseg_nb nbs || true
  exit 1
fi

step "the tiny data set"
python -c 'from refseg_nb.refshapes.dataset import tiny_data; tiny_data("refshapes"); tiny_data("refshapes+")'

step "every notebook runs"
nbdev_test --n_workers "$jobs" --do_print --timing

step "tests"
python -m pytest -n "$jobs" --dist worksteal --durations=15
