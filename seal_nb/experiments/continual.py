"""Continual self-edits: passages are edited into the weights one after the other (`continual`).

SEAL, arXiv 2506.10943: the model as it is now writes a self-edit of the next passage, an adapter is trained on it, and
all passages so far are asked again. `edit_and_merge` makes a model folder and a server for each edit, as published.
Stacked adapters give the same outputs without copies of the model, and all sequences advance together. With retrieval,
BM25 (Robertson & Zaragoza 2009) chooses one adapter for a question, or the base where no word is shared."""

import random
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from bm25s import BM25
from matplotlib.figure import Figure

from seal_nb.errors import RunMismatch, SettingsError
from seal_nb.experiments.session import TTT, ask, ask_control, control_frame, identified, loop_request
from seal_nb.experiments.settings import Arm, Training, arm_passages, arm_texts, check_asked, check_limits, names_in
from seal_nb.experiments.single_passage import eval_questions
from seal_nb.passages import Passage, asked
from seal_nb.prompts import self_edit_prompt
from seal_nb.protocol import Answers, EvalQuestion, GenerateRequest, TTTReply, TTTRequest, build_reply
from seal_nb.results.collect import stacked
from seal_nb.results.continual import ContinualRun
from seal_nb.results.run import against_first
from seal_nb.self_edits import sequences_of_text
from seal_nb.settings import Settings, setting
from seal_nb.storage import Journal, content_id, derived_seed, is_own, runs_folder, write_record
from seal_nb.views import plots
from seal_nb.views.live import say

Strategy = Literal["stacked", "merged", "replay", "retrieval"]
STACKED = ("stacked", "replay")  # earlier edits lie below the next one, and also write its self-edit
ESTIMATED = ("mean", "low", "high", "p_value", "units")
K1, B = 1.5, 0.75  # the customary values of BM25


@dataclass(frozen=True, kw_only=True)
class ContinualSettings(Settings):
    """One strategy; defaults as published (one of its eight runs; run r has seed 42 + r)."""

    n_sequences: int = setting(8, least=1)
    n_datapoints: int = setting(8, least=1)  # passages of a sequence
    strategy: Strategy = "stacked"  # how an edit is kept
    replay_passages: int = setting(0, least=0)  # earlier passages in each edit of "replay"; 0: all
    arm: Arm = "self_edits"  # written by the model with all edits so far; the other arms have given texts
    prompt_key: str = "implications"
    max_tokens: int = 8192  # of one self-edit
    temperature: float = 1.0
    top_p: float = 0.95
    split_newlines: bool = True
    seed: int = setting(42, least=0)
    training: Training = field(default_factory=Training)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.arm == "self_edits":
            how = {"max_tokens": self.max_tokens, "temperature": self.temperature, "top_p": self.top_p}
            check_limits(GenerateRequest, {"prompts": [self_edit_prompt(self.prompt_key, title="", context="")], **how})


@dataclass(kw_only=True)
class Edits:
    """A sequence of passages with its edits so far: adapter (`stack`) and self-edit (`texts`) of each. `requests` and
    `replies` begin with those of row 0, which asks the model without edits. `number`: of the sequence."""

    number: int = 0
    passages: Sequence[Passage]
    stack: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    requests: list[TTTRequest] = field(default_factory=list)
    replies: list[TTTReply] = field(default_factory=list)

    def add(self, text: str, request: TTTRequest, reply: TTTReply) -> None:
        self.stack.append(str(request.adapter_name))
        self.texts.append(text)
        self.requests.append(request)
        self.replies.append(reply)


