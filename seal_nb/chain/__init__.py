"""A table of stages for a whole experiment, and what runs it. Start with `stages.py`: the settings and the table.

`local.py` runs it on this machine, `slurm.py` submits it as jobs. `record.py` keeps what a run's folder knows and says
what has become of each stage. `index.py` writes the pages of a run.
"""
