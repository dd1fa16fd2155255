"""A table of stages for a whole experiment, and what runs it.

`stages.py` has the settings and the table, `local.py` runs it on this machine, `slurm.py` submits it as jobs.
`record.py` keeps what a run's folder knows, `status.py` and `index.py` show it. Start with `stages.py`.
"""
