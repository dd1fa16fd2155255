"""Model families: tiny random models, and the table of docs/models.md.

    python -m tests.ttt.families        writes the table

`test_families.py` checks each line of it.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from tests.ttt.tiny import SIZES

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "models.md"
MARKS = "<!-- families -->\n", "<!-- end of families -->\n"
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL = ("all-linear",)
WINDOW = 16  # tokens; rows of the tests are longer
EXPERTS = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
LAYERS = ["sliding_attention", "full_attention"]


@dataclass(frozen=True, kw_only=True)
class Family:
    """A line of the table. targets: what is trained in the test; refused: why all-linear, or the model, is refused"""

    name: str
    kind: str  # prefix of transformers' classes
    config: dict[str, Any] = field(default_factory=dict)
    targets: tuple[str, ...] = ALL
    model_class: str = ""  # if it is not <kind>ForCausalLM
    refused: str = ""
    note: str = ""
    only: str = ""  # a regular expression of the modules that PEFT is to train in the comparison

    def model(self, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
        """The same random weights each time; norms and biases are random too, as after training."""
        torch.manual_seed(0)
        config = getattr(transformers, f"{self.kind}Config")(**SIZES | self.config)
        config._attn_implementation = "eager" if softcapped(config) else "sdpa"
        config._experts_implementation = "eager"  # the others cannot do float64
        model = getattr(transformers, self.model_class or f"{self.kind}ForCausalLM")(config)
        for p in model.parameters():
            if p.dim() == 1:
                p.data.add_(torch.randn_like(p), alpha=0.1)
        return model.to(dtype).eval()


def softcapped(config: Any) -> bool:
    """transformers' sdpa leaves the soft cap of attention out."""
    return bool(getattr(config.get_text_config(), "attn_logit_softcapping", None))


def _gemma3() -> dict[str, Any]:
    text = SIZES | {"head_dim": 8, "sliding_window": WINDOW, "query_pre_attn_scalar": 8, "layer_types": LAYERS}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes = {"image_size": 28, "patch_size": 14}
    tokens = {"image_token_index": 125, "boi_token_index": 126, "eoi_token_index": 127, "mm_tokens_per_image": 4}
    return {"text_config": text, "vision_config": vision | sizes} | tokens


MIXTURE = "all-linear is refused: PEFT would train the experts too, which are no Linear layers"
FAMILIES = [
    Family(name="Llama 2, 3", kind="Llama"),
    Family(name="Qwen2, Qwen2.5", kind="Qwen2"),
    Family(name="Qwen3", kind="Qwen3", config={"head_dim": 16}),
    Family(name="Mistral without a window", kind="Mistral", config={"sliding_window": None}),
    Family(name="Mistral with a sliding window", kind="Mistral", config={"sliding_window": WINDOW}),
    Family(name="Phi-3", kind="Phi3", config={"sliding_window": WINDOW}),
    Family(
        name="SmolLM3",
        kind="SmolLM3",
        config={
            "no_rope_layer_interval": 2,
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "layer_types": LAYERS,
        },
    ),
    Family(name="OLMo-2", kind="Olmo2"),
    Family(name="GPT-NeoX, Pythia", kind="GPTNeoX", config={"hidden_dropout": 0.0, "attention_dropout": 0.0}),
    Family(name="Gemma", kind="Gemma", config={"head_dim": 8}),
    Family(
        name="Gemma-2",
        kind="Gemma2",
        config={"head_dim": 8, "sliding_window": WINDOW, "query_pre_attn_scalar": 8, "final_logit_softcapping": 3.0}
        | {"attn_logit_softcapping": 2.0},
        note="with the soft caps of its configuration, as transformers' attention `eager` computes them",
    ),
    Family(
        name="Gemma-3, text",
        kind="Gemma3Text",
        model_class="Gemma3ForCausalLM",
        config={"head_dim": 8, "sliding_window": WINDOW, "query_pre_attn_scalar": 8, "layer_types": LAYERS},
    ),
    Family(
        name="Gemma-3, multimodal",
        kind="Gemma3",
        model_class="Gemma3ForConditionalGeneration",
        config=_gemma3(),
        only=r".*language_model.*_proj",
        note="its text part; the image encoder is not adapted",
    ),
    Family(
        name="Qwen2-MoE",
        kind="Qwen2Moe",
        config=EXPERTS | {"shared_expert_intermediate_size": 16},
        note="all-linear includes the shared expert and not the others, as in PEFT",
    ),
    Family(name="Qwen3-MoE", kind="Qwen3Moe", config=EXPERTS | {"head_dim": 8}, targets=ATTENTION, note=MIXTURE),
    Family(
        name="DeepSeek-V3",
        kind="DeepseekV3",
        config={"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12}
        | {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 16}
        | {"num_key_value_heads": 4, "first_k_dense_replace": 1},
        targets=("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"),
        note=MIXTURE,
    ),
    Family(name="Granite", kind="Granite", config={"logits_scaling": 3.0}),
    Family(name="Cohere", kind="Cohere", config={"logit_scale": 0.3}),
    Family(name="NanoChat", kind="NanoChat", config={"final_logit_softcapping": 3.0}),
    Family(name="GPT-2", kind="GPT2", model_class="GPT2LMHeadModel", config=NO_DROPOUT | {"n_inner": 48}),
    Family(name="OPT", kind="OPT", config={"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0}),
]


@dataclass(frozen=True, kw_only=True)
class Refused:
    """A line of the table for a family that is refused when it is loaded."""

    name: str
    kind: str
    cause: str  # a part of the message
    config: dict[str, Any] = field(default_factory=dict)

    def model(self) -> PreTrainedModel:
        torch.manual_seed(0)
        config = getattr(transformers, f"{self.kind}Config")(**SIZES | self.config)
        return transformers.AutoModelForCausalLM.from_config(config).eval()


REFUSED = [
    Refused(
        name="BLOOM",
        kind="Bloom",
        cause="its attention does not come from transformers' attention interface",
        config={"n_head": 4, "n_layer": 2},
    ),
    Refused(
        name="gpt-oss",
        kind="GptOss",
        cause="its attention uses s_aux, which is not known here",
        config={"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": ["full_attention"] * 2},
    ),
    Refused(
        name="Llama-4", kind="Llama4Text", cause="it has layers of type 'chunked_attention'", config={"head_dim": 8}
    ),
    Refused(name="Qwen3-Next", kind="Qwen3Next", cause="it has layers of type 'linear_attention'"),
    Refused(name="Mamba", kind="Mamba", cause="it has layers of type 'linear_attention'", config={"state_size": 4}),
]


def table() -> str:
    rows = ["| family | classes in transformers | result | remarks |", "|---|---|---|---|"]
    for family in FAMILIES:
        result = "works" if family.targets == ALL else f"works with `{'`, `'.join(family.targets)}`"
        rows.append(f"| {family.name} | `{family.kind}…` | {result} | {family.note} |")
    rows += [f"| {refused.name} | `{refused.kind}…` | refused | {refused.cause} |" for refused in REFUSED]
    return "\n".join([*rows, ""])


def main() -> None:
    head, rest = DOCUMENT.read_text(encoding="utf-8").split(MARKS[0])
    DOCUMENT.write_text(head + MARKS[0] + table() + MARKS[1] + rest.split(MARKS[1])[1], encoding="utf-8")


if __name__ == "__main__":
    main()
