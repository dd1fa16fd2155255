"""AdamW and clipping of one adapter, as torch.optim.AdamW and torch.nn.utils.clip_grad_norm_ do it, without a host sync.

β 0.9/0.999, ε 1e-8, no weight decay: the defaults in force in the published inner loop. Works on the flat vectors with
torch's fused kernel; the clipping factor stays on the device.
"""

import torch

from seal_nb.ttt.branches import Gradient
from seal_nb.ttt.lora import Adapter

BETA_1, BETA_2, EPSILON = 0.9, 0.999, 1e-8


class SlotAdamW:
    """Optimiser state of one adapter: two moments of its size and a step count."""

    def __init__(self, adapter: Adapter):
        self.mean = torch.zeros_like(adapter.flat)
        self.square = torch.zeros_like(adapter.flat)
        self.steps = torch.zeros((), dtype=torch.float32, device=adapter.flat.device)

    def step(self, adapter: Adapter, gradient: Gradient, *, learning_rate: float, max_grad_norm: float) -> torch.Tensor:
        """Clip and step in place. Returns the gradient's norm before clipping, a scalar on the device."""
        norm = torch.linalg.vector_norm(gradient.flat)
        gradient.flat.mul_((max_grad_norm / (norm + 1e-6)).clamp(max=1.0))
        self.steps += 1
        torch._fused_adamw_(
            [adapter.flat],
            [gradient.flat],
            [self.mean],
            [self.square],
            [],
            [self.steps],
            lr=learning_rate,
            beta1=BETA_1,
            beta2=BETA_2,
            weight_decay=0.0,
            eps=EPSILON,
            amsgrad=False,
            maximize=False,
        )
        adapter.refresh()
        return norm
