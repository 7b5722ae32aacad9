#!/usr/bin/env bash
# The whole experiment on the bundled model: profile on val, prune, boost, evaluate on test.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
model=checkpoints/quickstart
quiz=$model/quiz
out=results/quickstart
rm -rf "$out" # of an earlier quickstart; nothing else is written there

step() {
    printf '\n$ %s\n' "$*"
    "$@"
}

# One thread: for so small a model more of them bring little.
step expertcut profile "$model" --quiz "$quiz" --split val --threads 1 --out "$out/profile"
step expertcut show "$out/profile"
step expertcut prune --profile "$out/profile" --keep-active --out "$out/pruned"

# The best expert of the last layer, among those that some questions activate and some do not.
best=$(expertcut show "$out/profile" --format json | python3 -c '
import json, sys
layer = json.load(sys.stdin)["layers"][-1]
some = [e for e in layer["expert"] if 0.01 <= e["appearances"] <= 0.95]
best = max(some, key=lambda e: e["weighted_accuracy"])
print(layer["layer"], best["expert"], sep=":")')
step expertcut reweight --profile "$out/profile" --boost "$best" --out "$out/reweighted" ||
    # It is admitted on average already, so the default strength, its admission gap, is none.
    step expertcut reweight --profile "$out/profile" --boost "$best=0.5" --out "$out/reweighted"

step expertcut eval "$model" "$out/pruned" "$out/reweighted" --quiz "$quiz" --split test \
    --threads 1 --out "$out/results.json"
