# Runs a command of megatron_real on this node; `train` after `doctor`, by torchrun, as the node's part of all ranks.
# Started by srun. All of it is functions, which are read as a whole: the file may change while a job runs.
set -uo pipefail

main() {
    [ -z "${VENV:-}" ] || source "$VENV/bin/activate"
    export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}"
    # One queue to the GPU: what is launched first runs first, so that a collective of tensor or sequence
    # parallelism begins before the product that is to hide it (megatron-core asks for it before Blackwell).
    # PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True would waste less to fragments, but vLLM's sleep mode,
    # which shares these processes by default, refuses it: set it yourself with rollout.engine=vllm-server or
    # rollout.sleep_level=0.
    export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
    [ "$1" = train ] || exec python -m megatron_real "$@"

    on_ranks doctor "${@:2}" --run-dir "$RUN_DIR" && on_ranks "$@"
}

# Every rank's output is a file, torchrun's own too; of all these, the first rank's lines are shown as well.
on_ranks() {
    local logs=$RANK_LOGS/$SLURMD_NODENAME/$1 shown=()
    mkdir -p "$logs"
    [ "$SLURM_NODEID" != 0 ] || shown=(--tee 0:3)

    # torchrun would end the ranks 30 seconds after a signal, or at once: it ignores signals, and they are passed on here.
    (
        trap '' USR1 TERM
        TORCHELASTIC_SIGNALS_TO_HANDLE=SIGINT exec torchrun --nnodes "$SLURM_NNODES" --node-rank "$SLURM_NODEID" \
            --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" --nproc-per-node "$PROCESSES" \
            --log-dir "$logs" --redirects 3 "${shown[@]}" -m megatron_real "$@" \
            > >(tee "$logs/torchrun.log" | sed -un 's/^\[default0\]://p') 2>&1
    ) &
    local torchrun=$!
    while kill -0 "$torchrun" 2>/dev/null; do
        # Each second: a rank that is still starting does not hear it.
        [ -z "$stopping" ] || cat /proc/"$torchrun"/task/*/children 2>/dev/null | xargs -r kill -USR1
        # srun sends the signal to every process of this script, sleep too.
        (trap '' USR1 TERM; exec sleep 1)
    done
    wait "$torchrun"
}

stopping=''
trap 'stopping=yes' USR1 TERM
main "$@"
exit
