"""A plugin that runs in each process of a vLLM server that seal-nb started. vLLM finds it by its entry point.

It ends the process when its parent has ended, and repairs a fault of vLLM 0.32 on CPU: a LoRA index of -1 ("no
adapter") selects the last adapter, so a request to the base that shares a batch with requests to adapters gets it
(upstream pull requests 48421 and 49656). This folder is on the server's PYTHONPATH; the rest of the package is not."""

import os
import threading
import time
from typing import Any

PARENT_VARIABLE = "SEAL_NB_VLLM_PARENT"
POLL_S = 0.5


def register() -> None:
    """vLLM calls this once in each of its processes."""
    parent = os.getppid()
    started_by = os.environ.pop(PARENT_VARIABLE, "")  # set for the server; its children have another parent
    if started_by and parent != int(started_by):  # the parent has ended already
        os._exit(143)
    threading.Thread(target=_end_with, args=(parent,), name="end-with-parent", daemon=True).start()
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        _mask_negative_indices()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(POLL_S)
    os._exit(143)


def _mask_negative_indices() -> None:
    """Set the rows of negative LoRA indices to zero."""
    from vllm.lora.ops import torch_ops
    from vllm.lora.ops.torch_ops import lora_ops
    from vllm.lora.punica_wrapper import punica_cpu

    original = lora_ops.bgmv_shrink
    if getattr(original, "masks_negative_indices", False):
        return

    def bgmv_shrink(
        inputs: Any, lora_b_weights: Any, output_tensor: Any, lora_indices_tensor: Any, scaling: float = 1.0
    ) -> None:
        original(inputs, lora_b_weights, output_tensor, lora_indices_tensor, scaling)
        output_tensor[lora_indices_tensor < 0] = 0

    bgmv_shrink.masks_negative_indices = True  # type: ignore[attr-defined]
    for module in (lora_ops, torch_ops, punica_cpu):  # each holds a reference of its own
        module.bgmv_shrink = bgmv_shrink
