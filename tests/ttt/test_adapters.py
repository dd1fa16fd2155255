"""Adapters that PEFT made are read as PEFT reads them, or refused by name; target modules are PEFT's."""

import dataclasses
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from seal_nb import protocol
from seal_nb.errors import ProtocolError, SettingsError
from seal_nb.peft_files import SCALE_FIELDS, TARGET_FIELDS, KeptAdapters, adapter_for, load_adapter, merge_stack
from seal_nb.server.loop import train_job
from seal_nb.ttt.base import FrozenBase
from seal_nb.ttt.branches import PLAN, BranchedLinear, Plan
from seal_nb.ttt.lora import Adapter, LoraSettings, initial_weights, linears_of, make_layout, peft_weights, target_names
from tests.ttt.tiny import SIZES, AsciiTokenizer, tiny_model, tiny_tokenizer

ROW = [5, 9, 2, 77, 31, 8]
EXPERTS = {
    "moe_intermediate_size": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "shared_expert_intermediate_size": 24,
}
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": tiny_model,
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=128, bos_token_id=0, eos_token_id=0)
    ),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4)),
    "qwen2_moe": lambda: Qwen2MoeForCausalLM(Qwen2MoeConfig(**SIZES, **EXPERTS)),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **EXPERTS, head_dim=8)),
}


def a_model(kind: str = "llama") -> PreTrainedModel:
    torch.manual_seed(0)
    model = MODELS[kind]().double().eval()
    model.set_experts_implementation("eager")  # grouped_mm takes no float64
    return model


@pytest.fixture(scope="module")
def base() -> FrozenBase:
    return FrozenBase(a_model(), AsciiTokenizer())


def made_by_peft(folder: Path, model: PreTrainedModel, **config: Any) -> Path:
    """A folder that PEFT wrote: an adapter whose A and B are random."""
    adapted = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["q_proj"]} | config))
    torch.manual_seed(1)
    for name, weight in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight)
    adapted.save_pretrained(folder)
    return folder


def peft_logits(model: PreTrainedModel, *folders: Path) -> Tensor:
    for folder in folders:
        model = PeftModel.from_pretrained(model, folder).merge_and_unload()
    with torch.no_grad():
        return model(torch.tensor([ROW])).logits[0]


def logits(base: FrozenBase, *adapters: Adapter) -> Tensor:
    with torch.no_grad():
        return base.head(base.hidden([ROW], [adapters]))


def changed(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], **config: Any) -> Path:
    """Change an adapter's tensors and fields in place."""
    weights, fields = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    save_file({name: t.clone() for name, t in change(load_file(weights)).items()}, weights)
    fields.write_text(json.dumps(json.loads(fields.read_text()) | config))
    return folder


PATTERNS = {"rank_pattern": {r"layers\.1\..*": 7, "q_proj": 2}, "alpha_pattern": {"^model.layers.0.mlp.up_proj": 9.5}}
FOREIGN: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True},
    "patterns": {**PATTERNS, "target_modules": ["q_proj", "up_proj", "down_proj"]},
    "rslora with patterns": {**PATTERNS, "target_modules": "all-linear", "use_rslora": True},
    "regular expression": {"target_modules": r".*\.1\..*(up|gate)_proj"},
    "layers to transform": {"target_modules": ["k_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    "excluded modules": {"target_modules": "all-linear", "exclude_modules": ["o_proj", "model.layers.0.mlp.up_proj"]},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "alpha 0": {"lora_alpha": 0},
    "gpt2": {"target_modules": "all-linear", "alpha_pattern": {"attn.c_proj": 3}},
    "qwen2_moe": {"target_modules": ["k_proj", "o_proj"]},
    "qwen3_moe": {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 2}},
    "mixtral": {"target_modules": r".*self_attn\.[qo]_proj"},
}


@pytest.mark.parametrize("what", FOREIGN)
def test_an_adapter_that_peft_saved_gives_the_logits_of_peft(what: str, base: FrozenBase, tmp_path: Path) -> None:
    kind = what if what in MODELS else "llama"
    base = FrozenBase(a_model(kind), AsciiTokenizer()) if kind != "llama" else base
    folder = made_by_peft(tmp_path, a_model(kind), **FOREIGN[what])
    expected = peft_logits(a_model(kind), folder)
    assert torch.allclose(logits(base, adapter_for(base, folder)), expected, rtol=0, atol=1e-9)
    assert what == "alpha 0" or not torch.allclose(logits(base), expected, atol=1e-3)


