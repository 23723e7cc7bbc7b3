#!/usr/bin/env bash
# The paper's evaluation of a model: six benchmarks, 16 samples a problem, temperature 0.6, top-p 0.95, 8192 tokens.
#
#   bash examples/eval.sh HF_DIR|CONFIG.yaml [option or key.sub=value ...]
#
# Prepares the benchmarks in $DATA (default: data) once, from the Hugging Face hub; where there is no network, put the
# files there first (docs/evaluation.md). The same command goes on where an interrupted one stopped. On several GPUs:
#
#   PROCESSES=8 bash examples/eval.sh runs/real_7b/hf
set -euo pipefail
[ $# -gt 0 ] || { echo "usage: bash examples/eval.sh HF_DIR|CONFIG.yaml [option or key.sub=value ...]" >&2; exit 2; }
cd "$(dirname "$0")/.."
data=${DATA:-data}
benchmarks="aime24 aime25 math500 amc23 minerva olympiadbench"

missing=()
for name in $benchmarks; do [ -f "$data/$name.jsonl" ] || missing+=("$name"); done
if [ ${#missing[@]} -gt 0 ]; then python tools/prepare_data.py --out "$data" "${missing[@]}"; fi

run=(python -m megatron_real)
if [ "${PROCESSES:-1}" -gt 1 ]; then run=(python -m torch.distributed.run --nproc-per-node "$PROCESSES" -m megatron_real); fi
asked=()
for name in $benchmarks; do asked+=(--bench "$name=$data/$name.jsonl"); done
model=$1
shift
"${run[@]}" eval "$model" "${asked[@]}" --samples 16 --temperature 0.6 --top-p 0.95 --max-tokens 8192 \
    --suffix "Let's think step by step and output the final answer within \\boxed{}." "$@"
