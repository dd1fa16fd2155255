"""Supervised fine-tuning of a ReST-EM round, and full fine-tuning for CPT. Start with ``launch.run_job``.

``settings`` has the settings without torch, ``train`` is the training of one process.
"""