class Continual(dict[str, ContinualRun]):
    """What `continual` returns: the runs by strategy, with tables and figures. `sequences[s]` are the passages of a
    sequence; `continual["stacked"].verdicts()[s][t][p]` are the verdicts on its passage p after t edits, and
    `.value["sequences"][s]["self_edits"]` its self-edits."""

    def __init__(
        self, sequences: Sequence[Sequence[Passage]], runs: Mapping[str, ContinualRun], control: Mapping[str, TTTReply]
    ) -> None:
        super().__init__(runs)
        self.sequences, self._control = sequences, control

    def estimates(self) -> pd.DataFrame:
        """Strategy, quantity, mean and 95 % interval; differences are paired over sequences."""
        found = [(name, *quantity) for name, run in self.items() for quantity in run.estimates().items()]
        rows = [(*names, *(getattr(one, column, None) for column in ESTIMATED)) for *names, one in found]
        return pd.DataFrame(rows, columns=["strategy", "quantity", "mean", "low", "high", "p", "over"])

    def strategies(self) -> pd.DataFrame:
        """Accuracy on all passages after the last edit, each strategy against the first."""
        frame = stacked(self.items()).drop(columns=["prompt", "file"], errors="ignore")
        against = {"against the first": against_first(list(self.values()))}
        return frame.rename(columns={"arm": "strategy"}).assign(**against)

    def unrelated(self) -> pd.DataFrame:
        """Accuracy on general questions before and after all edits; empty unless they were asked."""
        return control_frame(self._control)

    def plot_matrix(self, strategy: str) -> Figure:
        """The mean matrix as a heat map; cells of passages that were not asked are blank."""
        return plots.plot_continual_matrix(self[strategy].mean, n_sequences=len(self.sequences))

    def plot_curve(self, strategy: str) -> Figure:
        """Accuracy on all passages so far after each edit, and of the model that was never edited."""
        run = self[strategy]
        curve = run.curve()
        return plots.plot_continual_curve(run.seen(), curve["never_edited"], just_edited=curve["just_edited"])


def continual(
    ttt: TTT,
    passages: Sequence[Passage],
    *,
    strategies: str | Sequence[str] = "stacked",
    n_sequences: int = 8,
    n_datapoints: int = 8,
    arm: Arm = "self_edits",
    training: Training | None = None,
    replay_passages: int = 0,
    prompt_key: str = "implications",
    max_tokens: int = 8192,
    temperature: float = 1.0,
    top_p: float = 0.95,
    split_newlines: bool = True,
    check_unrelated: bool = False,
    seed: int = 42,
    folder: str | Path = "runs/continual",
    dataset: str = "",
    price_per_hour: float = 0.0,
) -> Continual:
    """Edit the passages of random sequences into the weights one by one; ask all passages so far after each edit.

    Args:
        ttt: the server; it keeps the adapters. The strategy merged starts others like it, so it must come from
            `ttt_server`.
        passages: the sequences are drawn from them.
        strategies: of stacked (frozen adapters on one base), merged (a model folder and a server for each edit, as
            published), replay (each edit also trains on the self-edits before it), retrieval (one adapter for each
            passage on the untouched model; BM25 chooses which one answers a question).
        n_sequences: sequences.
        n_datapoints: passages of a sequence.
        arm: self_edits (the model writes them, as published), hand_written or passage_only.
        training: settings of the adapters; the published ones unless given.
        replay_passages: with replay: earlier passages trained on again with each edit; 0: all.
        prompt_key: of the self-edits' prompt.
        max_tokens: tokens of one self-edit at most.
        temperature: of the self-edits.
        top_p: of the self-edits.
        split_newlines: each line of a self-edit is a train sequence (published: yes).
        check_unrelated: ask twenty general questions before and after all edits (stacked and replay).
        seed: draws the sequences and seeds all requests.
        folder: for summaries, their records and the journal; a second call asks only for what is missing.
        dataset: name of the data, for the summaries.
        price_per_hour: of the server; adds the cost to the line that says how much work it is.

    Returns:
        The runs by strategy. Their files (`summary_continual.json` …) are in `folder`.

    Raises:
        DataError: for a passage without what the arm needs, and for sequences without any question.
        SettingsError: for settings that do not fit, such as fewer passages than a sequence needs.
        RemoteError: when a request failed on the server.
        RoundTimeout: when the server went away and did not come back.

    Source: SEAL, arXiv 2506.10943, "catastrophic forgetting"."""
    given, folder = locals() | {"training": training or Training()}, runs_folder(folder)
    names = names_in("strategies", strategies)
    settings = {name: ContinualSettings.from_parameters(given, strategy=name) for name in names}
    first = next(iter(settings.values()))
    if "merged" in settings:
        ttt.known_settings()  # edits of "merged" are trained by servers like this one
    sequences = draw_sequences(passages, first)
    check_asked(list(dict.fromkeys(passage for sequence in sequences for passage in sequence)))
    for sequence in sequences if arm != "self_edits" else []:
        arm_passages(arm, sequence)  # refuses what the arm lacks, before a server starts
    edits_of: dict[str, list[Edits]] = {}
    with Journal(folder / "journal.jsonl") as journal:
        how: dict[str, Any] = {"skip_training": True, "seed": seed}
        row_zero = [loop_request(ttt.model_id, first.training, questions=asked_in(s, first), **how) for s in sequences]
        unedited = ask(ttt, row_zero, journal, what="never edited")
        for name, one in settings.items():
            edits_S = edits_of[name] = [
                Edits(number=number, passages=sequence, requests=[request], replies=[unedited.of(request)])
                for number, (sequence, request) in enumerate(zip(sequences, row_zero, strict=True))
            ]
            if name == "merged":
                for edits in edits_S:
                    edit_and_merge(ttt, edits, one, journal, folder=folder / name)
                continue
            for step in range(1, n_datapoints + 1):
                what, texts = f"{name}, edit {step}", next_texts(ttt, edits_S, one, journal)
                pairs = zip(edits_S, texts, strict=True)
                requests = [edit_request(edits, text, one, model_id=ttt.model_id) for edits, text in pairs]
                work = f"{what} of {n_datapoints}"
                collected = ask(ttt, requests, journal, what=what, work=work, price_per_hour=price_per_hour)
                for edits, text, request in zip(edits_S, texts, requests, strict=True):
                    edits.add(text, request, collected.of(request))
                if name == "retrieval":
                    answers_by_retrieval(ttt, edits_S, one, journal)
        control = {}
        if check_unrelated:
            stacked = [name for name in settings if name in STACKED]
            ends = {f"{name} {edits.number + 1}": edits.stack for name in stacked for edits in edits_of[name]}
            control = ask_control(ttt, journal, ends, first.training, seed=seed)
    runs = {}
    for name, one in settings.items():
        records, about = [sequence_record(edits) for edits in edits_of[name]], Path(dataset).name
        runs[name] = ContinualRun.of(records, dataset=about, base_model=ttt.model_id, strategy=name)
        suffix = "" if name == "stacked" else f"_{name}"  # stacked is the published way
        runs[name].path = runs[name].write(folder / f"summary_continual{suffix}.json")
        write_record(runs[name].path, stage="06_continual_self_edits", settings=asdict(one), seeds={"seed": seed})
    return Continual(sequences, runs, control)


