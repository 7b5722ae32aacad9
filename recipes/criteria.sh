#!/usr/bin/env bash
# A sweep of all criteria at 75, 50 and 25 % of the experts of the bundled model, and an audit.
# Copies the figures of docs/criteria.md to docs/figures.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
model=checkpoints/quickstart
out=results/criteria # resumes an earlier run

step() {
    printf '\n$ %s\n' "$*"
    "$@"
}

# More threads do not help for so small a model.
step expertcut profile "$model" --quiz "$model/quiz" --split val --threads 1 --out "$out/profile"
step expertcut sweep 0.75,0.5,0.25 --by all --profile "$out/profile" --out "$out/sweep"
step expertcut audit --profile "$out/profile" --sample 64 --out "$out/audit"

mkdir -p docs/figures
cp "$out/sweep/sweep.png" docs/figures/criteria-sweep.png
cp "$out/audit/audit.png" docs/figures/criteria-audit.png
step expertcut show "$out/sweep" --format md
step expertcut show "$out/audit" --format md
