#!/usr/bin/env bash
# Runs tests/integrations and the code of docs/trainers.md, with pytest's options as arguments, in a virtual environment that has the clients' libraries.
set -euo pipefail
cd "$(dirname "$0")/.."

python=$(tools/venv.sh integrations --no-deps)/bin/python
# The checkout's package precedes an installed one.
export PYTHONPATH=$PWD OMP_NUM_THREADS=1
"$python" -m pytest tests/integrations "tests/docs/test_pages.py::test_blocks_run[docs/trainers.md]" --dist loadfile "$@"
