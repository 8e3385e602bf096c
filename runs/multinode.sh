#!/usr/bin/env bash
# One stage on many nodes: run the same line on each of them.
#
#   NODES=2 HEAD=node0:29500 bash runs/multinode.sh scripts.base_train --depth=26 --save_every=1000 --resume=auto
#
# HEAD is a name of one of the nodes, by which all others reach it, and a free port there. RANKS is the number of ranks
# a node, by default its GPUs, on a node without any 1 (gloo, on the CPU). RUN_ID tells runs with the same HEAD apart.
#
# NANOCHAT_BASE_DIR must be a folder that all nodes see: any of them may be given rank 0, which writes checkpoints and
# the report, and all of them read tokenizer, text and checkpoints. Prepare it once, on one node:
#   python -m nanochat.dataset -n 240 && python -m scripts.tok_train
#
# A collective waits an hour for the slowest rank, since a cold torch.compile takes minutes; NANOCHAT_TIMEOUT_MINUTES
# changes that. The nodes wait JOIN_SECONDS for each other to begin. Training divides the batch over all ranks, so the
# result is that of one node.
#
# SIGTERM, SIGINT, SIGHUP or SIGUSR1 to this process on any one node: all ranks of all nodes save at the next step, and
# this ends with exit code 75 on each node. A rank that dies takes the others of its node along within 30 s.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. runs/setup.sh

[[ ${NODES:-} =~ ^[1-9][0-9]*$ ]] || refuse "NODES=${NODES:-} must be the number of nodes; try NODES=2"
[[ ${HEAD:-} =~ ^[^:]+:[0-9]+$ ]] ||
    refuse "HEAD=${HEAD:-} must be HOST:PORT of one of the nodes; try HEAD=$(hostname):29500"
[ $# -gt 0 ] || refuse "no stage; try: bash runs/multinode.sh scripts.base_train --depth=26"
[ -n "${VIRTUAL_ENV:-}" ] || setup # an environment that is active is taken as it is

if [ -z "${RANKS:-}" ]; then
    RANKS=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ' || true)
    [ "$RANKS" -gt 0 ] || RANKS=1
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # the ranks of a node share its cores
module=$1
shift
exec python runs/launch.py --nnodes="$NODES" --nproc_per_node="$RANKS" --max_restarts=0 \
    --rdzv_backend=c10d --rdzv_endpoint="$HEAD" --rdzv_id="${RUN_ID:-nanochat}" \
    --rdzv_conf="join_timeout=${JOIN_SECONDS:-1800},read_timeout=300" \
    -m "$module" -- "$@"
