#!/usr/bin/env bash
# Trains on several machines: run this on each of them at about the same time, with its own NODE_RANK.
#
#   MASTER_ADDR=node0 NNODES=2 NODE_RANK=0 launch/torchrun_multi_node.sh RECIPE [key=value ...]
#   MASTER_ADDR=node0 NNODES=2 NODE_RANK=1 launch/torchrun_multi_node.sh RECIPE [key=value ...]
#
# MASTER_ADDR  name or address of the machine with NODE_RANK 0, reachable from all
# MASTER_PORT  a free port there (default 29500)
# NPROC        processes a machine (default: its GPUs, or 1)
#
# Exit codes, on every machine, are those of llmtrain train: 0 done; 2 bad recipe or input; 75 stopped by SIGTERM,
# SIGUSR1, SIGINT or SIGHUP and checkpointed, the same commands go on; 1 failed.
#
# output_dir and data.cache_dir (or LLMTRAIN_CACHE) must be on a file system that all machines share.
set -euo pipefail

if [[ $# -lt 1 ]]; then
    echo "usage: MASTER_ADDR=HOST NNODES=N NODE_RANK=I $0 RECIPE [key=value ...]" >&2
    exit 2
fi
: "${MASTER_ADDR:?set it to the name of the machine with NODE_RANK 0}"
: "${NNODES:?set it to the number of machines}"
: "${NODE_RANK:?set it to the index of this machine, from 0}"

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
torchrun \
    --nnodes "$NNODES" --node-rank "$NODE_RANK" \
    --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}" \
    --nproc-per-node "$ranks" \
    -m llmtrain train "$@" &
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
