"""Prompts: the published ones (SEAL, arXiv 2506.10943) and later families.

`data/prompts.json` has all of them with their sources. A family is several prompts under one name (``spa`` is
``spa/key-concepts``, ``spa/mind-map``, …), which the self-edits of a passage use in turn."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from seal_nb.errors import SettingsError
from seal_nb.storage import data_file, read_json

DEFAULT_PROMPT_KEY = "implications"
_GRADING_PROMPT = data_file("grading_prompt.txt").read_text()
OTHER_PROMPT = "other"  # the recorded key of an unknown prompt

ChatMessage = Mapping[str, str]  # {"role": "user", "content": "…"}


@dataclass(frozen=True, kw_only=True)
class SelfEditPrompt:
    """A prompt that asks for a self-edit."""

    key: str  # its name in files and results
    template: str  # with the fields ``{title}`` and ``{context}``; other braces are text
    source: str  # where it comes from
    system: str = ""  # a system message; the filled template is then the user's message of a chat

    def __post_init__(self) -> None:
        if "{context}" not in self.template:
            raise SettingsError(f"prompt {self.key!r} has no {{context}}: the passage would not be in it")

    def text(self, *, title: str, context: str) -> str:
        """The filled template. Braces in a passage are text."""
        values = {"{title}": title, "{context}": context}
        return re.sub(r"\{(?:title|context)\}", lambda field: values[field[0]], self.template)

    def asked(self, *, title: str, context: str, chat: bool = False) -> str | tuple[ChatMessage, ...]:
        """The prompt for an engine: a text, or a chat if ``chat`` is true or the prompt has a system message."""
        user = {"role": "user", "content": self.text(title=title, context=context)}
        if self.system:
            return ({"role": "system", "content": self.system}, user)
        return (user,) if chat else user["content"]


SELF_EDIT_PROMPTS: dict[str, SelfEditPrompt] = {
    entry["key"]: SelfEditPrompt(**entry) for entry in read_json(data_file("prompts.json"))
}


def find_prompts(key: str) -> tuple[SelfEditPrompt, ...]:
    """The prompts of a key ("implications"), a family ("spa"), or a text file, in which lines of ``---`` separate
    prompts. Raises: SettingsError for any other key, and for a prompt without ``{context}``."""
    if key in SELF_EDIT_PROMPTS:
        return (SELF_EDIT_PROMPTS[key],)
    if family := [prompt for name, prompt in SELF_EDIT_PROMPTS.items() if name.startswith(f"{key}/")]:
        return tuple(family)
    if (path := Path(key)).is_file():
        parts = re.split(r"^---\n", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
        names = [path.stem] if len(parts) == 1 else [f"{path.stem}/{number}" for number in range(1, len(parts) + 1)]
        named = zip(names, parts, strict=True)
        return tuple(SelfEditPrompt(key=name, template=part, source=f"file {path.name}") for name, part in named)
    own = "the path of a text file with {title} and {context}"
    raise SettingsError(f"unknown prompt_key {key!r}; known are {', '.join(prompt_names())}, or give {own}")


def prompt_names() -> list[str]:
    """The keys that ``find_prompts`` knows, and the names of families."""
    return list(dict.fromkeys(key.split("/")[0] for key in SELF_EDIT_PROMPTS))


def self_edit_prompt(key: str, *, title: str, context: str) -> str:
    """The text that a model completes with a self-edit.

    Args:
        key: of a published prompt (`SELF_EDIT_PROMPTS`), such as "implications", or the path of a text file.
        title: of the passage.
        context: the passage.

    Returns:
        The prompt.

    Raises:
        SettingsError: for an unknown key, a family of prompts, and a prompt that is a chat."""
    prompts = find_prompts(key)
    if len(prompts) > 1:
        names = ", ".join(prompt.key for prompt in prompts)
        raise SettingsError(f"prompt_key {key!r} is a family of {len(prompts)} prompts; name one: {names}")
    if prompts[0].system:
        raise SettingsError(f"prompt_key {key!r} is a chat; only 01_create_self_edits can use it")
    return prompts[0].text(title=title, context=context)


def recorded_key(prompt: str, keys: Sequence[str] = (), *, title: str, context: str) -> str:
    """The prompt key of a passage with this prompt: the family of ``keys``, the key of the template that gives this
    prompt, or OTHER_PROMPT. It is "" if the passage has no prompt."""
    if keys:
        return keys[0].split("/")[0]
    if not prompt:
        return ""
    known = (one for one in SELF_EDIT_PROMPTS.values() if not one.system)
    return next((one.key for one in known if one.text(title=title, context=context) == prompt), OTHER_PROMPT)


def result_key(prompt_key: str) -> str:
    """The name in results of a ``prompt_key`` parameter: the stem of a file, the family of a key."""
    return Path(prompt_key).stem if Path(prompt_key).is_file() else prompt_key.split("/")[0]


AnswerStyle = Literal["published", "short"]
ANSWER_STYLES = {"published": "", "short": " Answer in a few words."}  # what follows the question


def topic_question(title: str, question: str) -> str:
    """The question after its topic line, as published clients send it; an existing line is kept."""
    topic = f"Topic: {title}\n"
    return question if not title or question.startswith(topic) else topic + question


def answer_prompt(title: str, question: str) -> str:
    """The closed-book question for the adapted model and for the baseline."""
    return f"Let's answer a question directly and concisely.\nQuestion: {topic_question(title, question)}\nAnswer:\n"


def grading_prompt(title: str, question: str, gold: str, answer: str) -> str:
    """The yes/no question for a judge model. An empty answer is never sent, because it is wrong by definition."""
    asked = topic_question(title, question)
    return _GRADING_PROMPT.format(question=asked, gold=gold, answer=answer)
