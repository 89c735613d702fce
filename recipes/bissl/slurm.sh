#!/bin/bash
# A run of the recipe over all GPUs of a SLURM job, which goes on by itself after time limits and lost nodes:
#
#   sbatch --nodes=2 --ntasks-per-node=4 --gpus-per-node=4 recipes/bissl/slurm.sh --preset paper-flowers --output-dir runs/flowers
#
# Submit it from the repository's root (where the job starts again after a requeue), with the installation's environment
# active, and with what your cluster asks for (--time, well above five minutes, --partition, --account). The output folder
# must be on a file system that the first node sees after a requeue too, the data on one that all nodes see, or at one
# place on each. One task is one process: ask for as many tasks a node as GPUs. The log is slurm-JOB.out, appended to.
# To stop for good: scancel JOB. SLURM sends SIGUSR1 to all processes five minutes before the time limit: they
# save and end with 75, and the job is queued again under its number. A job that lost a node is queued again by SLURM
# itself (--requeue). Where a rank is killed (137) the others end with 76, or are aborted while they wait for their GPU
# (134), and the job is queued again here, as long as it was queued again fewer than 20 times in all.
#SBATCH --job-name=bissl
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=USR1@300
#SBATCH --cpus-per-task=8

export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
export WORLD_SIZE=$SLURM_NTASKS

# exec: signals must reach Python, not a shell around it.
srun --kill-on-bad-exit=0 bash -c 'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID exec python recipes/bissl/run.py "$@"' run.py "$@" --resume
code=$?
if [ $code -eq 75 ]; then
    scontrol requeue "$SLURM_JOB_ID"
elif [ $code -eq 76 ] || [ $code -eq 134 ] || [ $code -eq 137 ]; then
    [ "${SLURM_RESTART_COUNT:-0}" -lt 20 ] && scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
