"""The inner loop: requests in, replies out (SEAL, arXiv 2506.10943, section 3.1).

For each request the base answers the questions (these answers are stored), an adapter is trained and answers them, and
a grader gives verdicts. Many requests share the slots and one batch; grading runs in threads, as a judge takes seconds.
"""

import logging
import math
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate, groupby, pairwise
from typing import Any, Literal, NamedTuple, cast

import psutil
import torch

from seal_nb import protocol
from seal_nb.errors import GradingError, SettingsError
from seal_nb.grading.base import Grader, Verdict, answered_with
from seal_nb.grading.choose import make_grader
from seal_nb.models import FOUR_BIT, model_identity, resolve_model, tokenize
from seal_nb.peft_files import KeptAdapters, adapter_for
from seal_nb.processes import DaemonThreads
from seal_nb.prompts import answer_prompt
from seal_nb.protocol import GenerateRequest, ScoredText, TTTRequest
from seal_nb.server.client import InnerLoopSettings
from seal_nb.ttt.base import FrozenBase
from seal_nb.ttt.decode import Decoded, DecodeRow, GroupedDecoder, ScoreRow, score
from seal_nb.ttt.device import Limit
from seal_nb.ttt.lora import Adapter, LoraSettings, TrainJob, TrainSettings, make_row
from seal_nb.ttt.trainer import SlotTrainer, Trained

ANSWER_STEPS_A_PASS = 64
# Slots, texts of a batch. So many published train sequences (47 tokens) fill a pass (4096 tokens, on a CPU 376).
USUAL_SIZES = {"cuda": (88, 320), "cpu": (8, 64)}
MOST_STORED = 20_000  # answers of the base: some 70 MB; a server runs for weeks
MOST_GRADED_AT_ONCE = 32  # requests; with so many waiting for a slow judge no new work is taken
GRADING_WAIT_S = 0.05  # if there is nothing else to do
log = logging.getLogger(__name__)


class Question(NamedTuple):
    """What the base's answer depends on: the key under which it is stored. stack: identities of frozen adapters."""

    stack: tuple[str, ...]
    prompt_ids: tuple[int, ...]
    max_new_tokens: int


@dataclass
class Generation:
    """A GenerateRequest in progress."""

    request: GenerateRequest
    texts: list[Future[Decoded]] = field(default_factory=list)  # one a prompt
    started_s: float = field(default_factory=time.monotonic)

    @property
    def ready(self) -> bool:
        return all(map(Future.done, self.texts))

    def reply(self, model_id: str) -> protocol.GenerateReply:
        """Raises SettingsError if a text has failed."""
        texts = [text.result() for text in self.texts]
        return protocol.GenerateReply(
            texts=[d.text for d in texts],
            token_counts=[len(d.token_ids) for d in texts],
            finish_reasons=[d.finish_reason for d in texts],  # type: ignore[misc]
            request_id=self.request.request_id,
            seed=self.request.seed,
            timings={"answer_s": time.monotonic() - self.started_s},
            model_id=model_id,
        )


