# One run of a sweep, by the number of its job in the array. Sourced by examples/compare.sh; ends in job.sh.
cd "${PROJECT:-$SLURM_SUBMIT_DIR}" || exit 2
source examples/slurm/words.sh

[ -n "${SLURM_ARRAY_TASK_ID:-}" ] || {
    echo "this job is not one of an array: sbatch --array=0-17 examples/compare.sh"
    exit 2
}
words "$OVERRIDES" || {
    echo "OVERRIDES has a quote that is never closed: $OVERRIDES"
    exit 2
}
within=(--nodes=1 --ntasks=1)
[ -z "$CONTAINER" ] || within+=(--container-image="$CONTAINER" --container-mounts="$PWD" --container-workdir="$PWD")
[ -n "$CONTAINER" ] || export VENV

described=$(srun "${within[@]}" bash examples/slurm/node.sh compare "$SWEEP" \
    --describe "$SLURM_ARRAY_TASK_ID" "${words[@]}") || exit 2
# CONFIG, RUN_DIR, MODEL, TRAIN, HELDOUT and OVERRIDES of this run; nothing of it is evaluated.
while IFS='=' read -r name value; do
    case $name in CONFIG | RUN_DIR | MODEL | TRAIN | HELDOUT | OVERRIDES) printf -v "$name" %s "$value" ;; esac
done <<< "$described"

source examples/slurm/job.sh
