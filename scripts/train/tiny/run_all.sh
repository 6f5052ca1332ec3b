#!/usr/bin/env bash
# Rebuild the embedded model and benchmark from nothing (CPU, two cores, about an hour).
#   bash scripts/train/tiny/run_all.sh [work folder] [checkpoint folder] [tasks folder]
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
repo="$(cd "$here/../../.." && pwd)"
work="${1:-/tmp/tiny}"
out="${2:-$repo/assets/tiny-llava-onevision}"
tasks="${3:-$repo/lmms-eval/lmms_eval_accelerate/tasks}"
clips=3000
sparse=1600
export PYTHONPATH="$here:$repo${PYTHONPATH:+:$PYTHONPATH}"
cd "$here"

python text.py --out "$work/tok"
python data.py --work "$work" --split train --count "$clips"
python tower.py --work "$work" --clips "$clips" --steps 1000 --seed 0
python features.py --work "$work" --train "$clips" --val 100
python features.py --work "$work" --train "$sparse" --val 100 --prefix sparse_
# Two processes with one thread each instead of two threads: on shared cores threads wait for each other at every operation.
torchrun --nproc_per_node 2 train_decoder.py --work "$work" --clips "$clips" --sparse "$sparse" --seed 0
python export.py --work "$work" --out "$out"
python build_tasks.py --tasks "$tasks"
python evaluate.py --checkpoint "$out" --tasks "$tasks" --data full --json "$work/evaluation.json"
python check_export.py --checkpoint "$out" --tasks "$tasks"
