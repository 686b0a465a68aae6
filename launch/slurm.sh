#!/usr/bin/env bash
# Train on several nodes under SLURM, one task for each GPU; continues by itself after pre-emption and the time limit.
#
#   sbatch --nodes 4 --time 12:00:00 launch/slurm.sh --config launch/configs/brats.yaml --data.root BraTS2023
#
# Submit from the checkout. Options of sbatch before the script's name override those below; what comes after it goes
# to launch/train.py. 120 s before the end SLURM sends SIGUSR1 to the tasks; they save and end with status 75, and the
# job is queued again under the same number, so in the same run folder, where --resume auto finds what was saved.
#SBATCH --job-name=glioforge
#SBATCH --nodes=2
#SBATCH --gres=gpu:8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=glioforge-%j.log
set -euo pipefail

readonly STOPPED=75 # EX_TEMPFAIL: saved, to be continued
python=${PYTHON:-.venv/bin/python}
run_dir=${RUN_DIR:-runs/slurm-$SLURM_JOB_ID}

hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST") # no pipe to head, which would end a long list, and so the job
MASTER_ADDR=${hosts%%$'\n'*}
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$SLURM_CPUS_PER_TASK}

# The ranks end each other and say why; srun must not kill them before that, only those still there a minute later.
status=0
srun --kill-on-bad-exit=0 --wait=60 --cpus-per-task="$SLURM_CPUS_PER_TASK" \
    "$python" launch/train.py --run_dir "$run_dir" --resume auto "$@" || status=$?

if [[ $status -eq $STOPPED ]]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
