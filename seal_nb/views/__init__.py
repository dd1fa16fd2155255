"""Figures and tables: plain records and DataFrames in, a matplotlib Figure or a display out.

Start at `plots` and `tables.show`; `live` has what changes while a notebook runs.
"""
