"""Tiny tokenizers of the families that people bring, with their chat templates."""

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

BYTES = [f"<0x{i:02X}>" for i in range(256)]
TURNS = "{% for m in messages %}"
LLAMA_3 = (
    "{{ bos_token }}"
    + TURNS
    + "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}" + TURNS + "<start_of_turn>{{ m.role }}\n{{ m.content }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
LLAMA_2 = "{{ bos_token }}" + TURNS + "[INST] {{ m.content }} [/INST]{% endfor %}"
CHATML = (
    TURNS + "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ZEPHYR = TURNS + "<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"


def byte_level(
    *words: str, bos: str = "", eos: str = "<eos>", adds_eos: bool = False, trims: bool = False, **options: str
) -> PreTrainedTokenizerFast:
    """As of GPT-2, Qwen, Llama-3. words: tokens of several bytes; trims: offsets leave out white space"""
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words = tuple(split.pre_tokenize_str(word)[0][0] for word in words)
    vocab, merges = _merged(sorted(pre_tokenizers.ByteLevel.alphabet()), words)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer, tokenizer.decoder = split, decoders.ByteLevel()
    processor = [processors.ByteLevel(trim_offsets=trims)]
    return _whole(tokenizer, processor, bos=bos, eos=eos, adds_eos=adds_eos, **options)


def sentence_piece(
    *words: str, old: bool = False, bos: str = "<s>", eos: str = "</s>", adds_eos: bool = False, **options: str
) -> PreTrainedTokenizerFast:
    """As of Llama-2, Mistral, Gemma: BPE with bytes for unknown characters. words: with ▁ for a space; old: ▁ comes
    from a normaliser and not from Metaspace"""
    vocab, merges = _merged(["<unk>", *BYTES, "▁", "\n"], words)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if old:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return _whole(tokenizer, [], bos=bos, eos=eos, adds_eos=adds_eos, **options)


def unigram(*words: str) -> PreTrainedTokenizerFast:
    """As of T5: no BOS, EOS at the end; the normaliser changes lengths."""
    letters = [chr(i) for i in range(33, 127)]
    pieces = [("<unk>", 0.0), ("▁", -4.0), *((c, -6.0) for c in letters), *((word, -1.0) for word in words)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    steps = [normalizers.NFKC(), normalizers.Replace("\n", " "), normalizers.Replace("  ", " ")]
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    return _whole(tokenizer, [], bos="", eos="</s>", adds_eos=True)


def _merged(alphabet: list[str], words: tuple[str, ...]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges, so that each word becomes one token."""
    tokens, merges = [*alphabet, *"".join(words)], list[tuple[str, str]]()
    for word in words:
        starts = [word[:i] for i in range(1, len(word))]
        merges += [(start, word[len(start)]) for start in starts]
        tokens += [*starts, word]
    return {token: i for i, token in enumerate(dict.fromkeys(tokens))}, list(dict.fromkeys(merges))


def _whole(
    tokenizer: Tokenizer, steps: list, *, bos: str, eos: str, adds_eos: bool, template: str = ""
) -> PreTrainedTokenizerFast:  # type: ignore[type-arg]
    named = {"bos_token": bos, "eos_token": eos}
    named = {name: token for name, token in named.items() if token}
    tokenizer.add_special_tokens(list(named.values()))
    form = " ".join([*[bos] * bool(bos), "$A", *[eos] * adds_eos])
    ids = [(token, tokenizer.token_to_id(token)) for token in named.values()]
    steps = [*steps, processors.TemplateProcessing(single=form, special_tokens=ids)]
    tokenizer.post_processor = processors.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template or None, **named)


FAMILIES = {
    "llama-3": (byte_level(bos="<|begin_of_text|>", eos="<|eot_id|>", template=LLAMA_3), 1),
    "gemma": (sentence_piece(bos="<bos>", eos="<eos>", template=GEMMA), 1),
    "llama-2": (sentence_piece(old=True, template=LLAMA_2), 1),
    "mistral": (sentence_piece(template=LLAMA_2), 1),
    "qwen": (byte_level(eos="<|im_end|>", template=CHATML), 0),
}  # and the number of BOS tokens in every text
