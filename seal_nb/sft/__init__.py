"""Supervised fine-tuning of a ReST-EM round, and full fine-tuning for CPT. Start with ``train.run_job``."""
