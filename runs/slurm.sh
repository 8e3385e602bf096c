#!/usr/bin/env bash
#SBATCH --job-name=nanochat
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=USR1@300
# A stage on the nodes of a Slurm job: one torchrun a node, which starts a rank a GPU (runs/multinode.sh).
#
#   export NANOCHAT_BASE_DIR=/shared/nanochat
#   sbatch runs/slurm.sh scripts.base_train --depth=26 --save_every=1000 --resume=auto
#
# Submit it from the repository, on a file system that all nodes see, with an environment that is set up (`uv sync`);
# options for sbatch go before the script, e.g. --nodes=4. With --resume=auto a job that is requeued goes on from its
# last checkpoint.
#
# Five minutes before its time is up Slurm sends SIGUSR1 to all nodes: the run saves and ends with exit code 75. With
# REQUEUE=yes the job then puts itself back into the queue (`scontrol requeue`; the cluster must allow it), until the
# run is through. A preempted or cancelled job gets SIGTERM and KillWait seconds (often 30) to save.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?run this with sbatch}"
[ -e .venv/bin/activate ] && . .venv/bin/activate

export NODES=$SLURM_JOB_NUM_NODES RUN_ID=$SLURM_JOB_ID
# each job its own port: nodes may be shared, and a job before may not have left yet
HOSTS=$(scontrol show hostnames "$SLURM_JOB_NODELIST") # not into `head`: scontrol could die of the closed pipe
export HEAD=${HOSTS%%$'\n'*}:$((20000 + SLURM_JOB_ID % 20000))
# a task of its own would get the cores of one task only: all of a node's belong to its ranks
code=0
# no kill on a bad exit: a node would be killed for ending with 75 a moment later than the first
srun --kill-on-bad-exit=0 --wait=25 --cpus-per-task="${SLURM_CPUS_ON_NODE%%(*}" bash runs/multinode.sh "$@" || code=$?
if [ "$code" = 75 ] && [ "${REQUEUE:-}" = yes ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$code"
