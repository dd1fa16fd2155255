"""The fault of vLLM's LoRA on CPU, and that our plugin mends it (upstream pull requests 48421 and 49656)."""

import json
import subprocess

from seal_nb.engines.vllm import PLUGIN, vllm_python

CODE = """
import json, torch
import seal_nb_vllm_plugin as plugin
from vllm.lora.punica_wrapper import punica_cpu

def shrunk():  # three tokens: of the first adapter, of the base, of the second adapter
    out = torch.ones(3, 4)
    punica_cpu.bgmv_shrink(torch.ones(3, 2), torch.ones(2, 4, 2), out, torch.tensor([0, -1, 1]), 1.0)
    return out.sum(1).tolist()

before = shrunk()
plugin._mask_negative_indices()
plugin._mask_negative_indices()  # as vLLM may load it more than once
print(json.dumps([before, shrunk()]))
"""


def test_a_token_of_the_base_gets_the_last_adapter_without_the_plugin_and_none_with_it() -> None:
    done = subprocess.run([vllm_python(), "-c", CODE], env={"PYTHONPATH": str(PLUGIN)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    before, after = json.loads(done.stdout.splitlines()[-1])
    assert before == [8.0, 8.0, 8.0], "mended upstream: the plugin can go"
    assert after == [8.0, 0.0, 8.0]
