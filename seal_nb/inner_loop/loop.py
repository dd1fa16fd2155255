"""The inner loop: requests in, replies out (SEAL, arXiv 2506.10943, section 3.1).

One request: the base answers the questions (once per question, kept), an adapter is trained on the train
sequences, the adapter answers, a grader says which answers are right. Many requests are under way at once:
training shares the slots, answering shares one batch, and grading goes on beside, since a judge may take
seconds. Knows nothing of sockets; `advance` does a short slice of work and hands back what is done.
"""

import time
import traceback
from collections import deque
from concurrent.futures import FIRST_COMPLETED, wait
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch

from seal_nb.errors import SealError, SettingsError
from seal_nb.grading.base import Grader
from seal_nb.grading.choose import make_grader
from seal_nb.grading.judge import GradingThreads
from seal_nb.inner_loop.evaluation import (
    Baselines,
    Evaluation,
    Generation,
    Grading,
    Question,
    answer_row,
    grade,
    questions,
    text_rows,
    train_job,
)
from seal_nb.inner_loop.scores import SoftScores
from seal_nb.inner_loop.settings import InnerLoopSettings
from seal_nb.models import FOUR_BIT, model_identity, resolve_model
from seal_nb.protocol import GenerateRequest, Reply, ScoredText, TTTRequest, Work, error_reply
from seal_nb.ttt.adapters import KeptAdapters
from seal_nb.ttt.base import FrozenBase
from seal_nb.ttt.decode import Decoded, GroupedDecoder
from seal_nb.ttt.lora import Adapter
from seal_nb.ttt.trainer import Progress, SlotTrainer, Trained, usual_slots

Key = tuple[str, "int | Question"]  # of a text being generated: request and place, or a baseline's question
ANSWER_STEPS_A_PASS = 64
USUAL_DECODE_ROWS = {"cuda": 320}  # else 64
MOST_GRADED_AT_ONCE = 32  # requests; with so many waiting for a slow judge no new work is taken
GRADING_WAIT_S = 0.05  # with nothing else to do
REQUEST_FAULTS = (SealError, OSError, RuntimeError, ValueError)  # end a request, not the process


