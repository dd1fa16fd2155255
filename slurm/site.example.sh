# What is particular to your cluster. Copy to slurm/site.sh (git ignores it) and edit; nothing else here names a site.
# Jobs read it, and `seal-nb submit` does. Before a plain sbatch: . slurm/site.sh

# Read by sbatch itself, stronger than what a script asks for. More names: man sbatch, INPUT ENVIRONMENT VARIABLES.
# export SBATCH_PARTITION=gpu
# export SBATCH_ACCOUNT=my-project
# export SBATCH_QOS=normal
# export SBATCH_TIMELIMIT=08:00:00

# GPUs on each node of a job that holds a model: 2, or a100:2. With 0 such jobs compute on CPUs.
# `seal-nb submit` passes it on; a plain sbatch takes the one GPU of the script, or --gpus-per-node=…
export SEAL_GPUS=1

# A job that its time limit ended goes on in a new one so many times at most.
export SEAL_MAX_RESTARTS=20

# What a job does before its work: whatever puts `seal-nb` on the PATH. It starts in the project's folder.
seal_environment() {
    # module load cuda
    # source ~/miniconda3/etc/profile.d/conda.sh && conda activate seal-nb
    source .venv/bin/activate
}
