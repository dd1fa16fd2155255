"""Texts become tokens the same way everywhere: one BOS, an end mask that goes by characters, rows that the model can
run."""

import re
import sys
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import (
    BloomConfig,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    PreTrainedTokenizerFast,
)

from seal_nb import models
from seal_nb.engines.base import Incomplete, Sampling
from seal_nb.engines.local import LocalEngine
from seal_nb.engines.vllm import VllmEngine
from seal_nb.errors import SettingsError
from seal_nb.grading.choose import make_grader
from seal_nb.models import context_of
from seal_nb.protocol import ErrorReply, GenerateRequest, TTTReply, error_reply
from seal_nb.server.client import InnerLoopSettings
from seal_nb.server.loop import InnerLoop, pieces
from seal_nb.sft import train as sft
from seal_nb.ttt.base import FrozenBase
from seal_nb.ttt.lora import TrainSettings, make_row
from tests.test_engines_vllm import noted, server_of
from tests.test_inner_loop import request, run
from tests.ttt.tiny import SIZES, AsciiTokenizer, tiny_tokenizer
from tests.ttt.tokenizers import FAMILIES, ZEPHYR, byte_level, sentence_piece, unigram

CHAT = ({"role": "user", "content": "Where?"},)


def with_loss(tokenizer: PreTrainedTokenizerFast, text: str, mask: str, **changed: int) -> list[str]:
    """The tokens of a train sequence that carry loss."""
    row = make_row(tokenizer, text, TrainSettings(end_mask_substring=mask, **changed))
    return tokenizer.convert_ids_to_tokens(row.targets.tolist())


@pytest.mark.parametrize(
    ("tokenizer", "text", "mask", "found"),
    [
        (sentence_piece(":\n", "▁ok"), "Answer:\n ok", "Answer:\n", ["▁ok"]),
        (sentence_piece(":\n", "▁ok", old=True), "Answer:\n ok", "Answer:\n", ["▁ok"]),
        (sentence_piece(":\n", "▁ok"), "Answer:\n ok", ":", ["▁ok"]),  # the newline's token begins in the mask
        (sentence_piece("▁ok"), "A: ok ok", "A:", ["▁ok", "▁ok"]),
        (sentence_piece("▁ok"), "is 🜚 ok", "🜚", ["▁ok"]),  # four tokens of one character
        (sentence_piece("▁ok"), "🜚🜚 ok", "🜚", ["<0xF0>", "<0x9F>", "<0x9C>", "<0x9A>", "▁ok"]),
        (sentence_piece("ok", adds_eos=True), "A:ok", "ok", ["</s>"]),  # added behind the mask
        (sentence_piece("▁ok"), "<s>A: ok", "<s>A:", ["▁ok"]),
        (byte_level(":\n", "\nok", " ok"), "A:\nok ok", ":", ["o", "k", "Ġok"]),
        (byte_level(" ok", trims=True), "A: ok", "A:", ["Ġok"]),
        (byte_level(" ok", trims=True), "A: ok no", "A: ", ["Ġ", "n", "o"]),  # its span does not have the space
        (byte_level(":\n", " ok", trims=True), "A:\n ok", "A:\n", ["Ġok"]),
        (byte_level(adds_eos=True, trims=True), "A: ", "A: ", ["<eos>"]),
        (unigram("▁ok"), "ﬁx ½ ok", "½", ["▁ok", "</s>"]),  # one character, three tokens
        (unigram("▁ok"), "A:\n\nok", "A:", ["▁ok", "</s>"]),  # two characters, one space
        (unigram("▁ok"), "A:  ", "A:  ", ["</s>"]),
    ],
)  # fmt: skip
def test_tokens_after_the_one_with_the_last_character_of_the_mask_carry_loss(
    tokenizer: PreTrainedTokenizerFast, text: str, mask: str, found: list[str]
) -> None:
    assert with_loss(tokenizer, text, mask) == found


