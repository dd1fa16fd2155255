"""Every prompt once, with its source: the published ones (SEAL, arXiv 2506.10943) and stronger later
families.

A self-edit prompt is data. To try another one, pass a SelfEditPrompt of your own, or give the path of a text
file as ``prompt_key``. A family is several prompts under one name (``spa`` is ``spa/key-concepts``,
``spa/mind-map``, …): the self-edits of a passage take turns with them. A prompt with a ``system`` message is
a chat, for instruct models; nothing here knows a model or its chat template.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from seal_nb.errors import SettingsError

DEFAULT_PROMPT_KEY = "implications"
OTHER_PROMPT = "other"  # stands for a key where a prompt is none of those here
FILE_SEPARATOR = "---"  # a line of its own, between the prompts of a family in one file
FIELDS = ("{title}", "{context}")

_RELEASE = "SEAL release, knowledge-incorporation: prompts of the published item files"
_RELEASE_INSTRUCT = "SEAL release, knowledge-incorporation: make_squad_data.py, instruct_model"
_SPA = "the seven strategies of SPA (Tang et al. 2026, arXiv 2603.22213), in words of our own"
_ACTIVE = (
    "Active Reading (Lin et al. 2025, arXiv 2508.09494), in words of our own; there the model first lists "
    "strategies for a document and then follows each in a call of its own, here it does both at once"
)

ChatMessage = Mapping[str, str]  # {"role": "user", "content": "…"}


@dataclass(frozen=True, kw_only=True)
class SelfEditPrompt:
    """A template with the fields ``{title}`` and ``{context}``, and where it comes from.

    ``system`` makes it a chat: a system message, then the filled template as the user's.
    """

    key: str
    template: str
    source: str
    system: str = ""

    def __post_init__(self) -> None:
        if "{context}" not in self.template:
            raise SettingsError(f"prompt {self.key!r} has no {{context}}: the passage would not be in it")

    def text(self, *, title: str, context: str) -> str:
        """The template filled in; braces of a passage, and any others of the template, are text."""
        values = dict(zip(FIELDS, (title, context), strict=True))
        return re.sub("|".join(map(re.escape, FIELDS)), lambda match: values[match.group()], self.template)

    def asked(self, *, title: str, context: str, chat: bool = False) -> str | tuple[ChatMessage, ...]:
        """What an engine is given: the text, or a chat where ``chat`` or the prompt itself wants one."""
        user = {"role": "user", "content": self.text(title=title, context=context)}
        if self.system:
            return ({"role": "system", "content": self.system}, user)
        return (user,) if chat else user["content"]


def _implications(key: str, a_list: str) -> SelfEditPrompt:
    template = (
        f"Let's read the following passage and produce {a_list} of implications derived directly or "
        "indirectly from the content.\n\nPassage:\n{title}\n{context}\n\nImplications:\n"
    )
    return SelfEditPrompt(key=key, template=template, source=_RELEASE)


def _study(key: str, source: str, task: str, lead: str) -> SelfEditPrompt:
    """One strategy: what to do, the passage, and the first words of what is to be written."""
    template = f"{task}\n\nPassage:\n{{title}}\n{{context}}\n\n{lead}\n"
    return SelfEditPrompt(key=key, template=template, source=source)


_PUBLISHED = (
    _implications("implications", "a list"),
    _implications("implications-long", "a long list"),
    _implications("implications-very-long", "a very long list"),
    SelfEditPrompt(
        key="rewrite",
        template=(
            "Let's read the following passage and rewrite it in a few different ways, each one separated "
            "by a newline.\n\nPassage:\n{title}\n{context}\n\nRewritten passages:\n"
        ),
        source=_RELEASE,
    ),
    SelfEditPrompt(
        key="self-qa",
        template=(
            "Let's read the following passage and rewrite it in a question-answer format.\n\n"
            "Passage:\n{title}\n{context}\n\nQuestion 1: "
        ),
        source=_RELEASE,
    ),
    SelfEditPrompt(
        key="implications-instruct",
        # The blank before the end of the system message is published.
        system=(
            "You are an assistant tasked with analyzing the provided passage and producing a list of "
            "implications derived directly or indirectly from the content. "
        ),
        template="{title}\n{context}",
        source=_RELEASE_INSTRUCT,
    ),
)

_SEVEN_STRATEGIES = (
    _study(
        "spa/key-concepts",
        _SPA,
        "Pick out the people, places, things and ideas that the following passage is about. Explain each of"
        " them in a few full sentences that name it and give every fact the passage states about it.",
        "The key concepts, one after another:",
    ),
    _study(
        "spa/mind-map",
        _SPA,
        "Turn the following passage into a mind map in text: the subject first, then its branches, and "
        "under each branch the names, numbers and dates that belong to it, every line a statement that "
        "makes sense alone.",
        "Mind map:",
    ),
    _study(
        "spa/implications",
        _SPA,
        "Say what follows from the following passage. For each thing it states, write down what must also "
        "be true, what it led to and what would have been otherwise without it, and repeat the fact it "
        "rests on.",
        "What follows:",
    ),
    _study(
        "spa/critical-questions",
        _SPA,
        "Write questions about the following passage that make a reader compare, explain and judge rather "
        "than look something up, and answer each one in full sentences with the facts that the answer "
        "needs.",
        "Questions with their answers:",
    ),
    _study(
        "spa/case-study",
        _SPA,
        "Tell a short case in which somebody needs what the following passage says: who they are, what they"
        " have to decide, which facts of the passage they use, and how it ends.",
        "The case:",
    ),
    _study(
        "spa/discussion",
        _SPA,
        "Two people who have read the following passage talk about it. They ask each other what it says, "
        "put each other right where one is mistaken, and mention all of its facts by name on the way.",
        "Their conversation:",
    ),
    _study(
        "spa/teacher",
        _SPA,
        "You teach a class that has never heard of the subject of the following passage. Explain it step by"
        " step in your own words, give each fact with the reason why it matters, and sum up at the end.",
        "The lesson:",
    ),
)

_ACTIVE_READING = (
    _study(
        "active-reading/own-strategy",
        _ACTIVE,
        "You want to know the following passage by heart in a year. First choose a way of studying that "
        "suits just this passage, and name it in one line. Then carry it out in writing, with all of the "
        "facts.",
        "My way of studying it:",
    ),
    _study(
        "active-reading/self-test",
        _ACTIVE,
        "You will be examined on the following passage without having it before you. Think of what the "
        "examiner may ask about each of its facts, in more than one wording, and write every question with "
        "its answer.",
        "What may be asked, and what I answer:",
    ),
    _study(
        "active-reading/associations",
        _ACTIVE,
        "Make the following passage stick: tie each of its facts to something you know already, to another "
        "fact of the passage, or to a picture or a rhyme, and state the fact itself again each time.",
        "How I remember it:",
    ),
)

SELF_EDIT_PROMPTS: dict[str, SelfEditPrompt] = {
    prompt.key: prompt for prompt in (*_PUBLISHED, *_SEVEN_STRATEGIES, *_ACTIVE_READING)
}
_ONE_TEXT = tuple(prompt for prompt in SELF_EDIT_PROMPTS.values() if not prompt.system)

_ANSWER = "Let's answer a question directly and concisely.\nQuestion: {question}\nAnswer:\n"

_GRADING = (
    "You are a grading assistant. Your job is to determine whether a student's answer correctly answers the "
    "question based solely on the provided gold answer. Do not use any outside knowledge. The student answer "
    "can include additional information, but it must at least fully convey the gold answer and must not "
    "contradict it. Ignore style, phrasing, or extra details that do not affect correctness. Respond ONLY "
    "with 'yes' or 'no'.\n\n"
    "Question: {question}\nGold answer: {gold}\nStudent answer: {answer}\n"
    "Is the student answer correct based solely on the gold answer? Respond 'yes' or 'no'."
)


def find_prompts(key: str) -> tuple[SelfEditPrompt, ...]:
    """The prompt of a key, all of a family, or those in a text file whose path ``key`` is.

    Raises: SettingsError for what is none of these.
    """
    if key in SELF_EDIT_PROMPTS:
        return (SELF_EDIT_PROMPTS[key],)
    if family := [prompt for name, prompt in SELF_EDIT_PROMPTS.items() if name.startswith(f"{key}/")]:
        return tuple(family)
    if Path(key).is_file():
        return read_prompts(Path(key))
    raise SettingsError(
        f"unknown prompt_key {key!r}; known are {', '.join(prompt_names())}, or give the path of a text file "
        "with {title} and {context}"
    )


def prompt_names() -> list[str]:
    """What ``find_prompts`` knows: keys, a family by its name."""
    return list(dict.fromkeys(key.split("/")[0] for key in SELF_EDIT_PROMPTS))


def read_prompts(path: Path) -> tuple[SelfEditPrompt, ...]:
    """The prompts of a text file, as they stand there; parts between lines of ``---`` are a family."""
    parts = re.split(rf"^{FILE_SEPARATOR}\n", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    keys = [path.stem] if len(parts) == 1 else [f"{path.stem}/{number}" for number in range(1, len(parts) + 1)]
    return tuple(
        SelfEditPrompt(key=key, template=part, source=f"file {path.name}")
        for key, part in zip(keys, parts, strict=True)
    )


def self_edit_prompt(key: str, *, title: str, context: str) -> str:
    """The text a model continues with a self-edit. Raises: SettingsError for a key that has not one text."""
    prompts = find_prompts(key)
    if len(prompts) > 1:
        names = ", ".join(prompt.key for prompt in prompts)
        raise SettingsError(f"prompt_key {key!r} is a family of {len(prompts)} prompts; name one: {names}")
    if prompts[0].system:
        raise SettingsError(f"prompt_key {key!r} is a chat; only 01_create_self_edits can put it to a model")
    return prompts[0].text(title=title, context=context)


def key_of_prompt(prompt: str, *, title: str, context: str) -> str:
    """Which template, filled with the passage, gives this prompt; "" where none does (a chat is no text)."""
    texts = ((one.key, one.text(title=title, context=context)) for one in _ONE_TEXT)
    return next((key for key, text in texts if text == prompt), "")


def recorded_key(prompt: str, keys: Sequence[str] = (), *, title: str, context: str) -> str:
    """What a passage's record says of its prompt: a key, the name of the family that ``keys`` are of,
    OTHER_PROMPT where no template gives the prompt; "" where none is recorded.
    """
    if keys:
        return keys[0].split("/")[0]
    return prompt and (key_of_prompt(prompt, title=title, context=context) or OTHER_PROMPT)


def result_key(prompt_key: str) -> str:
    """What results call the self-edits of a ``prompt_key`` parameter: a file's by its stem."""
    return Path(prompt_key).stem if Path(prompt_key).is_file() else prompt_key.split("/")[0]


def topic_question(title: str, question: str) -> str:
    """The question under its topic line, as published clients send it; never two such lines."""
    topic = f"Topic: {title}\n"
    return question if not title or question.startswith(topic) else topic + question


def answer_prompt(title: str, question: str) -> str:
    """The closed-book question as put to the adapted model and to the baseline."""
    return _ANSWER.format(question=topic_question(title, question))


def grading_prompt(title: str, question: str, gold: str, answer: str) -> str:
    """The yes/no question put to a judge model. An empty answer is never sent: it is wrong by definition."""
    return _GRADING.format(question=topic_question(title, question), gold=gold, answer=answer)
