"""The frozen base: a transformers decoder that runs packed rows, with the adapters of each row.

Works for decoders whose logits are `head(hidden)` and whose layers all attend fully (Llama, Qwen2, Qwen3, Mistral, …),
which is checked numerically when a model is loaded. Its weights never change.
"""

import contextlib
import functools
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakSet

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from seal_nb.errors import SettingsError
from seal_nb.models import FOUR_BIT
from seal_nb.ttt.attention import ATTENTION, Attend, Rows
from seal_nb.ttt.branches import PLAN, BranchedLinear, Plan
from seal_nb.ttt.device import free_cached_memory, region, sent
from seal_nb.ttt.jobs import LoraSettings
from seal_nb.ttt.lora import Adapter, Layout, linears_of, load_adapter, make_layout

CHECK_ROWS = ((0, 8), (5, 21))  # first token and length of the rows that check a model when it is loaded
# All names in the code of a forward that is `down_proj(act_fn(gate_proj(x)) * up_proj(x))`.
GATED = {"gate_proj", "up_proj", "down_proj", "act_fn"}
ROTARY = "apply_rotary_pos_emb"
T = TypeVar("T")


class FrozenBase:
    """A model, loaded once and run in passes over many rows, each row with its own adapters. The model's Linear layers
    and its attention are replaced. Raises SettingsError if its architecture is not supported."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, name: str = ""):
        self.model, self.tokenizer, self.name = model.eval().requires_grad_(False), tokenizer, name
        self.device, self.dtype, self.model_type = model.device, model.dtype, model.config.model_type
        kinds = set(getattr(model.config, "layer_types", None) or [])
        if kinds - {"full_attention"}:
            kind = f"model type {self.model_type!r} has {sorted(kinds)} layers"
            raise SettingsError(f"{kind}; only full attention is supported")
        if model.get_output_embeddings() is None:
            raise SettingsError(f"model type {self.model_type!r} has no language-model head; give a causal model")
        rows = [[i % model.config.vocab_size for i in range(first, first + n)] for first, n in CHECK_ROWS]
        with torch.no_grad():
            ids = [torch.tensor([row], device=self.device) for row in rows]
            expected = torch.cat([model(input_ids=one, use_cache=False).logits[0] for one in ids])
        self.trainers: WeakSet[Any] = WeakSet()  # SlotTrainers, which hold memory that they can free
        self.linears = linears_of(model)
        for linear_name, linear in self.linears.items():
            model.set_submodule(linear_name, BranchedLinear(linear, linear_name))
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # events and streams are made on the current device
            _make_regions(model)
        model.config._attn_implementation = ATTENTION
        self.decoder, self.head = model.get_decoder(), model.get_output_embeddings()
        self._check(rows, expected)

    @classmethod
    def load(cls, folder: str | Path, *, device: str = "auto", dtype: str = "auto") -> "FrozenBase":
        """Load a model (folder or hub name); no code of its repository is ever run. The dtype "auto" is bfloat16 if the
        device multiplies it natively (CUDA, CPUs with AMX or AVX512-BF16), else float32; "4bit" is "auto" with the
        weights of Linear layers in NF4 (QLoRA, arXiv 2305.14314). Raises SettingsError if that lacks bitsandbytes."""
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        in_four_bits = dtype == FOUR_BIT
        if dtype in ("auto", FOUR_BIT):
            dtype = "bfloat16" if device.startswith("cuda") or cpu_multiplies_bfloat16() else "float32"
        options: dict[str, Any] = {"dtype": getattr(torch, dtype), "attn_implementation": "sdpa"}
        if in_four_bits:
            options |= _four_bit_options(options["dtype"], device)
        tokenizer = AutoTokenizer.from_pretrained(str(folder))
        model = AutoModelForCausalLM.from_pretrained(str(folder), **options)
        for module in model.modules():
            # bitsandbytes 0.50 (nn.modules.Linear4bit.forward) repacks a weight at its first product on CPUs with
            # AVX512-BF16, and `dense_weight` could not read it.
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        return cls(model if in_four_bits else model.to(device), tokenizer, name=str(folder))

    @property
    def eos_ids(self) -> frozenset[int]:
        """Tokens that end an answer: the generation config's, else the tokenizer's."""
        eos = self.model.generation_config.eos_token_id if self.model.generation_config else None
        eos = self.tokenizer.eos_token_id if eos is None else eos
        return frozenset(eos if isinstance(eos, list) else [eos] if eos is not None else [])

    def layout(self, settings: LoraSettings) -> Layout:
        return make_layout(self.linears, settings, self.model_type)

    def make_room(self) -> None:
        """Free what is cached on the device, by trainers of this base and by torch."""
        for trainer in list(self.trainers):
            trainer.drop_idle()
        free_cached_memory(self.device)

    def with_room(self, call: Callable[[], T]) -> T:
        """Result of `call`. If memory runs out, room is made and it is called once more."""
        with contextlib.suppress(torch.OutOfMemoryError):
            return call()
        self.make_room()
        return call()

    def load_adapter(self, folder: Path) -> Adapter:
        """An adapter in PEFT's format for this base. Raises SettingsError as `lora.load_adapter`."""
        return load_adapter(folder, self.linears, self.model_type, compute_dtype=self.dtype, device=self.device)

    def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=special_tokens)["input_ids"])

    def hidden(
        self, rows: Sequence[Sequence[int]], adapters: Sequence[Sequence[Adapter]] = (), *, attend: Attend | None = None
    ) -> Tensor:
        """Last hidden states (T, d) of rows of token ids, end to end. attend: replaces attention within rows"""
        lengths = [len(row) for row in rows]
        ids = sent(torch.tensor([token for row in rows for token in row]), self.device)
        positions = sent(torch.cat([torch.arange(n) for n in lengths]), self.device)
        attend = attend or Rows(lengths, self.device).attend
        return self.run(ids, positions, Plan(list(zip(lengths, adapters, strict=False))), attend)

    def run(self, ids: Tensor, positions: Tensor, plan: Plan, attend: Attend) -> Tensor:
        """As `hidden`, from token ids and positions (T,) on the device."""
        before = PLAN.set(plan)
        try:
            how = {"position_ids": positions[None], "use_cache": False, "attend": attend}
            return self.decoder(input_ids=ids[None], **how).last_hidden_state[0]
        finally:
            PLAN.reset(before)

    def _check(self, rows: Sequence[Sequence[int]], expected: Tensor) -> None:
        """Compare the logits of two packed rows with those that the unchanged model gave to each alone."""
        name = self.name or self.model_type
        try:
            with torch.no_grad():
                found = self.head(self.hidden(rows))
        except RuntimeError as reason:
            raise SettingsError(f"model {name!r} cannot run packed rows: {reason}") from reason
        error = float((found.double() - expected.double()).norm() / expected.double().norm())
        if not error < (1e-3 if self.dtype in (torch.float32, torch.float64) else 0.2):
            raise SettingsError(
                f"model {name!r} is not supported: its logits for packed rows differ by {error:.2g} of their size from"
                " its logits for single rows, so its architecture does something between rows, or between hidden"
                " states and logits, that is not known here"
            )


