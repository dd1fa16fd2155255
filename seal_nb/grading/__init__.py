"""Graders: is a given answer right? Start with ``choose.make_grader``."""
