#!/bin/bash
# steps.sh REPO [commit]: every step of the move, linted, imported and, if asked, committed.
set -e
REPO=$1; H=/work/house
export PATH=/work/main/.venv/bin:$PATH PYTHONPATH=$REPO/src:$REPO HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE PYTHONDONTWRITEBYTECODE=1
for step in $(python3 -c "import sys; sys.path.insert(0,'$H'); import layout; print(*layout.STEPS)"); do
  python3 $H/move.py $REPO --step $step
  (cd $REPO; ruff format -q .; ruff check -q --fix . ; ruff format -q .; ruff check -q .; mypy | tail -1; python $H/importall.py $REPO)
  if [ "$2" = commit ]; then
    (cd $REPO; git add -A; git commit -q -m "$(python3 -c "import sys; sys.path.insert(0,'$H'); import messages; print(messages.MESSAGES['$step'])")")
  fi
done
