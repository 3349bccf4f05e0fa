#!/bin/bash
# Pretraining on SLURM across time limits and preemption: every start of the job continues the run.
#   sbatch examples/slurm.sh DATA RUN [further flags of bestrq2 pretrain]
#SBATCH --job-name=bestrq2
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# USR1 goes to every process three minutes before the time limit; each finishes its step and saves.
#SBATCH --signal=USR1@180

data=$1 run=$2
shift 2

# One task per GPU. If one task fails, the others must not wait for it.
srun --kill-on-bad-exit=1 bestrq2 pretrain --data "$data" --output "$run" --resume "$@"
code=$?

# 128 + number of the signal: 138 after USR1, 143 after TERM. The state is saved; requeue the job to continue.
if [ "$code" -eq 138 ] || [ "$code" -eq 143 ]; then
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit "$code"
