# Runs a command of megatron_real on this node: `train` by torchrun, with the node's part of all ranks. srun starts it.
set -uo pipefail

main() { # a function is read as a whole: the file may change while it runs
    [ -z "${VENV:-}" ] || source "$VENV/bin/activate"
    export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}"
    [ "$1" = train ] || exec python -m megatron_real "$@"

    # Every rank's output is a file, torchrun's own too; of all these, the first rank's lines are shown as well.
    local logs=$RANK_LOGS/$SLURMD_NODENAME shown=()
    mkdir -p "$logs"
    [ "$SLURM_NODEID" != 0 ] || shown=(--tee 0:3)

    # torchrun would end the ranks 30 seconds after a signal, or at once: it ignores signals, and they are passed on here.
    (
        trap '' USR1 TERM
        TORCHELASTIC_SIGNALS_TO_HANDLE=SIGINT exec torchrun --nnodes "$SLURM_NNODES" --node-rank "$SLURM_NODEID" \
            --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" --nproc-per-node "$SLURM_GPUS_ON_NODE" \
            --log-dir "$logs" --redirects 3 "${shown[@]}" -m megatron_real "$@" \
            > >(tee "$logs/torchrun.log" | sed -un 's/^\[default0\]://p') 2>&1
    ) &
    local torchrun=$! stopping=''
    trap 'stopping=yes' USR1 TERM
    while kill -0 "$torchrun" 2>/dev/null; do
        # Each second: a rank that is still starting does not hear it.
        [ -z "$stopping" ] || cat /proc/"$torchrun"/task/*/children 2>/dev/null | xargs -r kill -USR1
        sleep 1
    done
    wait "$torchrun"
}

main "$@"
exit
