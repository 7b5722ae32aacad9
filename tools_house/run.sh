#!/bin/bash
# run.sh: fresh clone of a branch (default: house's HEAD) to /work/house/tree, moved and formatted
set -e
rm -rf /work/house/tree
git clone -q ${1:-/work/main} /work/house/tree
ln -sfn /work/shared /work/house/shared
python3 /work/house/move.py /work/house/tree
/work/house/finish.sh /work/house/tree
