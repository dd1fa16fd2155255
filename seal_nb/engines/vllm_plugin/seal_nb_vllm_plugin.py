"""What runs inside each process of a vLLM server that seal-nb started. vLLM finds it by its entry point.

Two things: the process ends when its parent does, and a fault of vLLM on CPU is mended. There, LoRA indices
of -1 ("no adapter") index the stacked weights from behind, so that requests to the base which are batched
with requests to adapters get the last adapter (seen in 0.32; upstream pull requests 48421 and 49656). Rows of
negative index get zeros instead. This folder is on the server's PYTHONPATH, the rest of the package is not.
"""

import os
import threading
import time
from typing import Any

PARENT_VARIABLE = "SEAL_NB_VLLM_PARENT"
POLL_S = 0.5


def register() -> None:
    """Called by vLLM, once in each of its processes."""
    _end_with_parent()
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        _mask_negative_indices()


def _mask_negative_indices() -> None:
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
    for module in (lora_ops, torch_ops, punica_cpu):  # each has bound the name for itself
        module.bgmv_shrink = bgmv_shrink


def _end_with_parent() -> None:
    """The server ends with whoever started it, and its engine with the server; also after a kill -9."""
    parent = os.getppid()
    started_by = os.environ.pop(PARENT_VARIABLE, "")  # the server's own; its children have another parent
    if started_by and parent != int(started_by):  # gone before this could look
        os._exit(143)
    threading.Thread(target=_watch, args=(parent,), name="end-with-parent", daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(POLL_S)
    os._exit(143)
