"""The experiments, one function each: `evaluate`, `cpt`, `rest_em_round`, `continual`, `sweep`, `create_self_edits`.

Each builds requests, sends what its journal lacks (`session.ask`), and writes run files. Start with
`single_passage.evaluate`. `seal_nb/self_edits.py` makes train sequences, `seal_nb/prompts.py` prompts.
"""
