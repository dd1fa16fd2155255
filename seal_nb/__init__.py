"""Put knowledge into a language model's weights with self-edits (SEAL, arXiv 2506.10943): `import seal_nb as seal`.

Load passages, start or connect to a TTT server, run an experiment, look at DataFrames and figures: docs/api.md.
Names are imported when they are first used. torch is never imported, so a laptop can drive a cluster."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
