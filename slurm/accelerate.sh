#!/bin/bash
# accelerate launch on one of the nodes of a job. srun starts it on each: srun slurm/accelerate.sh --num_processes …
# -m MODULE …, which is what 05_rest_em_round does (seal_nb/sft/train.py). They meet on the job's first node.

case $SLURM_JOB_ID in '' | *[!0-9]*) exit 2 ;; esac # arithmetic would run a command that stands in it
exec python -m accelerate.commands.launch \
    --num_machines="$SLURM_NNODES" \
    --machine_rank="$SLURM_NODEID" \
    --main_process_ip="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | grep -xE '[A-Za-z0-9._-]+' |
        tail -n "$SLURM_NNODES" | head -n 1)" \
    --main_process_port="$((20000 + SLURM_JOB_ID % 20000))" \
    "$@"