class InnerLoop:
    """Drives one base on one device for many requests at a time."""

    def __init__(self, base: FrozenBase, grader: Grader, settings: InnerLoopSettings, *, model_id: str):
        settings = replace(
            settings,
            n_slots=settings.n_slots or usual_slots(base.device),
            decode_rows=settings.decode_rows or USUAL_DECODE_ROWS.get(base.device.type, 64),
        )
        self.base, self.grader, self.settings, self.model_id = base, grader, settings, model_id
        self.trainer = SlotTrainer(base, n_slots=settings.n_slots, token_budget=settings.token_budget)
        self.decoder = GroupedDecoder(base, max_rows=settings.decode_rows)
        if settings.deterministic:  # which passes are captured depends on what came before
            self.trainer.captured.works, self.decoder.replay.record = False, None
        self.evaluations: dict[str, Evaluation] = {}
        self.generations: dict[str, Generation] = {}
        self.baselines = Baselines()
        self.soft_scores = SoftScores(base)
        self.kept = KeptAdapters(base, settings.adapters_dir)
        self.gradings: dict[str, Grading] = {}
        self.grading_threads = GradingThreads(MOST_GRADED_AT_ONCE)
        self.done: deque[Reply] = deque()
        self.progress = Progress()
        self.answering = False
        self.n_answer_steps = 0
        self.n_done = 0

    @property
    def busy(self) -> bool:
        return bool(self.evaluations or self.generations or self.gradings or self.done)

    @property
    def free_slots(self) -> int:
        """Requests that are useful now: enough that the next one can enter the moment a slot is free."""
        if len(self.gradings) >= MOST_GRADED_AT_ONCE:
            return 0
        return max(0, 2 * self.trainer.n_slots - len(self.evaluations) - len(self.generations))

    def stats(self) -> dict[str, Any]:
        return {
            "slots": self.trainer.n_slots,
            "slots_in_use": len(self.trainer.slots),
            "requests": len(self.evaluations) + len(self.generations) + len(self.gradings),
            "requests_in_grading": len(self.gradings),
            "requests_done": self.n_done,
            "training": self.progress.read(self.trainer.slots),
            "train_tokens": self.trainer.n_tokens,
            "decode_tokens": self.decoder.n_tokens,
            "baselines_kept": len(self.baselines),
            "token_budget": self.trainer.token_budget,
            "device": str(self.base.device),
            "dtype": str(self.base.dtype).removeprefix("torch."),
        }

    def submit(self, request: Work) -> None:
        """Take a request on; `request_id` and `seed` must be set. Raises SealError, which concerns this
        request only."""
        if request.request_id is None or request.seed is None:
            raise SettingsError("request_id and seed must be set before a request reaches the inner loop")
        if len(set(request.adapter_stack)) < len(request.adapter_stack):
            raise SettingsError(f"adapter_stack is {request.adapter_stack}; name each adapter once")
        stack = dict(map(self.kept.get, request.adapter_stack))
        try:
            if isinstance(request, GenerateRequest):
                self._generate(request, tuple(stack.values()))
            else:
                self._evaluate(request, stack)
        except BaseException:
            self.cancel(request.request_id)  # nothing of a refused request stays behind
            raise

    def cancel(self, request_id: str) -> None:
        """Forget a request and free what it holds. Answers of the base that others wait for go on."""
        self.evaluations.pop(request_id, None)
        self.generations.pop(request_id, None)
        if (grading := self.gradings.pop(request_id, None)) is not None:
            grading.verdicts.cancel()
        self.trainer.cancel(request_id)
        self.decoder.cancel({key for key in self._keys() if key[0] == request_id})
        self.done = deque(reply for reply in self.done if reply.request_id != request_id)

    def advance(self) -> list[Reply]:
        """One pass of training or one token for every row being answered; replies that are complete."""
        if self._answer_now() and not self._train_in_between():
            for decoded in self.decoder.step():
                self._decoded(decoded)
        elif self.trainer.busy:
            for trained in self.trainer.step():
                self._trained(trained)
        elif self.gradings and not self.done:
            wait([one.verdicts for one in self.gradings.values()], GRADING_WAIT_S, FIRST_COMPLETED)
        self._graded()
        replies = list(self.done)
        self.done.clear()
        self.n_done += len(replies)
        return replies

    def _answer_now(self) -> bool:
        """Answer when a good batch has come together or nothing is left to train; then to the end."""
        rows = len(self.decoder.waiting) + len(self.decoder.live)
        enough = rows >= self.settings.decode_rows // 2 or not self.trainer.busy
        self.answering = rows > 0 and (self.answering or enough)
        return self.answering

    def _train_in_between(self) -> bool:
        """A steady stream of texts must not stop training: one pass after so many tokens of all rows."""
        self.n_answer_steps += 1
        return self.trainer.busy and self.n_answer_steps % ANSWER_STEPS_A_PASS == 0

    def _keys(self) -> list[Key]:
        rows = [*self.decoder.waiting, *(lane.row for lane in self.decoder.live)]
        return [cast(Key, row.key) for row in rows]

    def _evaluate(self, request: TTTRequest, stack: dict[str, Adapter]) -> None:
        job = train_job(request, self.settings.max_seq_length) if request.training_wanted else None
        if job is not None:
            self.base.layout(job.lora)  # refuses unknown targets now
        asked = questions(self.base, request, tuple(stack))
        evaluation = Evaluation(request, asked, tuple(stack.values()))
        self.evaluations[str(request.request_id)] = evaluation
        if not request.skip_baseline:
            self._ask_baseline(evaluation)
        if job is not None:
            self.trainer.submit(job, evaluation.stack)
        self._finish_complete(str(request.request_id))

    def _ask_baseline(self, evaluation: Evaluation) -> None:
        for question in evaluation.questions:
            if (known := self.baselines.get(question)) is not None:
                evaluation.base_said(question, known)
            elif question not in self.baselines:
                self.decoder.submit(answer_row(self.base, ("", question), question, evaluation.stack))
                self.baselines.asked(question)

    def _generate(self, request: GenerateRequest, stack: tuple[Adapter, ...]) -> None:
        self.generations[str(request.request_id)] = Generation(request)
        for row in text_rows(self.base, request, stack):
            self.decoder.submit(row)

    def _trained(self, trained: Trained) -> None:
        evaluation = self.evaluations.get(trained.job.name)
        if evaluation is None:
            return
        if trained.adapter is None:
            self._fail(trained.job.name, SettingsError(trained.error))
            return
        evaluation.trained, evaluation.trained_s = trained, time.monotonic()
        try:
            self._use(evaluation, trained.adapter)
        except REQUEST_FAULTS as error:  # a full disk, a prompt too long
            self._fail(trained.job.name, error)
        else:
            self._finish_complete(trained.job.name)

    def _use(self, evaluation: Evaluation, adapter: Adapter) -> None:
        """Keep the adapter where a name is given, and ask it the questions."""
        request = evaluation.request
        if request.adapter_name is not None:
            evaluation.adapter_path = str(self.kept.keep(request.adapter_name, adapter))
        for i, question in enumerate(evaluation.questions):
            key = (str(request.request_id), i)
            self.decoder.submit(answer_row(self.base, key, question, (*evaluation.stack, adapter)))

    def _decoded(self, decoded: Decoded) -> None:
        request_id, place = cast(Key, decoded.key)
        if decoded.error:
            self._not_generated(request_id, place, decoded.error)
        elif isinstance(place, Question):
            self._base_answered(place, decoded.text.strip())
        elif request_id in self.generations:
            self._generated(request_id, place, decoded)
        elif request_id in self.evaluations:
            self.evaluations[request_id].answers[place] = decoded.text.strip()
            self._finish_complete(request_id)

    def _base_answered(self, question: Question, text: str) -> None:
        self.baselines.answered(question, text)
        for request_id, evaluation in list(self.evaluations.items()):
            evaluation.base_said(question, text)
            self._finish_complete(request_id)

    def _not_generated(self, request_id: str, place: "int | Question", error: str) -> None:
        """Fail the request, or all that wait for this answer of the base."""
        concerned = [request_id]
        if isinstance(place, Question):
            self.baselines.failed(place)
            concerned = [i for i, e in self.evaluations.items() if place in e.questions and e.n_baseline]
        for one in concerned:
            if one in self.evaluations or one in self.generations:
                self._fail(one, SettingsError(error))

    def _generated(self, request_id: str, place: int, decoded: Decoded) -> None:
        generation = self.generations[request_id]
        generation.texts[place] = decoded
        if generation.complete:
            del self.generations[request_id]
            self.done.append(generation.reply(self.model_id))

    def _finish_complete(self, request_id: str) -> None:
        """Hand a request that has all its answers to the grader."""
        evaluation = self.evaluations.get(request_id)
        if evaluation is None or not evaluation.complete:
            return
        scored: tuple[list[float], list[float], list[int]] = ([], [], [])
        tokens: list[ScoredText] = []
        # A pass of scoring: what fits; deterministic: a text.
        budget = 1 if self.settings.deterministic else self.trainer.token_budget
        try:
            if evaluation.request.soft_scores:
                scored = self.soft_scores.gold_answers(evaluation, token_budget=budget)
            if evaluation.request.return_token_logprobs:
                tokens = self.soft_scores.tokens(evaluation, token_budget=budget)
        except REQUEST_FAULTS as error:
            self._fail(request_id, error)
            return
        del self.evaluations[request_id]
        evaluation.let_go_of_adapters()  # a slow judge must not keep their memory
        verdicts = self.grading_threads.submit(partial(grade, self.grader, evaluation))
        self.gradings[request_id] = Grading(evaluation, scored, tokens, verdicts)

    def _graded(self) -> None:
        for request_id, grading in list(self.gradings.items()):
            if grading.verdicts.done():
                try:
                    reply = grading.reply(self.model_id)
                except REQUEST_FAULTS as error:
                    self._fail(request_id, error)
                else:
                    del self.gradings[request_id]
                    self.done.append(reply)

    def _fail(self, request_id: str, error: Exception) -> None:
        at_work = (self.evaluations, self.generations, self.gradings)
        request = next(where[request_id].request for where in at_work if request_id in where)
        self.cancel(request_id)
        trace = "".join(traceback.format_exception(error)) if request.traceback else None
        self.done.append(error_reply(error, request_id=request_id, traceback=trace))


def load_inner_loop(settings: InnerLoopSettings) -> InnerLoop:
    """Load model and grader. Raises SettingsError where the model cannot be had or is of an unknown kind."""
    torch.set_num_threads(settings.n_threads)
    if settings.deterministic:
        torch.use_deterministic_algorithms(True, warn_only=True)
    grader = make_grader(settings.grader)  # first: a mistake in its name needs no model
    folder = resolve_model(settings.model)
    base = FrozenBase.load(folder, device=settings.device, dtype=settings.dtype)
    return InnerLoop(base, grader, settings, model_id=served_identity(base, grader, settings, folder))


def served_identity(base: FrozenBase, grader: Grader, settings: InnerLoopSettings, folder: str) -> str:
    """Names all that a result depends on besides its request: weights, dtype, grader, longest sequence."""
    dtype = str(base.dtype).removeprefix("torch.") + f"-{FOUR_BIT}" * (settings.dtype == FOUR_BIT)
    alike = "-deterministic" if settings.deterministic else ""
    return f"{model_identity(folder)}-{dtype}-{grader.name}-{settings.max_seq_length}{alike}"
