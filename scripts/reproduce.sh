#!/usr/bin/env bash
# A paper's table with our numbers beside it: sets up the environment and runs `python -m lmms_eval_accelerate.reproduce`.
# All arguments go to it; docs/reproduce.md explains them.
#
#   bash scripts/reproduce.sh --list                                        the tables; `TABLE --list` shows its rows
#   bash scripts/reproduce.sh embedded --rows fastvid --limit 20            no GPU, no weights, no data
#   bash scripts/reproduce.sh fastvid --dry-run                             the exact commands
#   NUM_PROCESSES=8 bash scripts/reproduce.sh fastvid --data /data/bench    on 8 GPUs
#
#   NUM_PROCESSES     GPUs (without any: processes) per machine   (default: all visible GPUs; embedded model: 1)
#   NUM_MACHINES, MACHINE_RANK, MAIN_PROCESS_IP, MAIN_PROCESS_PORT         several nodes, as in `accelerate launch`
#   PYTHON, VENV      see lib/common.sh

source "$(dirname "${BASH_SOURCE[0]}")/lib/common.sh"
# variables of scripts/eval/*.sh: a table runs what it says unless the command line says otherwise
for pair in LIMIT:--limit TASKS:--columns METHODS:--rows PRETRAINED:--pretrained DATA:--data OUTPUT:--output \
    BATCH_SIZE:--batch-size MODEL_ARGS:--model-args DRY_RUN:--dry-run RETENTION_RATIO: FULL:; do
    option="${pair#*:}"
    ignored "${pair%%:*}" "scripts/reproduce.sh reads no such variable${option:+; write $option}"
done
ensure_env

arguments=()
add() { [[ -z "$2" ]] || arguments+=("$1" "$2"); }
add --nproc "${NUM_PROCESSES:-}"
add --num-machines "${NUM_MACHINES:-}"
add --machine-rank "${MACHINE_RANK:-}"
add --main-process-ip "${MAIN_PROCESS_IP:-}"
add --main-process-port "${MAIN_PROCESS_PORT:-}"
# the subcommand that makes the leaderboard knows none of these
[[ "${1:-}" != leaderboard ]] || arguments=()
# in front: behind them may stand `-- ARGS` for lmms-eval, and what is given on the command line counts
# shellcheck disable=SC2068  # bash before 4.4 takes an empty array for an unset variable
exec "$PY" -m lmms_eval_accelerate.reproduce ${arguments[@]+"${arguments[@]}"} "$@"
