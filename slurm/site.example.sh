# Settings of your cluster. Copy this file to slurm/site.sh (git ignores it) and edit it; no other file names a site.
# Jobs and `seal-nb submit` read it. Before a plain sbatch: . slurm/site.sh

# Read by sbatch itself; they override the options in a script. More names: man sbatch, INPUT ENVIRONMENT VARIABLES.
# export SBATCH_PARTITION=gpu
# export SBATCH_ACCOUNT=my-project
# export SBATCH_QOS=normal
# export SBATCH_TIMELIMIT=08:00:00
# Memory: one of these. A plain sbatch reads only the first, because the scripts say --mem.
# export SBATCH_MEM_PER_NODE=128G
# export SBATCH_MEM_PER_CPU=8G
# export SBATCH_MEM_PER_GPU=64G

# GPUs of a node: 2, or a100:2 (not SBATCH_GPUS or SBATCH_GRES, which the scripts' own contradict). With 0 all jobs
# compute on CPUs. `seal-nb submit` asks for all of them for TTT servers and trainings, and for one for self-edits.
# A plain sbatch takes the one GPU of the script, or --gpus-per-node=…
export SEAL_GPUS=1

# A job that reaches its time limit is queued again at most so many times.
export SEAL_MAX_RESTARTS=20

# Where results go instead of runs/ in the project, for example a scratch disk that all nodes see.
# export SEAL_RUNS=/scratch/me/runs

# Commands that put `seal-nb` on the PATH. A job runs them first, in the project's folder.
seal_environment() {
    # module load cuda
    # source ~/miniconda3/etc/profile.d/conda.sh && conda activate seal-nb
    source .venv/bin/activate
}
