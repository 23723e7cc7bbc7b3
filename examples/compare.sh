#!/usr/bin/env bash
# Trains the runs of a sweep as an array of jobs, a run each, on nodes of 8 GPUs with 80 GB (docs/compare.md).
#
#   sbatch --array=0-17 examples/compare.sh     from the checkout; again, to go on where jobs have stopped
#
# `megatron-real compare SWEEP --list` numbers the runs; `megatron-real compare SWEEP --table` shows how far they are.
# Edit the two blocks, or leave the file as it is: --nodes and so on work on sbatch's command line, and the second block's
# values in the environment.

#SBATCH --job-name=compare
#SBATCH --account=my_account
#SBATCH --partition=batch
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --output=%x-%A_%a.log
#SBATCH --exclusive --mem=0 --requeue --open-mode=append --signal=B:USR1@300

SWEEP=${SWEEP:-examples/configs/compare/paper_1.5b.yaml}
MEGATRON=${MEGATRON:-}            # the model as a Megatron checkpoint; empty: the base's model.weights, or the HF weights
OVERRIDES=${OVERRIDES:-}          # settings of all runs: key.sub=value 'data.suffix=with spaces' ...
CONTAINER=${CONTAINER:-}          # image for pyxis, such as /images/megatron_real.sqsh; empty: the virtual environment
VENV=${VENV:-.venv}

source "${PROJECT:-$SLURM_SUBMIT_DIR}/examples/slurm/sweep.sh"
