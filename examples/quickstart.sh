#!/usr/bin/env bash
# REAL from nothing to a policy that has learned, on a machine without a GPU: two processes, real megatron-core.
#
#   bash examples/quickstart.sh [key.sub=value ...]
#
# Makes an environment and a tiny base model once, then trains. Words after the name override the configuration
# (examples/configs/quickstart.yaml). A run that was interrupted goes on; after a finished one a new one is begun.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

source tools/environment.sh

base=runs/quickstart/base
if [ ! -d "$base" ]; then
    echo "quickstart: making the base model, a tiny Qwen2 that forgets the carry (once; about ten seconds)"
    python -W ignore tools/make_tiny_model.py --out "$base"
fi

# The newest run, unless it has finished.
number=1
while [ -e "runs/quickstart/run-$((number + 1))" ]; do number=$((number + 1)); done
run=runs/quickstart/run-$number
if grep -qs '"state": "finished"' "$run/status.json"; then run=runs/quickstart/run-$((number + 1)); fi

echo "quickstart: training by REAL on 2 processes, into $run (about a minute)"
megatron-real train examples/configs/quickstart.yaml --nproc 2 "trainer.run_dir=$run" "$@"
if [ -d "$run/hf" ]; then python -W ignore tools/answers.py "$base" "$run/hf"; fi
