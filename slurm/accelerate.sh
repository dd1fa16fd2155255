#!/bin/bash
# accelerate launch on one of the nodes of a job; srun starts it on each: srun slurm/accelerate.sh -m MODULE …
# The first node of the job is where the processes meet; without GPUs each node has one process. How GPUs share
# the model: SEAL_SHARDING, fsdp or deepspeed (ZeRO-3; pip install -e '.[deepspeed]'), as slurm/site.sh sets it.

n_here=$(tr , '\n' <<<"${CUDA_VISIBLE_DEVICES:-}" | grep -c .)
config=${SEAL_SHARDING:-fsdp}
if [ "$(python -c 'import torch; print(torch.cuda.is_available())')" != True ]; then config=cpu n_here=1; fi
exec accelerate launch \
    --config_file "slurm/accelerate_$config.yaml" \
    --num_machines "$SLURM_NNODES" \
    --num_processes "$((SLURM_NNODES * n_here))" \
    --machine_rank "$SLURM_NODEID" \
    --main_process_ip "$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)" \
    --main_process_port "$((20000 + SLURM_JOB_ID % 20000))" \
    "$@"
