#!/usr/bin/env bash
# Trains on every GPU of this machine (on one CPU process where there is none).
#
#   launch/torchrun_single_node.sh RECIPE [key=value ...]
#   NPROC=4 launch/torchrun_single_node.sh pretrain/llama-1b optimizer.lr=3e-4
#
# The same command goes on where a stopped run left off. Exit codes are those of llmtrain train: 0 done; 2 bad
# recipe or input; 75 stopped by SIGTERM, SIGUSR1, SIGINT or SIGHUP and checkpointed; 1 failed.
set -euo pipefail

if [[ $# -lt 1 ]]; then
    echo "usage: [NPROC=N] $0 RECIPE [key=value ...]" >&2
    exit 2
fi

gpus=0
if command -v nvidia-smi >/dev/null; then
    gpus=$(nvidia-smi --list-gpus | wc -l)
fi
ranks=${NPROC:-$((gpus > 0 ? gpus : 1))}

# torchrun would set one OpenMP thread a rank: right for GPUs, slow for CPU training.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(( $(nproc) / ranks > 0 ? $(nproc) / ranks : 1 ))}

# torchrun exits with 1 whatever its workers' codes were; the run's own is in its verdict. So torchrun is no
# exec: what asks to stop is passed on to it as SIGTERM, which its workers get and checkpoint.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600} # seconds until SIGKILL; 30 is short
export PET_SIGNALS_TO_HANDLE=${PET_SIGNALS_TO_HANDLE:-SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1} # Slurm may send to all
started=$(date +%s) asked="" torchrun=""
ask_to_stop() {
    local before=$asked
    asked=$1
    # SIGTERM after SIGUSR1 is the time limit that SIGUSR1 announced: not a second request, which would abort.
    if [[ -n $torchrun && $before$asked != USR1TERM ]]; then
        kill -TERM "$torchrun" 2>/dev/null || true
    fi
}
for signal in TERM USR1 INT HUP; do
    trap "ask_to_stop $signal" "$signal"
done

set -m # in a group of its own: a Ctrl-C reaches it through the trap, once
# --standalone picks a free port, so that several runs fit on one machine.
torchrun --standalone --nnodes 1 --nproc-per-node "$ranks" -m llmtrain train "$@" &
torchrun=$!
set +m
while kill -0 "$torchrun" 2>/dev/null; do
    wait "$torchrun" || true # a signal ends the wait, too
done
code=0
wait "$torchrun" || code=$?
if ((code != 0)); then
    verdict=0
    python -m llmtrain verdict --since "$started" --wait 5 ${asked:+--stopped} "$@" >&2 || verdict=$?
    code=$((verdict != 0 ? verdict : code))
fi
exit "$code"
