"""What is asked of a base, as rows for its decoder: closed-book questions, and prompts for free text."""

from collections.abc import Hashable, Iterator

from seal_nb.errors import SettingsError
from seal_nb.evaluation import Question
from seal_nb.prompts import answer_prompt
from seal_nb.protocol import GenerateRequest, TTTRequest
from seal_nb.ttt.base import FrozenBase
from seal_nb.ttt.decode import DecodeRow
from seal_nb.ttt.lora import Adapter


def questions(base: FrozenBase, request: TTTRequest, stack: tuple[str, ...]) -> list[Question]:
    """Those of a request; ``stack``: identities of the adapters beneath the one under training."""
    prompts = [_worded(base, answer_prompt(q.title, q.question), request) for q in request.eval_questions]
    return [Question(stack, prompt, request.max_new_tokens, not request.chat) for prompt in prompts]


def _worded(base: FrozenBase, prompt: str, request: TTTRequest) -> str:
    if not request.chat:
        return prompt
    messages = [{"role": "user", "content": prompt}]
    return base.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def prompt_ids(base: FrozenBase, question: Question) -> list[int]:
    return base.encode(question.prompt, special_tokens=question.special_tokens)


def answer_row(
    base: FrozenBase, key: Hashable, question: Question, adapters: tuple[Adapter, ...]
) -> DecodeRow:
    """Raises SettingsError where the prompt leaves no room in the model's context."""
    ids = prompt_ids(base, question)
    room = _room(base, len(ids), question.max_new_tokens)
    return DecodeRow(key=key, token_ids=ids, adapters=adapters, max_new_tokens=room)


def text_rows(base: FrozenBase, request: GenerateRequest, stack: tuple[Adapter, ...]) -> Iterator[DecodeRow]:
    """One for each prompt; its key is (request id, place). Raises as `answer_row`."""
    for i, prompt in enumerate(request.prompts):
        ids = base.encode(prompt)
        yield DecodeRow(
            key=(str(request.request_id), i),
            token_ids=ids,
            adapters=stack,
            max_new_tokens=_room(base, len(ids), request.max_tokens),
            temperature=request.temperature,
            top_p=request.top_p,
            seed=(int(request.seed or 0) + i) % 2**63,
            stop=tuple(request.stop),
        )


def _room(base: FrozenBase, n_prompt: int, max_tokens: int) -> int:
    """New tokens that fit into the model's context after the prompt."""
    context = base.model.config.max_position_embeddings
    if n_prompt >= context:
        raise SettingsError(f"a prompt has {n_prompt} tokens and the model's context {context}; shorten it")
    return min(max_tokens, context - n_prompt)
