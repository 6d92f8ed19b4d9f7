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

exec torchrun \
    --nnodes "$NNODES" --node-rank "$NODE_RANK" \
    --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}" \
    --nproc-per-node "$ranks" \
    -m llmtrain train "$@"