@dataclass
class Evaluation:
    """A TTTRequest in progress. Texts are answers, one a question."""

    request: TTTRequest
    questions: list[Question]
    stack: tuple[Adapter, ...]
    baseline: list[Future[Decoded]] = field(default_factory=list)  # of the base, for all requests; empty if not wanted
    texts: list[Future[Decoded]] = field(default_factory=list)  # of the adapter; empty until it is trained
    trained: Trained | None = None
    adapter_path: str | None = None
    scores: list[ScoredText] = field(default_factory=list)  # of all kinds of texts that are requested
    verdicts: Future[list[Verdict]] | None = None  # of all answers, those of the base first; None until graded
    timings: dict[str, float] = field(default_factory=lambda: {"train_s": 0.0})
    since_s: float = field(default_factory=time.monotonic)

    def lap(self, name: str) -> None:
        """Record the seconds since the last lap."""
        now = time.monotonic()
        self.timings[name], self.since_s = now - self.since_s, now

    @property
    def complete(self) -> bool:
        """Whether it is trained and all its answers are there."""
        trained = self.trained is not None or not self.request.training_wanted
        return trained and all(map(Future.done, [*self.texts, *self.baseline]))

    @property
    def ready(self) -> bool:
        return self.verdicts is not None and self.verdicts.done()

    def grade(self, grader: Grader) -> list[Verdict]:
        """Verdicts of all answers. If the grader fails, they are UNGRADED, so that the training is not lost. Raises
        SettingsError if an answer has failed."""
        answered = [
            answered_with((q.answer, *q.other_answers), question=q.question, answer=answer, title=q.title)
            for texts in (self.baseline, self.texts)
            for q, answer in zip(self.request.eval_questions, _stripped(texts), strict=bool(texts))
        ]
        try:
            return grader.grade(answered)
        except GradingError as error:
            log.warning("%d answers stay UNGRADED: %s", len(answered), error)
            return [Verdict.UNGRADED] * len(answered)

    def reply(self, model_id: str) -> protocol.TTTReply:
        """Raises what the grader raised."""
        assert self.verdicts is not None
        request, trained, verdicts, n = self.request, self.trained, self.verdicts.result(), len(self.baseline)
        scored = [text for text in self.scores if text.kind == "gold" and request.soft_scores]
        gold = [list(same) for _, same in groupby(scored, key=lambda text: text.index)]  # answers of each question
        before = _answers(self.baseline, verdicts[:n], [[text.baseline_logprobs for text in same] for same in gold])
        after = _answers(self.texts, verdicts[n:], [[text.adapter_logprobs for text in same] for same in gold])
        self.lap("grade_s")
        return protocol.build_reply(
            baseline=None if request.skip_baseline else before,
            adapter=after if trained else None,
            request_id=request.request_id,
            seed=request.seed,
            gold_token_counts=[len(same[0].tokens) for same in gold],
            token_logprobs=self.scores if request.return_token_logprobs else [],
            train_tokens=trained.n_tokens if trained else 0,
            train_steps=trained.n_steps if trained else 0,
            epoch_losses=list(trained.epoch_losses) if trained else [],
            timings=self.timings,
            model_id=model_id,
            adapter_path=self.adapter_path,
        )


def _answers(texts: Sequence[Future[Decoded]], verdicts: Sequence[Verdict], gold: Sequence[Any]) -> protocol.Answers:
    """gold: of each question, the log-probabilities of the tokens of each gold answer; the likeliest answer counts"""
    best = [max((sum(one) for one in answers if None not in one), default=None) for answers in gold]
    return protocol.Answers(texts=_stripped(texts), verdicts=verdicts, gold_logprobs=best)


def _stripped(texts: Sequence[Future[Decoded]]) -> list[str]:
    return [text.result().text.strip() for text in texts]


def train_job(request: TTTRequest, max_seq_length: int) -> TrainJob:
    """The training of a request. Raises SettingsError if a setting is out of its range."""
    rank, alpha, wanted = request.lora_rank, request.lora_alpha, request.target_modules
    targets = wanted if isinstance(wanted, str) else tuple(wanted)
    lora = LoraSettings(rank=rank, alpha=alpha, dropout=request.lora_dropout, target_modules=targets)
    train = TrainSettings(
        epochs=request.finetune_epochs,
        learning_rate=request.finetune_lr,
        batch_size=request.batch_size,
        gradient_accumulation_steps=request.gradient_accumulation_steps,
        max_seq_length=min(request.max_seq_length, max_seq_length),
        end_mask_substring=request.end_mask_substring,
        padding_in_loss=request.padding_in_loss,
        pad_to=request.pad_to,
        seed=int(request.seed or 0),
    )
    return TrainJob(name=str(request.request_id), texts=tuple(request.train_sequences), lora=lora, train=train)


@dataclass(frozen=True, kw_only=True)
class Text(ScoreRow):
    """A text to score. tokens: the stretch of the text of each token; only the last ones, `target_ids`, are scored"""

    kind: Literal["train", "gold", "passage"]
    index: int
    tokens: list[str]


def scored_texts(base: FrozenBase, evaluation: Evaluation, *, token_budget: Limit) -> list[ScoredText]:
    """What the request wants scored, token by token, without and (if there is one) with the adapter."""
    texts, trained = list(texts_to_score(base, evaluation)), evaluation.trained
    adapted = []
    if trained and trained.adapter:
        adapted = [replace(text, adapters=(*text.adapters, trained.adapter)) for text in texts]
    found = score(base, texts + adapted, token_budget=token_budget)
    scored = []
    for i, text in enumerate(texts):
        no_values = [None] * (len(text.tokens) - len(text.target_ids))
        before = [*no_values, *found[i]]
        after = [*no_values, *found[len(texts) + i]] if adapted else []
        values = {"baseline_logprobs": before, "adapter_logprobs": after}
        scored.append(ScoredText(kind=text.kind, index=text.index, tokens=text.tokens, **values))
    return scored