def sequence_record(edits: Edits) -> dict[str, Any]:
    """What a summary keeps of one sequence: self-edits, answers and verdicts of every step, row 0 first."""
    return {
        "titles": [passage.title for passage in edits.passages],
        # Titles repeat, so grading again needs the questions.
        "questions": [[asked(one) for one in passage.questions] for passage in edits.passages],
        "self_edits": edits.texts,
        "steps": [
            {
                "request_id": request.request_id,
                "seed": request.seed,
                "texts": reply.adapter_texts,
                "correct": reply.adapter_correct,
                "n_ungraded": reply.n_ungraded,
                "train_steps": reply.train_steps or None,
                "train_tokens": reply.train_tokens or None,
            }
            for request, reply in zip(edits.requests, edits.replies, strict=True)
        ],
    }


def draw_sequences(passages: Sequence[Passage], settings: ContinualSettings) -> list[list[Passage]]:
    """`n_sequences` random samples without repetition within a sequence. Raises: SettingsError."""
    n, n_there = settings.n_datapoints, len(passages)
    if n_there < n:
        raise SettingsError(f"n_datapoints={n}, but the dataset has {n_there} passages; lower it")
    generator = random.Random(settings.seed)
    return [generator.sample(list(passages), n) for _ in range(settings.n_sequences)]


