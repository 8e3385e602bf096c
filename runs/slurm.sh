#!/usr/bin/env bash
#SBATCH --job-name=nanochat
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
# A stage on the nodes of a Slurm job: one torchrun a node, which starts a rank a GPU (runs/multinode.sh).
#
#   export NANOCHAT_BASE_DIR=/shared/nanochat
#   sbatch runs/slurm.sh scripts.base_train --depth=26 --save_every=1000 --resume=auto
#
# Submit it from the repository, on a file system that all nodes see, with an environment that is set up (`uv sync`);
# options for sbatch go before the script, e.g. --nodes=4. With --resume=auto a job that is requeued goes on from its
# last checkpoint.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?run this with sbatch}"
[ -e .venv/bin/activate ] && . .venv/bin/activate

export NODES=$SLURM_JOB_NUM_NODES RUN_ID=$SLURM_JOB_ID
# each job its own port: nodes may be shared, and a job before may not have left yet
HOSTS=$(scontrol show hostnames "$SLURM_JOB_NODELIST") # not into `head`: scontrol could die of the closed pipe
export HEAD=${HOSTS%%$'\n'*}:$((20000 + SLURM_JOB_ID % 20000))
# a task of its own would get the cores of one task only: all of a node's belong to its ranks
exec srun --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_ON_NODE%%(*}" bash runs/multinode.sh "$@"
