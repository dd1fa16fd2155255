"""Figures and tables. Start at ``plots`` and ``tables.show``."""
