#!/usr/bin/env bash
# Runs the tests, after making their environment. No GPU needed.
#
#   bash tests/run.sh              the core of everything (under 20 minutes on 2 cores)
#   bash tests/run.sh --all        the long grids too, and megatron-core 0.19.2 in an environment of its own
#   bash tests/run.sh -k logprobs  other words go to pytest
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
source tools/environment.sh
if [ "${1-}" = --all ]; then
    python -m pytest tests "$@"
    deactivate
    export MEGATRON_CORE=0.19.2
    source tools/environment.sh
    python -m pytest tests/distributed
else
    python -m pytest tests "$@"
fi
