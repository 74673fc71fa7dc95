#!/usr/bin/env bash
# Builds the pages of docs/ into build/docs/html and runs every block of code in them. A warning is an error.
#
#   docs.sh --browse    also opens every page in headless Chromium, follows every link and uses the search
set -euo pipefail
cd "$(dirname "$0")/.."

python=$(tools/venv.sh docs)/bin/python
# The checkout's package precedes an installed one.
export PYTHONPATH=$PWD OMP_NUM_THREADS=1
rm -rf build/docs
"$python" -m sphinx --builder html --fail-on-warning --keep-going --quiet --jobs auto --doctree-dir build/docs/doctrees docs build/docs/html
"$python" tools/check_docs.py build/docs/html $([ "${1:-}" != --browse ] || echo --browser chromium)
.venv/bin/python -m pytest --quiet --numprocesses 0 tests/docs
echo "the pages are in build/docs/html"
