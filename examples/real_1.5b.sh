#!/usr/bin/env bash
# Trains DeepSeek-R1-Distill-Qwen-1.5B by REAL with the paper's recipe, on nodes of 8 GPUs with 80 GB.
#
#   sbatch examples/real_1.5b.sh        from the checkout; again, to go on where the last job has stopped
#
# Edit the two blocks, or leave the file as it is: --nodes and so on work on sbatch's command line, and the second block's
# values in the environment. docs/cluster.md begins at an empty account.

#SBATCH --job-name=real_1.5b
#SBATCH --account=my_account
#SBATCH --partition=batch
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
#SBATCH --exclusive --mem=0 --requeue --open-mode=append --signal=B:USR1@300

MODEL=${MODEL:-models/DeepSeek-R1-Distill-Qwen-1.5B} # HF weights
MEGATRON=${MEGATRON:-$MODEL-megatron}              # the same as a Megatron checkpoint, made from them if it is missing
TRAIN=${TRAIN:-data/deepscaler.jsonl}
HELDOUT=${HELDOUT:-data/aime24.jsonl}
RUN_DIR=${RUN_DIR:-runs/real_1.5b}  # on a file system that all nodes share
CONFIG=${CONFIG:-examples/configs/real_1.5b.yaml}
OVERRIDES=${OVERRIDES:-}          # further settings: key.sub=value 'data.suffix=with spaces' ...
CONTAINER=${CONTAINER:-}          # image for pyxis, such as /images/megatron_real.sqsh; empty: the virtual environment
VENV=${VENV:-.venv}

source "${PROJECT:-$SLURM_SUBMIT_DIR}/examples/slurm/job.sh"
