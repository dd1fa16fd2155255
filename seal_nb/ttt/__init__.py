"""Test-time training: many LoRA adapters on one frozen base. Start with ``trainer``."""
