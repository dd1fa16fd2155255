"""Test-time training: many LoRA adapters on one frozen base, each as PEFT and the Trainer would make it alone.

Start with `trainer.py` (the slots and the optimiser step). `jobs.py` turns train sequences into tokens and labels,
`passes.py` computes loss and gradients, `decode.py` generates and scores answers, `base.py` loads and checks a model.
"""
