# Layouts for GPUs of 80 GB, by model and number of GPUs. Sourced by job.sh; docs/cluster.md says how they were chosen.

layout() {
    case $1-$2 in
        1.5b-8 | 1.5b-16 | 1.5b-32 | 1.5b-64) echo parallel.tp=1 ;;
        7b-8 | 7b-16) echo parallel.tp=4 parallel.sp=true rollout.tp=1 ;;
        7b-32 | 7b-64) echo parallel.tp=2 parallel.sp=true rollout.tp=1 ;;
        *)
            echo "there is no layout for $1 on $2 GPUs in examples/slurm/layouts.sh; give LAYOUT='parallel.tp=...'" >&2
            return 2
            ;;
    esac
}
