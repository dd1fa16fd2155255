"""Run files: read, written, recomputed, compared and graded again. Nothing is trained here.

Start at `collect.read_run`. `run.Run` has what the three forms share: `single_passage`, `cpt`, `continual`.
"""
