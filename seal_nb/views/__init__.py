"""Figures and tables: plain records and DataFrames in, a matplotlib Figure or a display out.

Start at `plots` and `tables.show`; `style` has colours and sizes, `live` what changes while a notebook runs.
"""
