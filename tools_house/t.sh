#!/bin/bash
# t.sh FILE...: test files one after another, each with a limit; results in /work/house/results.txt
cd ${TREE:-/work/house/tree}
export PATH=/work/main/.venv/bin:$PATH PYTHONPATH=$PWD/src:$PWD HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE PYTHONDONTWRITEBYTECODE=1
for f in "$@"; do
  s=$(date +%s)
  r=$(timeout ${LIMIT:-300} python -m pytest -q -x --maxfail=${MAXFAIL:-5} -p no:cacheprovider $f 2>&1 | tee /work/house/logs/$(echo $f | tr / _).log | tail -1)
  echo "$f: $r [$(( $(date +%s) - s ))s]" | tee -a /work/house/results.txt
done