def test_foreign_adapters_stack_and_merge_to_the_logits_of_peft(base: FrozenBase, tmp_path: Path) -> None:
    folders = [
        made_by_peft(tmp_path / "a", a_model(), **FOREIGN["rslora with patterns"]),
        made_by_peft(tmp_path / "b", a_model(), **FOREIGN["patterns"]),
    ]
    expected = peft_logits(a_model(), *folders)
    kept = KeptAdapters(tmp_path, partial(adapter_for, base), "model")
    stack = [kept.get(folder.name)[1] for folder in folders]
    assert torch.allclose(logits(base, *stack), expected, rtol=0, atol=1e-9)
    a_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    merged = AutoModelForCausalLM.from_pretrained(merge_stack(str(tmp_path / "model"), folders, tmp_path / "merged"))
    assert torch.allclose(peft_logits(merged.double()), expected, atol=1e-4)


RENAMED: dict[str, Callable[[str], str]] = {
    "adapter's name": lambda name: name.replace(".weight", ".default.weight"),
    "no prefix": lambda name: name.removeprefix("base_model.model."),
    "text model of a larger one": lambda name: name.replace("model.layers", "model.language_model.layers"),
    "older larger model": lambda name: name.replace("model.layers", "language_model.model.layers"),
    "bare decoder": lambda name: name.replace("model.model.", "model."),
    "compiled": lambda name: name.replace("model.model.", "model._orig_mod.model."),
}


@pytest.mark.parametrize("rename", RENAMED.values(), ids=RENAMED)
def test_other_names_of_the_same_weights_are_read(rename: Callable[[str], str], base: FrozenBase, tmp_path) -> None:  # type: ignore[no-untyped-def]
    expected = logits(base, adapter_for(base, made_by_peft(tmp_path, a_model(), **FOREIGN["rslora"])))
    changed(tmp_path, lambda tensors: {rename(name): t for name, t in tensors.items()})
    assert torch.equal(logits(base, adapter_for(base, tmp_path)), expected)


A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
REFUSED: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "no B": (
        lambda w: {n: t for n, t in w.items() if n != A.replace("_A", "_B")},
        r"lora_B of 'model\.layers\.0.* is missing",
    ),
    "no A": (lambda w: {n: t for n, t in w.items() if n != A}, r"lora_A of 'model\.layers\.0.* is missing"),
    "another rank": (lambda w: w | {A: w[A][:2]}, r"lora_A of .* is \(2, 32\).*\(4, 32\)"),
    "another model": (lambda w: w | {A: w[A][:, :8]}, r"lora_A of .* is \(4, 8\).*\(4, 32\)"),
    "embedding": (
        lambda w: w | {"base_model.model.model.embed_tokens.lora_embedding_A": w[A]},
        "lora_embedding_A' fits no linear",
    ),
    "magnitudes": (
        lambda w: w | {A.replace("lora_A", "lora_magnitude_vector"): w[A]},
        "magnitude_vector.weight' fits no linear",
    ),
    "bias": (lambda w: w | {A.replace(".lora_A.weight", ".bias"): w[A]}, "q_proj.bias' fits no linear"),
    "head": (lambda w: w | {"base_model.model.lm_head.weight": w[A]}, "lm_head.weight' fits no linear"),
    "adapted head": (lambda w: w | {"base_model.model.lm_head.lora_A.weight": w[A]}, "lm_head.* fits no linear"),
    "more layers": (lambda w: w | {A.replace("s.0.", "s.2."): w[A]}, r"layers\.2\.self_attn.* fits no linear"),
    "experts": (lambda w: w | {A.replace("self_attn.q_proj", "mlp.experts"): w[A]}, "experts.* fits no linear"),
    "two adapters": (lambda w: w | {A.replace("_A", "_A.b"): w[A].clone()}, "q_proj; only one lora_A"),
    "nothing": (lambda w: {}, "has no weight"),
}


