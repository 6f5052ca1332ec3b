# What the scripts in scripts/eval/ share: environment variables become arguments of
# `python -m lmms_eval_accelerate.compare`, which runs one method on one model next to the dense model. Source it.
#
# Without PRETRAINED: the embedded tiny model and benchmark (a model of the llava package; scripts for models of
# transformers end with exit code 2).
# With PRETRAINED: that checkpoint, on all GPUs asked for.
#
#   PRETRAINED        checkpoint folder or hub name
#   TASKS             comma-separated lmms-eval tasks  (default: videomme; gqa,mme,pope for image models; the embedded tasks)
#   METHODS           what to compare: "dense fastvid@0.25 dycoke(k=0.3) random"       (default: dense and the config's method)
#                     "levels": the config's method at every level of its paper; "all", "all@0.25": every method but
#                     AKS, whose scorer has weights of its own
#   RETENTION_RATIO   share of visual tokens kept, above 0 and up to 1     (default: the config's)
#                     for the methods named without one; an error if a method has none
#   MATCH             equal budgets: "tokens=0.25", "layer_tokens=0.25" or "flops=0.25", solved for every method
#   LIMIT             documents per task                                   (default: all)
#   NUM_PROCESSES     GPUs (without any: processes) per machine   (default: all visible GPUs; embedded model: 1)
#   NUM_MACHINES, MACHINE_RANK, MAIN_PROCESS_IP, MAIN_PROCESS_PORT         several nodes, as in `accelerate launch`
#   GPUS_PER_MODEL    GPUs over which one copy of a large model is spread  (default: 1; see docs/distributed.md)
#   DATA              local data folder: everything runs offline on it     (see docs/benchmarks.md)
#   OUTPUT            folder for the results; that of an interrupted comparison goes on where it stopped
#   BATCH_SIZE, MODEL_ARGS (extra k=v,k=v), DRY_RUN=1 (print the commands only; 0: off)
#   FULL=1            embedded benchmark: the full sets instead of the quick subset
#   PYTHON, VENV      see lib/common.sh

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

# needs_checkpoint CONFIG EXAMPLE: ends the script if no checkpoint is given; nothing is set up before.
needs_checkpoint() {
    [[ -n "${PRETRAINED:-}" ]] || refuse "$1 needs a checkpoint, e.g. PRETRAINED=$2."
}

# arguments_of_environment: sets the array `arguments` from the variables above.
arguments_of_environment() {
    arguments=(--batch-size "${BATCH_SIZE:-1}")
    add() { [[ -z "$2" ]] || arguments+=("$1" "$2"); }
    add --pretrained "${PRETRAINED:-}"
    add --tasks "${TASKS:-}"
    add --methods "${METHODS:-}"
    add --retention-ratio "${RETENTION_RATIO:-}"
    add --match "${MATCH:-}"
    add --limit "${LIMIT:-}"
    add --num-processes "${NUM_PROCESSES:-}"
    add --num-machines "${NUM_MACHINES:-}"
    add --machine-rank "${MACHINE_RANK:-}"
    add --main-process-ip "${MAIN_PROCESS_IP:-}"
    add --main-process-port "${MAIN_PROCESS_PORT:-}"
    add --model-args "${MODEL_ARGS:-}"
    add --gpus-per-model "${GPUS_PER_MODEL:-}"
    add --data "${DATA:-}"
    add --output "${OUTPUT:-}"
    if is_on DRY_RUN; then arguments+=(--dry-run); fi
    if is_on FULL; then arguments+=(--full); fi
}
