#!/usr/bin/env bash
# Installs the SLURM that tests/slurm starts (10 seconds). Debian or Ubuntu, as root.
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin
for tool in sbatch slurmctld slurmd munged ip; do
    command -v "$tool" >/dev/null && continue
    export DEBIAN_FRONTEND=noninteractive
    apt-get update --quiet --quiet
    apt-get install --quiet --quiet --yes --no-install-recommends slurm-wlm munge iproute2
    break
done