@pytest.mark.parametrize(("change", "said"), REFUSED.values(), ids=REFUSED)
def test_weights_that_are_no_whole_adapter_of_this_model_are_named(
    change, said: str, base: FrozenBase, tmp_path
) -> None:  # type: ignore[no-untyped-def]
    made_by_peft(tmp_path, a_model())
    with pytest.raises(SettingsError, match=said):
        adapter_for(base, changed(tmp_path, change))


def test_a_weight_that_fits_two_layers_is_refused(tmp_path: Path) -> None:
    made_by_peft(tmp_path, a_model())
    changed(tmp_path, lambda w: {name.replace("model.layers", "layers"): t for name, t in w.items()})
    linears = linears_of(a_model())
    twice = linears | {name.replace("model.", "language_model."): linear for name, linear in linears.items()}
    with pytest.raises(SettingsError, match="fits model.layers.*and language_model.layers"):
        load_adapter(tmp_path, twice, compute_dtype=torch.float64, device=torch.device("cpu"))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_dora", True),
        ("modules_to_save", ["lm_head"]),
        ("bias", "lora_only"),
        ("lora_bias", True),
        ("trainable_token_indices", [1]),
        ("target_parameters", ["experts.down_proj"]),
        ("layer_replication", [[0, 2], [1, 2]]),
        ("use_qalora", True),
        ("alora_invocation_tokens", [3]),
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "lora_ga"),
        ("kasa_config", {}),
        ("peft_type", "LOHA"),
        ("peft_type", ""),
        ("a_field_of_later_versions", "on"),
        ("r", "4"),
        ("r", 0),
        ("lora_alpha", "6"),
        ("rank_pattern", ["q_proj"]),
        ("rank_pattern", {"(": 4}),
    ],
)
def test_a_configuration_that_is_not_plain_lora_is_refused_by_field_and_value(
    field: str, value: Any, base: FrozenBase, tmp_path: Path
) -> None:
    made_by_peft(tmp_path, a_model())
    with pytest.raises(SettingsError) as refused:
        adapter_for(base, changed(tmp_path, dict, **{field: value}))
    assert f"{field} {value!r}" in str(refused.value) and "adapter_config.json" in str(refused.value)
    assert any(remedy in str(refused.value) for remedy in ("merge_and_unload", "correct them"))


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("adapter_config.json", b"{", "adapter_config.json cannot be read"),
        ("adapter_config.json", b"[1]", "adapter_config.json cannot be read"),
        ("adapter_config.json", b"\xff\xfe{", "adapter_config.json cannot be read"),
        ("adapter_config.json", None, "no adapter at .*adapter_config.json cannot"),
        ("adapter_model.safetensors", b"", "cannot be read"),
        ("adapter_model.safetensors", b"\x10\x00", "cannot be read"),
        ("adapter_model.safetensors", None, "cannot be read"),
    ],
)
def test_a_damaged_folder_is_refused(file: str, content: bytes | None, said: str, base: FrozenBase, tmp_path) -> None:  # type: ignore[no-untyped-def]
    made_by_peft(tmp_path, a_model())
    if content is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(SettingsError, match=said):
        adapter_for(base, tmp_path)


def test_a_pickle_is_refused_with_the_way_to_convert_it(base: FrozenBase, tmp_path: Path) -> None:
    made_by_peft(tmp_path, a_model())
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(SettingsError, match="adapter_model.bin is a pickle.*save it with PEFT"):
        adapter_for(base, tmp_path)


WANTED: list[tuple[str, tuple[str, ...] | str]] = [
    ("llama", ()),
    ("llama", ("all-linear",)),
    ("llama", "all-linear"),
    ("llama", ("model.layers.0.self_attn.q_proj",)),
    ("llama", r".*\.1\.mlp\.(up|down)_proj"),
    ("gpt2", ()),
    ("gpt2", ("all-linear",)),
    ("gpt2", ("c_attn", "mlp.c_proj")),
    ("mixtral", ("q_proj", "v_proj")),
    ("qwen2_moe", ("all-linear",)),  # PEFT adapts the shared expert, which is of Linear layers, and no other
    ("qwen2_moe", ("k_proj", "o_proj")),
    ("qwen3_moe", "model.*self_attn.[qv]_proj"),
]


