# One Slurm job of a run that may take many. Sourced by examples/real_*.sh, on the first node, outside of the container.
#
#   convert the weights once -> node.sh on every node: check, train -> what became of the run? -> requeue, or end
#
# The job is requeued when the run stopped early (USR1 before the time limit, scancel --signal=USR1, preemption,
# trainer.max_hours) and after a fault; not when it finished or failed by itself, nor when the user cancelled the job.
set -uo pipefail
cd "${PROJECT:-$SLURM_SUBMIT_DIR}" || exit 2
source examples/slurm/words.sh

max_faults=3 # so many in a row without a new checkpoint end the chain
life=$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}
for name in MODEL MEGATRON TRAIN HELDOUT RUN_DIR CONFIG VENV; do
    [ -z "${!name}" ] || printf -v "$name" %s "$(realpath -m -- "${!name}")" # a container has the same paths
done
words "$OVERRIDES" || {
    echo "OVERRIDES has a quote that is never closed: $OVERRIDES"
    exit 2
}
mkdir -p "$RUN_DIR/logs"

RANK_LOGS=$RUN_DIR/logs/ranks/$life
PROCESSES=${SLURM_GPUS_PER_NODE:-$SLURM_GPUS_ON_NODE} # "8", or "h100:8"
PROCESSES=${PROCESSES##*:}
export RANK_LOGS RUN_DIR PROCESSES

on_nodes=(--ntasks-per-node=1 --cpus-per-task="$SLURM_CPUS_ON_NODE")
if [ -n "$CONTAINER" ]; then
    mounts=$PWD,$RUN_DIR,$MODEL
    for file in "$MEGATRON" "$TRAIN" "$HELDOUT"; do
        [ -z "$file" ] || mounts+=,$(dirname -- "$file")
    done
    on_nodes+=(--container-image="$CONTAINER" --container-mounts="$mounts" --container-workdir="$PWD")
else
    export VENV
fi

say() { echo "[$(date '+%F %T') job $life] $*"; }

# "running", "stopped" and so on, if this life of the job has said so.
state() { sed -n "s/^{\"state\": \"\([a-z]*\)\".*\"life\": \"$life\".*/\1/p" "$RUN_DIR/status.json" 2>/dev/null; }

# What the ranks say of a rank that ended first. A run that is killed while it starts has no status of this life yet.
faults() {
    grep -rhoE --include='stderr.log' '(rank [0-9]+ on |the run hangs:|.* now belongs to ).*' "$RANK_LOGS"
    grep -rhoE --include='torchrun.log' 'Signal [0-9]+ \(SIG(KILL|SEGV|BUS|ABRT)\).*' "$RANK_LOGS"
    # The ranks never met: a port was taken, or a node did not answer. That may go well the next time.
    grep -rhoE --include='torchrun.log' '^torch\.distributed\.Dist[A-Za-z]*Error: .*' "$RANK_LOGS"
}

# What torchrun says of itself; that a rank failed, which the rank has explained, is left out.
torchrun_errors() {
    grep -rhE --include='torchrun.log' '^[A-Za-z_.]+(Error|Exception)\b' "$RANK_LOGS" | grep -v ChildFailedError
}

# Seconds until Slurm ends this job for its time limit; a large number where it has none.
seconds_left() {
    local end
    end=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/.*EndTime=\([^ ]*\).*/\1/p')
    end=$(date -d "$end" +%s 2>/dev/null) || end=9999999999
    echo $((end - $(date +%s)))
}

# Slurm has not taken the job away meanwhile, and perhaps started it anew.
ours() { [[ $(scontrol show job "$SLURM_JOB_ID") == *"JobState=RUNNING "*"Restarts=${SLURM_RESTART_COUNT:-0} "* ]]; }

again() {
    if [ -n "$ended" ]; then
        say "$1; Slurm ends this job: if it was cancelled, the same sbatch goes on from there"
    elif ! ours; then
        say "$1; Slurm has taken the job away, and starts it again if it will"
    elif say "$1; requeueing" && scontrol requeue "$SLURM_JOB_ID"; then
        sleep 60 # Slurm ends this script
    else
        say "this cluster does not requeue: the same sbatch goes on from there"
    fi
    exit 75
}

requested='' ended='' worked='' left=''
trap 'requested=yes' USR1
trap 'requested=yes ended=yes' TERM

if [ -n "$MEGATRON" ] && [ ! -e "$MEGATRON" ]; then
    say "converting $MODEL to $MEGATRON (once)"
    srun --nodes=1 "${on_nodes[@]}" bash examples/slurm/node.sh convert to-megatron "$MODEL" "$MEGATRON" || exit 1
fi

# Chosen right before it is used. A port that answers is another job's, on this node: the next one then.
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_ADDR=$(scontrol show node "$first" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
while (: > "/dev/tcp/$MASTER_ADDR/$MASTER_PORT") 2>/dev/null; do MASTER_PORT=$((MASTER_PORT + 1)); done
export MASTER_ADDR MASTER_PORT

say "$SLURM_NNODES nodes ($SLURM_JOB_NODELIST) x $PROCESSES processes; logs of all ranks: $RANK_LOGS"
# A rank that ends takes the others down itself; --wait ends what is left all the same.
srun --wait=120 "${on_nodes[@]}" bash examples/slurm/node.sh train "$CONFIG" "trainer.run_dir=$RUN_DIR" \
    "model.path=$MODEL" "model.weights=$MEGATRON" "data.train=$TRAIN" "data.heldout=$HELDOUT" "${words[@]}" &
step=$!
while kill -0 "$step" 2>/dev/null; do
    if [ -n "$requested" ]; then
        say "Slurm asks for the end: the ranks save and stop"
        worked=$SECONDS
        left=$(seconds_left)
        kill -USR1 "$step" # srun passes it on
        requested=''
    fi
    sleep 1
done
if wait "$step"; then
    say "the run has finished"
    exit
fi

a_fault() {
    faults | sort | uniq -c | sort -rn | head -n 3
    echo "after $(cat "$RUN_DIR/checkpoints/latest" 2>/dev/null || echo the start)" >> "$RUN_DIR/logs/faults"
    if [ "$(tail -n $max_faults "$RUN_DIR/logs/faults" | uniq -c | awk '{print $1; exit}')" -ge $max_faults ]; then
        rm "$RUN_DIR/logs/faults"
        say "the $max_faults last faults came without a new checkpoint between them: not requeued; see $RANK_LOGS"
        exit 1
    fi
    again "a fault ended the run"
}

case $(state) in
    stopped)
        # A life that has less time than its warning makes one seam, and so would the next one, for ever.
        if [ -n "$worked" ] && [ -z "$ended" ] && [ "$worked" -lt "$left" ] && [ "$left" -lt 1800 ]; then
            say "Slurm asked for the end $worked s after the start and $left s before the time limit: not requeued," \
                "because each job would come to its next seam and end; take a longer --time, or a shorter warning" \
                "(--signal=B:USR1@SECONDS)"
            exit 1
        fi
        again "the run has stopped early, everything is saved"
        ;;
    finished) say "the run has finished; a process ended badly after that, see $RANK_LOGS" && exit 0 ;;
    running | crashed) a_fault ;;
    failed) say "the run has failed: $(cat "$RUN_DIR/status.json")" && exit 1 ;;
    *)
        [ -z "$(faults)" ] || a_fault
        torchrun_errors | sort -u | head -n 3
        say "the run did not start; the reason is above, or in $RANK_LOGS" && exit 1
        ;;
esac