def texts_to_score(base: FrozenBase, evaluation: Evaluation) -> Iterator[Text]:
    """What the request wants scored; before its training, without the train sequences. Raises SettingsError if the
    model cannot run a text."""
    request, tokenizer = evaluation.request, base.tokenizer

    def text_of(kind: Any, index: int, tokens: list[str], prompt_ids: Sequence[int], target_ids: Sequence[int]) -> Text:
        base.room_after([*prompt_ids, *target_ids], f"the {kind} text {index}{' with its prompt' * (kind == 'gold')}")
        parts: Any = {"tokens": tokens, "prompt_ids": prompt_ids, "target_ids": target_ids}
        return Text(kind=kind, index=index, adapters=evaluation.stack, **parts)

    if not (request.soft_scores or request.return_token_logprobs):
        return
    if evaluation.trained is not None and request.return_token_logprobs:
        job = evaluation.trained.job
        plain = replace(job.train, padding_in_loss=False)
        for i, text in enumerate(job.texts):
            row, (ids, tokens) = make_row(tokenizer, text, plain), pieces(tokenizer, text)
            n, first = row.n_text, row.n_text - len(row.targets)  # the tokens with loss are the last ones
            yield text_of("train", i, tokens[:n], ids[:first], ids[first:n])
    for i, (own, question) in enumerate(zip(evaluation.questions, request.eval_questions, strict=True)):
        for gold in (question.answer, *question.other_answers):
            ids, tokens = pieces(tokenizer, gold, special_tokens=False)
            yield text_of("gold", i, tokens, own.prompt_ids, ids)
    passages: dict[str, int] = {}
    for i, question in enumerate(request.eval_questions):
        if question.context and request.return_token_logprobs:
            passages.setdefault(f"{question.title}\n{question.context}", i)
    for passage, i in passages.items():
        ids, tokens = pieces(tokenizer, passage)
        yield text_of("passage", i, tokens, ids[:1], ids[1:])


def pieces(tokenizer: Any, text: str, *, special_tokens: bool = True) -> tuple[list[int], list[str]]:
    """Token ids, and the stretch of the text that each token ends. Joined, the stretches are the text. If a character
    takes several tokens, its first token has it and the others are empty."""
    ids, spans = tokenize(tokenizer, text, special_tokens=special_tokens, with_spans=True)
    stops = accumulate((stop for _, stop in spans), max, initial=0)
    return ids, [text[start:stop] for start, stop in pairwise(stops)]