def edit_request(edits: Edits, text: str, settings: ContinualSettings, *, model_id: str) -> TTTRequest:
    """Train on the self-edit `text` of the next passage and on those that are replayed, keep the adapter, ask all
    passages so far and the one that is edited after them. With retrieval nothing is asked here: the adapter is chosen
    question by question."""
    last, texts = len(edits.texts), [*edits.texts, text]
    replayed: list[int] = []
    if settings.strategy == "replay":
        draws = random.Random(derived_seed(settings.seed, "replay", edits.number, last))
        replayed = sorted(draws.sample(range(last), min(last, settings.replay_passages or last)))
    lines = []
    for at in (*replayed, last):
        one = edits.passages[at]
        how: dict[str, Any] = {"title": one.title, "context": one.context, "split_newlines": settings.split_newlines}
        lines += sequences_of_text(texts[at], **how)
    seen = [] if settings.strategy == "retrieval" else edits.passages[: last + 2]
    return loop_request(
        model_id,
        settings.training,
        texts=lines,
        questions=asked_in(seen, settings),
        keep="edit",
        adapter_stack=edits.stack if settings.strategy in STACKED else [],
        skip_baseline=True,  # the row before has already asked the model without this edit
        seed=derived_seed(settings.seed, "edit", edits.number, edits.passages[last].title, last + 1),
    )


def asked_in(passages: Sequence[Passage], settings: ContinualSettings) -> list[EvalQuestion]:
    return eval_questions(*passages, answer_style=settings.training.answer_style)


def self_edit_request(edits: Edits, settings: ContinualSettings, *, model_id: str) -> GenerateRequest:
    """The model with all edits so far writes the self-edit of the next passage."""
    passage = edits.passages[len(edits.texts)]
    request = GenerateRequest(
        prompts=[self_edit_prompt(settings.prompt_key, title=passage.title, context=passage.context)],
        max_tokens=settings.max_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        adapter_stack=edits.stack if settings.strategy in STACKED else [],
        priority=0,
        seed=derived_seed(settings.seed, "write", edits.number, passage.title, len(edits.stack)),
    )
    return identified(request, model_id)


def next_texts(ttt: TTT, edits_S: Sequence[Edits], settings: ContinualSettings, journal: Journal) -> list[str]:
    """What the next edit of each sequence is trained on: new self-edits, or texts of the arm. Raises: RemoteError."""
    if settings.arm != "self_edits":
        step = len(edits_S[0].texts)
        return [arm_texts(settings.arm, edits.passages[step], step, k_completions=1)[0] for edits in edits_S]
    requests = [self_edit_request(edits, settings, model_id=ttt.model_id) for edits in edits_S]
    written = ask(ttt, requests, journal, what="self-edits")
    return [written.of(request).texts[0].strip() for request in requests]


def edit_and_merge(ttt: TTT, edits: Edits, settings: ContinualSettings, journal: Journal, *, folder: Path) -> None:
    """All edits of a sequence, each on the model that the edit before it was merged into, by servers like `ttt`. The
    subfolder is named after the content, so that a merged model is never used for other passages or settings. The last
    model stays. Raises: RunMismatch where the first of these servers holds another model than `ttt`, RemoteError."""
    content = content_of(edits.number, edits.passages, settings, ttt.model_id)
    place = folder / f"sequence_{edits.number + 1}_{content}"
    base = ttt.known_settings().model
    for step in range(1, len(edits.passages) + 1):
        key, run_dir = content_id(["merged", content, step]), place / f"server_{step}"
        if key not in journal:
            with ttt.another(merged_model(base, edits.stack, place), folder=run_dir) as served:
                if step == 1 and served.model_id != ttt.model_id:
                    raise RunMismatch(
                        f"row 0 was asked of model {ttt.model_id}, the server for the merged edits has "
                        f"{served.model_id}; give both the same model, dtype, grader and deterministic"
                    )
                (text,) = next_texts(served, [edits], settings, journal)
                request = edit_request(edits, text, settings, model_id=served.model_id)
                # Not through the journal: a stacked run has the same first edit, with its adapter elsewhere.
                reply = served.client.evaluate(request)
            done = {"request": request.model_dump(mode="json"), "reply": reply.model_dump(mode="json")}
            journal.append(key, {"text": text, **done})
        done = journal.get(key)
        edits.add(done["text"], TTTRequest.model_validate(done["request"]), TTTReply.model_validate(done["reply"]))
        say(f"merged, sequence {edits.number + 1}: edit {step} of {len(edits.passages)}")

    merged_model(base, edits.stack, place)


