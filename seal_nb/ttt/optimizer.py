"""AdamW and clipping of one adapter, as torch.optim.AdamW and ``torch.nn.utils.clip_grad_norm_`` do it,
without a host sync.

β 0.9/0.999, ε 1e-8, no weight decay: the defaults in force in the published inner loop. Works on the flat
row with torch's fused kernel; the clipping factor stays on the device."""

import torch

from seal_nb.ttt.bank import BankRow

BETA_1, BETA_2, EPSILON = 0.9, 0.999, 1e-8


def adamw_step(row: BankRow, *, learning_rate: float, max_grad_norm: float) -> torch.Tensor:
    """Clip and step in place. Returns the gradient's norm before clipping, a scalar on the device."""
    norm = torch.linalg.vector_norm(row.gradient)
    divisor = ((norm + 1e-6) / max_grad_norm).clamp(min=1.0)
    fused_division = row.gradient.dtype == torch.float32  # the kernel divides, in float32 only
    if not fused_division:
        row.gradient.div_(divisor)
    row.steps += 1
    torch._fused_adamw_(
        [row.weights],
        [row.gradient],
        [row.mean],
        [row.square],
        [],
        [row.steps],
        lr=learning_rate,
        beta1=BETA_1,
        beta2=BETA_2,
        weight_decay=0.0,
        eps=EPSILON,
        amsgrad=False,
        maximize=False,
        grad_scale=divisor if fused_division else None,
    )
    row.refresh()
    return norm
