"""Graders: is a given answer right? Start with ``choose.make_grader``; ``base`` has the types.

``local`` needs nothing, ``judge`` asks a language model, and ``rules`` has the plain measures to compare with.
"""