def merged_model(base: str, stack: Sequence[str], place: Path) -> str:
    """The model with the adapters of `stack` merged into it one after the other, as published. It goes on from the last
    such model in `place` and removes the earlier ones: a run that is started again merges only what is missing."""
    from seal_nb.peft_files import merge_stack

    models = [base, *(str(place / f"model_{step}") for step in range(1, len(stack) + 1))]
    newest = max((step for step, model in enumerate(models) if step and Path(model).is_dir()), default=0)
    for step in range(newest + 1, len(models)):
        merge_stack(models[step - 1], [place / f"server_{step}" / "adapters" / stack[step - 1]], Path(models[step]))
    for model in map(Path, models[1:-1]):
        if is_own(model):
            shutil.rmtree(model, ignore_errors=True)
    return models[-1]


def content_of(number: int, sequence: Sequence[Passage], settings: ContinualSettings, model_id: str) -> str:
    """The id of everything that the edits of a sequence depend on. Titles alone do not tell passages apart."""
    names = ("arm", "prompt_key", "max_tokens", "temperature", "top_p", "split_newlines", "seed")
    own = [*(getattr(settings, name) for name in names), settings.training.request_fields()]
    return content_id([model_id, number, [asdict(passage) for passage in sequence], own])


def found_by_bm25(passages: Sequence[Passage], questions: Sequence[str]) -> list[int | None]:
    """For each question the passage (title and text) with the highest BM25 score, the first of equals; None where no
    word is shared."""
    words_P = [re.findall(r"\w+", f"{one.title} {one.context}".casefold()) for one in passages]
    known, index, found = {word for words in words_P for word in words}, BM25(k1=K1, b=B), list[int | None]()
    if known:
        index.index(words_P, show_progress=False)
    for question in questions:
        shared = [word for word in dict.fromkeys(re.findall(r"\w+", question.casefold())) if word in known]
        found.append(int(index.get_scores(shared).argmax()) if shared else None)
    return found


def answers_by_retrieval(ttt: TTT, edits_S: Sequence[Edits], settings: ContinualSettings, journal: Journal) -> None:
    """Ask all questions so far, each of the adapter that BM25 chooses; the answers are the last reply of each sequence.
    Raises: RemoteError where one failed."""
    routed_S = [route(edits.passages, edits.stack, settings, model_id=ttt.model_id) for edits in edits_S]
    collected = ask(ttt, [request for routed in routed_S for _, request in routed], journal, what="answers")
    for edits, routed in zip(edits_S, routed_S, strict=True):
        answered: list[tuple[int, str, str]] = []
        for places, request in routed:
            reply = collected.of(request)  # without training, its adapter side is that of base and stack
            answered += zip(places, reply.adapter_texts, reply.adapter_verdicts, strict=True)
        answered.sort()
        answers = Answers(texts=[text for _, text, _ in answered], verdicts=[verdict for *_, verdict in answered])
        trained = edits.replies[-1].model_dump(include={"train_steps", "train_tokens"})
        edits.replies[-1] = build_reply(baseline=None, adapter=answers, model_id=ttt.model_id, **trained)


def route(
    sequence: Sequence[Passage], adapters: Sequence[str], settings: ContinualSettings, *, model_id: str
) -> list[tuple[list[int], TTTRequest]]:
    """All questions so far, and those of the next passage, one request for each adapter that BM25 chooses, with the
    questions' places."""
    edited, asked_now = sequence[: len(adapters)], sequence[: len(adapters) + 1]
    questions, places_of = asked_in(asked_now, settings), dict[int | None, list[int]]()
    # Without the topic line: with the title in the question, choosing would be no task.
    bare = [question.question for passage in asked_now for question in passage.questions]
    for place, which in enumerate(found_by_bm25(edited, bare)):
        places_of.setdefault(which, []).append(place)
    how: dict[str, Any] = {"skip_training": True, "seed": settings.seed}
    routed = []
    for which, places in places_of.items():
        own, stack = [questions[at] for at in places], [] if which is None else [adapters[which]]
        routed.append((places, loop_request(model_id, settings.training, questions=own, adapter_stack=stack, **how)))
    return routed


def retrieval_accuracy(sequences: Sequence[Sequence[Passage]]) -> float | None:
    """Share of all questions for which BM25 finds their own passage among all of the sequence."""
    right: list[bool] = []
    for one in sequences:
        asked = [(at, question.question) for at, own in enumerate(one) for question in own.questions]
        found = found_by_bm25(one, [question for _, question in asked])
        right += [at == place for (at, _), place in zip(asked, found, strict=True)]
    return sum(right) / len(right) if right else None
