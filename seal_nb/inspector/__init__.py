"""The passage inspector, and an edit that is trained at once. Start with ``inspection`` and ``live``."""
