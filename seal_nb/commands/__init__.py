"""The commands of ``seal-nb``: they parse options, call the package and print. Start with `seal_nb/cli.py`."""
