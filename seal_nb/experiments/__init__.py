"""The experiments, one function each, which build requests and write run files. Start with ``single_passage``."""
