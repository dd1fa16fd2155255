"""Every prompt once, as published (SEAL, arXiv 2506.10943, ``knowledge-incorporation``), with its source.

A self-edit prompt is data: to try another one, add it to SELF_EDIT_PROMPTS. Base models continue
these texts as they are; nothing here knows a chat template or a model.
"""

from dataclasses import dataclass

from seal_nb.errors import SettingsError

DEFAULT_PROMPT_KEY = "implications"

_RELEASE = "SEAL release, knowledge-incorporation: prompts of the published item files"


@dataclass(frozen=True, kw_only=True)
class SelfEditPrompt:
    """A template with the fields ``{title}`` and ``{context}``, and where it comes from."""

    key: str
    template: str
    source: str


def _implications(key: str, a_list: str) -> SelfEditPrompt:
    template = (
        f"Let's read the following passage and produce {a_list} of implications derived directly or "
        "indirectly from the content.\n\nPassage:\n{title}\n{context}\n\nImplications:\n"
    )
    return SelfEditPrompt(key=key, template=template, source=_RELEASE)


SELF_EDIT_PROMPTS: dict[str, SelfEditPrompt] = {
    prompt.key: prompt
    for prompt in (
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
    )
}

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


def self_edit_prompt(key: str, *, title: str, context: str) -> str:
    """The text a model continues with a self-edit. Raises: SettingsError for an unknown key."""
    if key not in SELF_EDIT_PROMPTS:
        raise SettingsError(f"unknown prompt_key {key!r}; known are {', '.join(SELF_EDIT_PROMPTS)}")
    return SELF_EDIT_PROMPTS[key].template.format(title=title, context=context)


def key_of_prompt(prompt: str, *, title: str, context: str) -> str:
    """Which template, filled with the passage, gives this prompt; "" where none does."""
    filled = {key: self_edit_prompt(key, title=title, context=context) for key in SELF_EDIT_PROMPTS}
    return next((key for key, text in filled.items() if text == prompt), "")


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
