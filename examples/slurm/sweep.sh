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
# OUTCOME, CONFIG, RUN_DIR, MODEL, TRAIN, HELDOUT and OVERRIDES of this run; nothing of it is evaluated.
while IFS='=' read -r name value; do
    case $name in
        OUTCOME | CONFIG | RUN_DIR | MODEL | TRAIN | HELDOUT | OVERRIDES) printf -v "$name" %s "$value" ;;
    esac
done <<< "$described"

# The same sbatch goes on with a sweep: what has come to its end is left as it is, in a second.
case $OUTCOME in
    finished) echo "run $SLURM_ARRAY_TASK_ID has finished: $RUN_DIR" && exit 0 ;;
    diverged | failed)
        echo "run $SLURM_ARRAY_TASK_ID has $OUTCOME: $RUN_DIR; delete that directory for another try"
        exit 1
        ;;
esac

source examples/slurm/job.sh