class InnerLoop:
    """Drives one base on one device for many requests at a time."""

    def __init__(self, base: FrozenBase, grader: Grader, settings: InnerLoopSettings, *, model_id: str):
        slots, rows = USUAL_SIZES.get(base.device.type, USUAL_SIZES["cpu"])
        settings = replace(settings, n_slots=settings.n_slots or slots, decode_rows=settings.decode_rows or rows)
        self.base, self.grader, self.settings, self.model_id = base, grader, settings, model_id
        self.trainer = SlotTrainer(base, n_slots=settings.n_slots, token_budget=settings.token_budget)
        self.decoder = GroupedDecoder(base, max_rows=settings.decode_rows)
        if settings.deterministic:  # which passes are captured depends on earlier ones
            self.trainer.captured.works, self.decoder.record = False, None
        self.requests: dict[str, Evaluation | Generation] = {}  # by request id
        self.baselines: dict[Question, Future[Decoded]] = {}  # the base's answers, also those to come
        self.kept = KeptAdapters(settings.adapters_dir, partial(adapter_for, base), base.name)
        self.grading_threads = DaemonThreads(MOST_GRADED_AT_ONCE)
        self.done: list[protocol.Reply] = []
        self.answering = False
        self.n_answer_steps = 0
        self.n_done = 0

    @property
    def busy(self) -> bool:
        return bool(self.requests)

    @property
    def gradings(self) -> list[Future[list[Verdict]]]:
        """The verdicts that requests wait for."""
        return [one.verdicts for one in self.requests.values() if isinstance(one, Evaluation) and one.verdicts]

    @property
    def free_slots(self) -> int:
        """Number of requests to send now: enough that the next one can enter as soon as a slot is free."""
        n_graded = len(self.gradings)
        n_free = 2 * self.trainer.n_slots.now - (len(self.requests) - n_graded)
        return max(0, n_free) if n_graded < MOST_GRADED_AT_ONCE else 0

    def stats(self) -> dict[str, Any]:
        device, rss = self.base.device, psutil.Process().memory_info().rss
        return {
            "slots": self.trainer.n_slots.now,
            "slots_in_use": len(self.trainer.slots),
            "requests": len(self.requests),
            "requests_in_grading": len(self.gradings),
            "requests_done": self.n_done,
            "training": self.trainer.progress(),
            "train_tokens": self.trainer.n_tokens,
            "decode_tokens": self.decoder.n_tokens,
            "baselines_kept": len(self.baselines),
            "token_budget": self.trainer.token_budget.now,
            "memory_bytes": torch.cuda.memory_reserved(device) if device.type == "cuda" else rss,
            "device": str(device),
            "dtype": str(self.base.dtype).removeprefix("torch."),
        }

    def submit(self, request: protocol.Work) -> None:
        """Take a request, with `request_id` and `seed` set. An error concerns this request only."""
        if request.request_id is None or request.seed is None:
            raise SettingsError("request_id and seed must be set before a request reaches the inner loop")
        if len(set(request.adapter_stack)) < len(request.adapter_stack):
            raise SettingsError(f"adapter_stack is {request.adapter_stack}; name each adapter once")
        stack = dict(map(self.kept.get, request.adapter_stack))
        try:
            if isinstance(request, GenerateRequest):
                self._generate(request.request_id, request, tuple(stack.values()))
            else:
                self._evaluate(request.request_id, request, stack)
        except BaseException:
            self.cancel(request.request_id)  # nothing is left of a refused request
            raise

    def cancel(self, request_id: str) -> None:
        """Drop a request and free what it holds. Answers of the base, for which other requests may wait, go on."""
        if (one := self.requests.pop(request_id, None)) is not None:
            for text in one.texts:
                text.cancel()
            if isinstance(one, Evaluation) and one.verdicts is not None:
                one.verdicts.cancel()
        self.trainer.cancel(request_id)
        self.decoder.cancel(lambda text: cast(Future[Decoded], text).cancelled())

    def advance(self) -> list[protocol.Reply]:
        """One pass of training, or one token for every text being generated; returns the replies that are complete."""
        for request_id, one in list(self.requests.items()):
            if isinstance(one, Evaluation) and one.verdicts is None and one.complete:
                with self._failing_alone(request_id):
                    self._grade(one)
        if self._answer_now():
            for decoded in self.decoder.step():
                text = cast(Future[Decoded], decoded.key)
                if decoded.error:
                    text.set_exception(SettingsError(decoded.error))
                else:
                    text.set_result(decoded)
        elif self.trainer.busy:
            for trained in self.trainer.step():
                self._trained(trained.job.name, trained)
        else:
            wait(self.gradings, GRADING_WAIT_S, FIRST_COMPLETED)
        for request_id, one in list(self.requests.items()):
            if one.ready:
                with self._failing_alone(request_id):
                    self.done.append(one.reply(self.model_id))
                    del self.requests[request_id]
        replies, self.done = self.done, []
        self.n_done += len(replies)
        return replies

    def _answer_now(self) -> bool:
        """Start answering when half a batch is there or nothing is left to train; then answer to the end. In between, a
        pass is trained every 64 steps, so that a steady stream of texts does not stop training."""
        n_rows = len(self.decoder.waiting) + len(self.decoder.live)
        enough = n_rows >= self.settings.decode_rows // 2 or not self.trainer.busy
        self.answering = n_rows > 0 and (self.answering or enough)
        self.n_answer_steps += self.answering
        return self.answering and not (self.trainer.busy and self.n_answer_steps % ANSWER_STEPS_A_PASS == 0)

    def _generate(self, request_id: str, request: GenerateRequest, stack: tuple[Adapter, ...]) -> None:
        self.requests[request_id] = generation = Generation(request)
        sampling = {"temperature": request.temperature, "top_p": request.top_p, "stop": tuple(request.stop)}
        for i, prompt in enumerate(request.prompts):
            seed, ids = (int(request.seed or 0) + i) % 2**63, self.base.encode(prompt)
            text = self._ask(ids, request.max_tokens, stack, f"prompts[{i}]", seed=seed, **sampling)
            generation.texts.append(text)

    def _evaluate(self, request_id: str, request: TTTRequest, stack: dict[str, Adapter]) -> None:
        """stack: the frozen adapters by their identities"""
        job = train_job(request, self.settings.max_seq_length) if request.training_wanted else None
        if job is not None:
            self.base.layout(job.lora)  # refuses unknown targets now
        prompts = [answer_prompt(q.title, q.question) for q in request.eval_questions]
        if request.chat:  # the template adds the special tokens
            template: Any = self.base.tokenizer.apply_chat_template
            chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
            prompts = [template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
        ids = [self.base.encode(prompt, special_tokens=not request.chat) for prompt in prompts]
        for i, one in enumerate(ids):
            self.base.room_after(one, f"the prompt of eval_questions[{i}]", n_new=1)
        questions = [Question(tuple(stack), tuple(one), request.max_new_tokens) for one in ids]
        evaluation = Evaluation(request, questions, tuple(stack.values()))
        list(texts_to_score(self.base, evaluation))  # refuses those that the model cannot run now
        self.requests[request_id] = evaluation
        for question in [] if request.skip_baseline else questions:
            known = self.baselines.get(question)
            if known is None or (known.done() and known.exception()):
                known = self._ask(question.prompt_ids, question.max_new_tokens, evaluation.stack)
                self.baselines[question] = known
            evaluation.baseline.append(known)
        while len(self.baselines) > MOST_STORED:
            del self.baselines[next(iter(self.baselines))]
        if job is not None:
            self.trainer.submit(job, evaluation.stack)

    def _ask(
        self, ids: Sequence[int], max_tokens: int, stack: tuple[Adapter, ...], what: str = "a prompt", **sampling: Any
    ) -> Future[Decoded]:
        """A text to generate, as far as there is room in the model's context. If it fails, with a SettingsError."""
        n, text = min(max_tokens, self.base.room_after(ids, what, n_new=1)), Future[Decoded]()
        self.decoder.submit(DecodeRow(key=text, token_ids=ids, adapters=stack, max_new_tokens=n, **sampling))
        return text

    def _trained(self, request_id: str, trained: Trained) -> None:
        """Keep the adapter if it has a name, and ask it the questions."""
        with self._failing_alone(request_id):  # a full disk
            evaluation = cast(Evaluation, self.requests[request_id])
            if trained.adapter is None:
                raise SettingsError(trained.error)
            evaluation.trained = trained
            evaluation.lap("train_s")
            if (name := evaluation.request.adapter_name) is not None:
                evaluation.adapter_path = str(self.kept.keep(name, trained.adapter))
            stack = (*evaluation.stack, trained.adapter)
            evaluation.texts = [self._ask(q.prompt_ids, q.max_new_tokens, stack) for q in evaluation.questions]

    def _grade(self, evaluation: Evaluation) -> None:
        """Score a request that has all its answers, and send it to the grader."""
        # Tokens of a pass of scoring; if deterministic, one text a pass.
        budget = Limit(1, math.inf) if self.settings.deterministic else self.trainer.token_budget
        evaluation.scores = scored_texts(self.base, evaluation, token_budget=budget)
        evaluation.stack = ()  # a slow judge must not keep the adapters' memory
        if evaluation.trained:
            evaluation.trained.adapter = None
        evaluation.lap("answer_s")
        evaluation.verdicts = self.grading_threads.submit(partial(evaluation.grade, self.grader))

    @contextmanager
    def _failing_alone(self, request_id: str) -> Iterator[None]:
        """An error ends this request and not the process, unless nothing runs on the device any more."""
        try:
            yield
        except torch.AcceleratorError:
            raise
        except Exception as error:  # noqa: BLE001  # whatever it is, it is this request's
            wants_traceback = self.requests[request_id].request.traceback
            self.cancel(request_id)
            trace = "".join(traceback.format_exception(error)) if wants_traceback else None
            self.done.append(protocol.error_reply(error, request_id=request_id, traceback=trace))


def load_inner_loop(settings: InnerLoopSettings) -> InnerLoop:
    """Load model and grader. Raises SettingsError if the model is missing or not supported, or the grader unknown."""
    torch.set_num_threads(settings.n_threads)
    if settings.deterministic:
        torch.use_deterministic_algorithms(True, warn_only=True)
    grader = make_grader(settings.grader)  # first: a wrong name is found without loading a model
    folder = resolve_model(settings.model)
    base = FrozenBase.load(folder, device=settings.device, dtype=settings.dtype)
    # The model id names all that a result depends on besides its request.
    dtype = str(base.dtype).removeprefix("torch.") + f"-{FOUR_BIT}" * (settings.dtype == FOUR_BIT)
    deterministic = "-deterministic" if settings.deterministic else ""
    model_id = f"{model_identity(folder)}-{dtype}-{grader.name}-{settings.max_seq_length}{deterministic}"
    return InnerLoop(base, grader, settings, model_id=model_id)
