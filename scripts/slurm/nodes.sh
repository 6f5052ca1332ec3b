# shellcheck shell=bash
# Inside a Slurm job: what the project's scripts want to know of the nodes, and one task per node. Sourced by *.sbatch.
#
# Sets and exports NUM_MACHINES, NUM_PROCESSES (model copies per node), MAIN_PROCESS_IP and MAIN_PROCESS_PORT;
# MACHINE_RANK is each task's own. Whatever of NUM_PROCESSES, MAIN_PROCESS_IP, MAIN_PROCESS_PORT is set already stays.
#
#   GPUS_PER_MODEL    GPUs that one copy of the model takes (default 1): a node runs SLURM_GPUS_ON_NODE / GPUS_PER_MODEL

# shellcheck source=scripts/lib/common.sh
source "$ROOT/scripts/lib/common.sh"

# describe_nodes: the variables above from those of Slurm.
describe_nodes() {
    [[ -n "${SLURM_JOB_ID:-}" ]] || die "not inside a Slurm job; submit with: sbatch scripts/slurm/${0##*/}"
    local gpus="${SLURM_GPUS_ON_NODE:-0}" each="${GPUS_PER_MODEL:-1}"
    [[ "$gpus" =~ ^[0-9]+$ ]] || die "SLURM_GPUS_ON_NODE=$gpus is no number; set NUM_PROCESSES yourself"
    [[ "$each" =~ ^[1-9][0-9]*$ ]] || refuse "GPUS_PER_MODEL=$each is not a whole number above 0"
    if [[ -z "${NUM_PROCESSES:-}" ]] && ((gpus > 0)); then
        ((gpus % each == 0)) || die "GPUS_PER_MODEL=$each does not divide the $gpus GPUs of a node"
        NUM_PROCESSES=$((gpus / each))
    fi
    NUM_MACHINES="${SLURM_JOB_NUM_NODES:-${SLURM_NNODES:-1}}"
    if [[ -z "${MAIN_PROCESS_IP:-}" ]] && ((NUM_MACHINES > 1)); then
        local names # no pipe into head: what it does not read would end scontrol, and us, with SIGPIPE
        names="$(scontrol show hostnames "$SLURM_JOB_NODELIST")" || names=""
        MAIN_PROCESS_IP="${names%%$'\n'*}"
        [[ -n "$MAIN_PROCESS_IP" ]] || die "scontrol names no node of SLURM_JOB_NODELIST=$SLURM_JOB_NODELIST"
    fi
    # jobs that share a node must not share a port
    MAIN_PROCESS_PORT="${MAIN_PROCESS_PORT:-$((20000 + SLURM_JOB_ID % 20000))}"
    export NUM_MACHINES MAIN_PROCESS_PORT
    [[ -z "${NUM_PROCESSES:-}" ]] || export NUM_PROCESSES
    [[ -z "${MAIN_PROCESS_IP:-}" ]] || export MAIN_PROCESS_IP
}

# on_every_node SCRIPT ARGUMENTS...: the script once per node. One node that fails ends the job with its exit code.
on_every_node() {
    describe_nodes
    ensure_env # here, once: the nodes share the folder and would all make the environment at the same time
    say "$NUM_MACHINES node(s) x ${NUM_PROCESSES:-1} process(es), rank 0 on ${MAIN_PROCESS_IP:-this node}"
    local tasks=(--nodes="$NUM_MACHINES" --ntasks="$NUM_MACHINES" --ntasks-per-node=1 --kill-on-bad-exit=1)
    [[ -z "${SLURM_CPUS_PER_TASK:-}" ]] || tasks+=(--cpus-per-task="$SLURM_CPUS_PER_TASK") # srun does not inherit it
    cd "$ROOT"
    # shellcheck disable=SC2016  # expanded on the node: each task has its own SLURM_NODEID
    srun "${tasks[@]}" bash -c 'MACHINE_RANK="$SLURM_NODEID" exec bash "$@"' node "$@"
}
