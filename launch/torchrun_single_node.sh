#!/usr/bin/env bash
# Trains on every GPU of this machine (on one CPU process where there is none).
#
#   launch/torchrun_single_node.sh RECIPE [key=value ...]
#   NPROC=4 launch/torchrun_single_node.sh pretrain/llama-1b optimizer.lr=3e-4
#
# The same command goes on where a stopped run left off.
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

# --standalone picks a free port, so that several runs fit on one machine.
exec torchrun --standalone --nnodes 1 --nproc-per-node "$ranks" -m llmtrain train "$@"