@settings(max_examples=200, deadline=None)
@given(st.text("a \né🜚", max_size=12).map("b{}".format), st.text("a \né", min_size=1, max_size=3), st.booleans())
@example("baa  a", "a ", True)
def test_the_mask_ends_where_the_bytes_of_the_tokens_say(text: str, mask: str, trims: bool) -> None:
    tokenizer = TRIMMING if trims else BYTE_LEVEL
    row = make_row(tokenizer, text, TrainSettings(end_mask_substring=mask))
    # A byte is one character of a byte-level token.
    ends = list(accumulate(map(len, tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"]))))
    n_bytes = len((text[: text.index(mask)] + mask).encode()) if mask in text else 0
    assert row.n_masked == (sum(end < n_bytes for end in ends) + 1 if n_bytes else 0)


BYTE_LEVEL, TRIMMING = (byte_level("a ", " a", "\n\n", "a\n", "  ", " é", trims=trims) for trims in (False, True))


def test_a_mask_that_is_cut_off_does_not_count() -> None:
    assert len(with_loss(BYTE_LEVEL, "bcdefg", "fg", max_seq_length=5)) == 4
    assert len(with_loss(BYTE_LEVEL, "bcdefg", "de", max_seq_length=5)) == 1


def test_a_mask_needs_a_tokenizer_that_knows_spans() -> None:
    slow = AsciiTokenizer()
    slow.is_fast = False
    assert len(make_row(slow, "abc", TrainSettings())) == 2
    with pytest.raises(SettingsError, match="no end_mask_substring"):
        make_row(slow, "abc", TrainSettings(end_mask_substring="a"))


def loop_of(tokenizer: PreTrainedTokenizerFast, folder: Path, **sizes: int) -> InnerLoop:
    torch.manual_seed(0)
    base = FrozenBase(LlamaForCausalLM(LlamaConfig(**SIZES | {"vocab_size": len(tokenizer)} | sizes)), tokenizer)
    return inner_loop(base, folder)


def inner_loop(base: FrozenBase, folder: Path) -> InnerLoop:
    settings = InnerLoopSettings(model="tiny", adapters_dir=folder, n_slots=2)
    return InnerLoop(base, make_grader("local"), settings, model_id="tiny")


def test_a_mask_in_no_sequence_is_an_error_and_in_one_leaves_the_others_their_loss(tmp_path: Path) -> None:
    loop = loop_of(tiny_tokenizer(), tmp_path, vocab_size=257)
    of = {"train_sequences": ["Q: a\nA: b", "plain"], "finetune_epochs": 1}
    replies = run(loop, request("none", **of, end_mask_substring="A:\n"), request("one", **of, end_mask_substring="A:"))
    assert isinstance(replies["none"], ErrorReply)
    assert "end_mask_substring 'A:\\n' is in none of the train sequences" in replies["none"].error
    assert isinstance(replies["one"], TTTReply)
    masked = make_row(loop.base.tokenizer, "plain", TrainSettings(end_mask_substring="A:"))
    assert (masked.n_masked, len(masked.targets)) == (0, 4)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_text_has_one_bos_or_none_if_the_family_has_none(family: str, tmp_path: Path) -> None:
    tokenizer, n_bos = FAMILIES[family]
    loop = loop_of(tokenizer, tmp_path)
    rendered = str(tokenizer.apply_chat_template(list(CHAT), tokenize=False, add_generation_prompt=True))
    passed: list[list[int]] = []
    run_pass = loop.base.hidden

    def noting(rows, *rest, **options):  # type: ignore[no-untyped-def]
        passed.extend(list(row) for row in rows)
        return run_pass(rows, *rest, **options)

    loop.base.hidden = noting  # type: ignore[method-assign]
    texts = ["A fact.", rendered]
    scored = {"return_token_logprobs": True, "soft_scores": True}
    run(
        loop,
        GenerateRequest(prompts=texts, request_id="g", seed=1, max_tokens=2),
        request("plain", train_sequences=texts, **scored),
        request("chat", skip_training=True, chat=True),
    )
    LocalEngine(loop.base, model_id="tiny").generate([*texts, CHAT], Sampling(max_tokens=2), seeds=[0] * 3)
    rows = [make_row(tokenizer, text, TrainSettings()).token_ids.tolist() for text in texts]
    sft_rows = [*({"prompt": text, "completion": "c"} for text in texts), *({"text": text} for text in texts)]
    rows += [sft.example(tokenizer, row, 2048)["input_ids"] for row in sft_rows]
    rows += [pieces(tokenizer, text)[0] for text in texts]
    assert (
        len(passed) > 12
        and tokenizer.apply_chat_template(list(CHAT), add_generation_prompt=True)["input_ids"] in passed
    )
    for ids in rows + passed:
        assert ids.count(tokenizer.bos_token_id) == n_bos
        assert not n_bos or ids[0] == tokenizer.bos_token_id


def test_a_template_without_bos_decides_for_its_chats(tmp_path: Path) -> None:
    loop = loop_of(sentence_piece(template=ZEPHYR), tmp_path)
    bos = loop.base.tokenizer.bos_token_id
    loop.submit(request("a", chat=True, skip_training=True))
    loop.submit(request("b", skip_training=True))
    counts = [row.token_ids.count(bos) for row in loop.decoder.waiting]
    assert counts == [0, 0, 1, 1]


def test_vllm_adds_no_second_bos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_VLLM_NOTES", str(tmp_path / "notes.jsonl"))
    prompts = ["Where?", "<s>[INST] Where? [/INST]", "<sup>1</sup>"]
    with server_of(tmp_path) as server:
        VllmEngine.of(server, max_parallel=1).generate(prompts, Sampling(max_tokens=4), seeds=[0] * 3)
    bodies = [one["body"] for one in noted(tmp_path / "notes.jsonl") if one.get("path") == "/v1/completions"]
    assert {body["prompt"]: body.get("add_special_tokens", True) for body in bodies} == dict(
        zip(prompts, [True, False, True], strict=True)
    )


@pytest.fixture(scope="module")
def learned_positions() -> FrozenBase:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48, "num_hidden_layers": 2}
    config = OPTConfig(vocab_size=257, max_position_embeddings=96, num_attention_heads=4, eos_token_id=0, **sizes)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<new>"])  # the model has no embedding of it
    return FrozenBase(OPTForCausalLM(config), tokenizer)


def question(**fields: str) -> dict:
    return {"eval_questions": [{"title": "T", "question": "?", "answer": "a", **fields}]}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"train_sequences": ["short", "x" * 97]}, r"train_sequences\[1\] has 97 tokens.*context 96.*max_seq_length"),
        ({"train_sequences": ["x"], "padding_in_loss": True, "pad_to": 97}, "has 97 tokens.*pad_to"),
        ({"train_sequences": ["k<new>"]}, r"train_sequences\[0\] .*id 257, and the model has 257 emb"),
        (question(question="x" * 96), r"eval_questions\[0\] has \d+ tokens.*context 96"),
        (question(question="x" * 96) | {"skip_baseline": True}, r"eval_questions\[0\] has \d+ tokens.*context 96"),
        (question(answer="x" * 90) | {"soft_scores": True}, r"gold text 0 with its prompt has \d+ tokens.*context 96"),
        (question(answer="<new>") | {"soft_scores": True}, r"gold text 0 .*the id"),
        (question(context="x" * 96) | {"return_token_logprobs": True}, "passage text 0 has 98 tokens.*context 96"),
    ],
)  # fmt: skip
def test_a_row_that_the_model_cannot_run_is_an_error_of_its_request(
    learned_positions: FrozenBase, tmp_path: Path, fields: dict, said: str
) -> None:
    loop = inner_loop(learned_positions, tmp_path)
    of = {"eval_questions": [], "lora_rank": 2, "target_modules": ["q_proj"]}
    loop.submit(request("neighbour", **of))
    try:
        loop.submit(request("it", **of | fields))
    except SettingsError as error:  # the server's worker makes the reply
        loop.done.append(error_reply(error, request_id="it"))
    replies = run(loop)
    assert isinstance(replies["it"], ErrorReply) and re.search(said, replies["it"].error)
    assert isinstance(replies["neighbour"], TTTReply)


