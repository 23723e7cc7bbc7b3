#!/usr/bin/env bash
# REAL from nothing to a policy that has learned, on a machine without a GPU: two processes, real megatron-core.
#
#   bash examples/quickstart.sh [key.sub=value ...]
#
# Makes an environment and a tiny base model once, then trains. Words after the name override the configuration
# (examples/configs/quickstart.yaml); a further run starts at once.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

source tools/environment.sh

base=runs/quickstart/base
if [ ! -d "$base" ]; then
    echo "quickstart: making the base model, a tiny Qwen2 that forgets the carry (once; about two minutes)"
    python tools/make_tiny_model.py --out "$base"
fi

number=1
while [ -e "runs/quickstart/run-$number" ]; do number=$((number + 1)); done
echo "quickstart: training by REAL on 2 processes (half a minute)"
python -W ignore -m torch.distributed.run --nproc-per-node 2 \
    -m megatron_real train examples/configs/quickstart.yaml "trainer.run_dir=runs/quickstart/run-$number" "$@"
