#!/bin/bash
# finish.sh REPO: format, sort imports, drop what is unused.
set -e
cd "$1"
export PATH=/work/main/.venv/bin:$PATH
ruff format -q . || true
ruff check -q --fix . || true
ruff format -q .
ruff check . --statistics || true