@pytest.mark.parametrize(("kind", "wanted"), WANTED)
def test_targets_and_initial_weights_are_those_of_peft_and_survive_saving(kind: str, wanted: Any, tmp_path) -> None:  # type: ignore[no-untyped-def]
    """Saved by us, the adapter changes the logits in PEFT as it does here."""
    model = a_model(kind)
    linears = linears_of(model)
    layout = make_layout(linears, target_names(model, linears, wanted), rank=4)
    flat = initial_weights(layout, 3)
    given = None if wanted == () else "all-linear" if wanted == ("all-linear",) else wanted
    same = a_model(kind).float()
    torch.manual_seed(3)
    theirs = get_peft_model(same, LoraConfig(r=4, target_modules=given))
    expected = {name.replace(".default", ""): t for name, t in theirs.named_parameters() if t.requires_grad}
    ours = peft_weights(layout, flat)
    assert ours.keys() == expected.keys() and all(torch.equal(ours[name], t) for name, t in expected.items())

    flat = torch.randn(layout.size, dtype=torch.float64)
    adapter = Adapter(layout, LoraSettings(rank=4, alpha=6, target_modules=wanted), flat, torch.float64)
    kept = KeptAdapters(tmp_path, lambda _: adapter, "model")
    expected_logits = peft_logits(a_model(kind), kept.keep("one", adapter))
    fields = json.loads((tmp_path / "one" / "adapter_config.json").read_text())
    assert sorted(fields["target_modules"]) == sorted(layout.by_name) and fields["fan_in_fan_out"] == (kind == "gpt2")
    read = load_adapter(tmp_path / "one", linears, compute_dtype=torch.float64, device=torch.device("cpu"))
    assert torch.equal(read.flat, flat) and read.layout == layout and read.settings.scaling == 1.5
    plain = peft_logits(model)
    for name in read.layout.by_name:
        linears[name].weight.data += read.delta(name)
    assert torch.allclose(peft_logits(model), expected_logits, rtol=0, atol=1e-9)
    assert not torch.allclose(plain, expected_logits, atol=1e-3)


def test_an_adapter_on_one_named_layer_is_kept_across_a_restart(base: FrozenBase, tmp_path: Path) -> None:
    layout = base.layout(LoraSettings(rank=4, target_modules=("model.layers.0.self_attn.q_proj",)))
    adapter = Adapter(layout, LoraSettings(rank=4, alpha=6), torch.randn(layout.size).double(), torch.float64)
    KeptAdapters(tmp_path, partial(adapter_for, base), "model").keep("one", adapter)
    _, read = KeptAdapters(tmp_path, partial(adapter_for, base), "model").get("one")
    assert torch.equal(logits(base, read), logits(base, adapter))
    assert torch.allclose(logits(base, read), peft_logits(a_model(), tmp_path / "one"), rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("kind", "wanted", "said"),
    [
        ("mixtral", ("all-linear",), r"PEFT would train model\.layers\.0\.mlp\.gate, model\.layers\.0\.mlp\.experts, "),
        ("qwen3_moe", ("all-linear",), r"PEFT would train model\.layers\.0\.mlp\.experts.*attention"),
        ("qwen3_moe", ".*(q_proj|down_proj)", r"PEFT would train model\.layers\.0\.mlp\.experts"),
        ("qwen3_moe", ("gate_proj",), "'gate_proj', which is no Linear"),
        ("qwen3_moe", (), r"\[\], which PEFT refuses.*'all-linear'"),
        ("qwen2_moe", ".*mlp.gate", "which PEFT refuses: .*Router"),
        ("llama", ".*(q_proj|lm_head)", "PEFT would train lm_head"),
        ("llama", ".*embed_tokens", "PEFT would train model.embed_tokens"),
        ("llama", ("q_proj", "lm_head"), "'lm_head', which is no Linear.*; the linear layers are down_proj, "),
        ("llama", (".*q_proj",), r"'\.\*q_proj', which is no Linear.*regular expression as a string"),
        ("llama", ("q_proj", "[kv]_proj"), "regular expression as a string"),
        ("llama", "q_proj(", r"'q_proj\(', which PEFT refuses: missing \)"),
        ("llama", "nothing", "'nothing', which PEFT refuses: .*not found.*; the linear layers are down_proj, "),
        ("llama", "", "'', which PEFT refuses"),
        ("llama", ("",), "'', which is no Linear"),
        ("llama", "dummy-target-modules", "PEFT would train nothing"),
    ],
)
def test_targets_that_cannot_be_trained_here_are_named(kind: str, wanted: Any, said: str) -> None:
    model = a_model(kind)
    with pytest.raises(SettingsError, match=said):
        target_names(model, linears_of(model), wanted)