def test_the_local_engine_refuses_one_prompt_and_ends_texts_at_the_context(learned_positions: FrozenBase) -> None:
    engine = LocalEngine(learned_positions, model_id="tiny")
    with pytest.raises(Incomplete, match=r"3 of 4 texts .*has 96 tokens.*no token.*the id 257") as caught:
        engine.generate(["x" * 96, "", "<new>", "x" * 93], Sampling(max_tokens=50), seeds=[0] * 4)
    assert caught.value.completions[3].n_tokens <= 3


DYNAMIC = {"rope_theta": 10000.0, "factor": 2.0, "type": "dynamic"}
YARN = {"rope_theta": 10000.0, "factor": 2.0, "rope_type": "yarn", "original_max_position_embeddings": 32}
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48, "rope_theta": 10000.0}


@pytest.mark.parametrize(
    ("config", "context"),
    [
        (LlamaConfig(max_position_embeddings=64), 64),
        (LlamaConfig(max_position_embeddings=64, rope_scaling=DYNAMIC), 64),
        (LlamaConfig(max_position_embeddings=64, rope_parameters=YARN), 64),
        (Phi3Config(max_position_embeddings=64, original_max_position_embeddings=32, rope_parameters=LONG), 32),
        (GPT2Config(n_positions=64), 64),
        (BloomConfig(), sys.maxsize),
    ],
)  # fmt: skip
def test_the_context_ends_where_positions_would_depend_on_the_longest_row(config: object, context: int) -> None:
    assert context_of(config) == context


def test_sft_needs_no_pad_token_with_an_embedding_but_an_eos_for_completions() -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer().backend_tokenizer, pad_token="[PAD]")
    assert tokenizer.pad_token_id == 257
    rows = [sft.example(tokenizer, {"text": text}, 2048) for text in ("ab", "abc")]
    batch = sft.collator(tokenizer)(rows)
    assert int(batch["input_ids"].max()) < 257 and batch["labels"].tolist()[0][2:] == [sft.IGNORED]
    with pytest.raises(SettingsError, match="no EOS token"):
        sft.example(tokenizer, {"prompt": "a", "completion": "b"}, 2048)


def test_a_panic_of_the_tokenizer_is_an_ordinary_error() -> None:
    class Panic(BaseException):
        """As Rust code raises it."""

    def panics(*_: object, **__: object) -> object:
        raise Panic("index out of range")

    def interrupted() -> object:
        raise KeyboardInterrupt

    with pytest.raises(RuntimeError, match="the tokenizer failed: index out of range"):
        models._without_panic(panics, "a text")
    with pytest.raises(KeyboardInterrupt):
        models._without_panic(interrupted)