def cpu_multiplies_bfloat16() -> bool:
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


def _four_bit_options(compute_dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Options of `from_pretrained` for NF4 weights. Products run in the compute dtype."""
    if find_spec("bitsandbytes") is None:
        raise SettingsError("dtype is '4bit', which needs bitsandbytes: pip install -e '.[4bit]', or take bfloat16")
    from transformers import BitsAndBytesConfig

    nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": compute_dtype}
    return {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, **nf4), "device_map": {"": device}}


def _make_regions(model: nn.Module) -> None:
    """Turn the model's norms, gated activations and rotary embedding into regions (see `device.region`). They are
    compiled from the model's own code, so each family keeps its arithmetic. Values between two operations of a region
    stay in float32, where separate kernels round."""
    for module in model.modules():
        kind: Any = type(module)
        names = getattr(getattr(kind.forward, "__code__", None), "co_names", ())
        if kind.__name__.endswith("RMSNorm"):
            module.forward = functools.partial(region(kind.forward), module)
        elif set(names) == GATED:
            module.forward = functools.partial(_gated_mlp, module)
        code = sys.modules[kind.__module__]
        rotary = getattr(code, ROTARY, None)
        if rotary is not None and not hasattr(rotary, "is_region"):
            setattr(code, ROTARY, region(rotary))


def _gated_mlp(module: Any, x: Tensor) -> Tensor:
    return module.down_proj(_gate(module.act_fn, module.gate_proj(x), module.up_proj(x)))


@region
def _gate(act: Callable[[Tensor], Tensor], gate: Tensor, up: Tensor) -> Tensor:
    return act(gate) * up