@pytest.mark.parametrize(
    ("field", "value"),
    [("use_rslora", True), ("rank_pattern", {"q_proj": 4}), ("bias", "all"), ("init_lora_weights", "pissa"), ("r", 8)],
)
def test_a_setting_of_peft_that_a_request_does_not_have_is_refused_by_name(field: str, value: object) -> None:
    fields = {"train_sequences": ["a"]}
    with pytest.raises(ProtocolError, match=rf"field '{field}' is .*leave it out") as refused:
        protocol.parse_request(fields | {field: value})
    assert refused.value.field == field
    defaults = LoraConfig().to_dict() | {"r": None, "peft_type": "LORA"}
    assert protocol.parse_request(fields | {name: defaults[name] for name in protocol.PEFT_FIELDS})


def test_every_field_of_peft_is_known_to_requests_and_to_files() -> None:
    """A later version of PEFT may have more."""
    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    harmless = {"task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"}
    harmless |= {"fan_in_fan_out", "megatron_core", "qalora_group_size", "runtime_config"}
    assert fields - harmless == {"lora_alpha", "lora_dropout", "target_modules", *protocol.PEFT_FIELDS}
    assert {*SCALE_FIELDS, *TARGET_FIELDS} <= fields


@pytest.mark.parametrize("targets", ["all-linear", r".*\.(q|v)_proj", ["q_proj"], []])
def test_target_modules_are_a_list_or_one_string(targets: list[str] | str) -> None:
    request = protocol.parse_request({"train_sequences": ["a"], "target_modules": targets})
    assert isinstance(request, protocol.TTTRequest) and request.target_modules == targets
    assert train_job(request, 8).lora.target_modules == (targets if isinstance(targets, str) else tuple(targets))


@pytest.mark.parametrize("targets", [[1], 3, {"q_proj": 1}, [["q_proj"]]])
def test_other_target_modules_are_refused(targets: object) -> None:
    with pytest.raises(ProtocolError, match="field 'target_modules' is .*: give a list of names, or one string"):
        protocol.parse_request({"train_sequences": ["a"], "target_modules": targets})


def test_the_scale_is_not_rounded_to_bfloat16() -> None:
    """190 · 64/48 = 253.3, in bfloat16 253. With the scale 64/48 in bfloat16, 1.3359, it would be 253.8, so 254."""
    linear = torch.nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    torch.nn.init.zeros_(linear.weight)
    flat = torch.zeros(96)
    flat[0], flat[48] = 190, 1
    layout = make_layout({"it": linear}, ["it"], rank=48)
    adapter = Adapter(layout, LoraSettings(rank=48, alpha=64), flat, torch.bfloat16)
    before = PLAN.set(Plan([(1, [adapter])]))
    try:
        y = BranchedLinear(linear, "it")(torch.ones(1, 1, 1, dtype=torch.bfloat16))
    finally:
        PLAN.reset(before)
    assert y.item() == 253


@pytest.mark.parametrize(
    "pattern", [r"([a-z0-9_]+\.?)+!", r"(model|[a-z]|l|s|\.|.)+!", r"((?:.|.)+)+\1(.+)+\2!", r"(.+)+(.+)+(.+)+\1\2\3!"]
)
def test_a_regular_expression_that_could_match_for_ever_is_refused_soon(pattern: str) -> None:
    model = a_model("llama")
    with pytest.raises(SettingsError, match=r"not found|takes more than a second"):
        target_names(model, linears_of(model), pattern)
