"""The passage inspector: one passage of a run, its self-edits and answers, and an edit that is trained at once.

Start with `inspection` (the data as DataFrames) and `live` (training one edit). `widgets` and `live` show both in
JupyterLab; `html` makes the HTML, which is the same for the widgets and for the static view.
"""
