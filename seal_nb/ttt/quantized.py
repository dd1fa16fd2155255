"""A frozen base in 4 bits: NF4 by bitsandbytes (Dettmers et al., QLoRA, arXiv 2305.14314), adapters as ever.

Weights of Linear layers take a quarter of bfloat16's memory, so that a 7B base leaves room on a 24 GB GPU;
products run in the compute dtype. bitsandbytes is not a dependency: whoever wants this installs it.
"""

from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from seal_nb.errors import SettingsError


def quantized(compute_dtype: torch.dtype, device: str) -> dict[str, Any]:
    """What `from_pretrained` takes for it. Raises SettingsError where bitsandbytes is not installed."""
    if find_spec("bitsandbytes") is None:
        raise SettingsError("dtype is '4bit', which needs bitsandbytes: pip install -e '.[4bit]', or take bfloat16")
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )
    return {"quantization_config": config, "device_map": {"": device}}


def keep_as_stored(model: nn.Module) -> None:
    """Let no layer repack its weight on its first pass, as bitsandbytes does on CPUs with AVX512-BF16
    (0.50, ``nn.modules.Linear4bit.forward``): `dense_weight` could not read it any more."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def dense_weight(linear: nn.Linear) -> torch.Tensor:
    """(out, in) weight as the forward pass multiplies with it."""
    state = getattr(linear.weight, "quant_state", None)
    if state is None:
        return linear.weight
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(linear.weight.data, state)
