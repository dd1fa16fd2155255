"""Run files: read, written, recomputed, compared and graded again. Start at ``collect.read_run``."""
