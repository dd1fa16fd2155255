"""Text generation: prompts in, completions out. Start with ``base.Engine``."""
