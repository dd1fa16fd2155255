"""A table of stages for a whole experiment, and what runs it here or on SLURM. Start with ``stages``."""
