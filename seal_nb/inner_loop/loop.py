"""The inner loop: requests in, replies out (SEAL, arXiv 2506.10943, section 3.1).

For each request the base answers the questions (once a question; answers are stored), an adapter is trained on the
train sequences, the adapter answers, and a grader gives verdicts. Many requests are in progress at once: training
shares the slots, answering shares one batch, and grading runs in threads, since a judge may take seconds.
`InnerLoop.advance` does a short slice of this work and returns the replies that are complete.
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
from seal_nb.inner_loop.evaluation import (
    Evaluation,
    Generation,
    Question,
    decode_row,
    questions_of,
    scored_texts,
    text_rows,
    train_job,
)
from seal_nb.inner_loop.settings import InnerLoopSettings
from seal_nb.models import FOUR_BIT, model_identity, resolve_model
from seal_nb.processes import DaemonThreads
from seal_nb.protocol import GenerateRequest, Reply, TTTRequest, Work, error_reply
from seal_nb.ttt.base import FrozenBase
from seal_nb.ttt.decode import Decoded, GroupedDecoder
from seal_nb.ttt.lora import Adapter, KeptAdapters
from seal_nb.ttt.trainer import SlotTrainer, Trained

Key = tuple[str, "int | Question"]  # of a text being generated: request id and index, or "" and the base's question
ANSWER_STEPS_A_PASS = 64
# Slots that fill a pass (4096 tokens on a GPU, 376 on a CPU; larger ones are hardly faster) with published train
# sequences (47 tokens), and texts of a batch.
USUAL_SIZES = {"cuda": (88, 320), "cpu": (8, 64)}
MOST_STORED = 20_000  # answers of the base: some 50 MB; a server runs for weeks
MOST_GRADED_AT_ONCE = 32  # requests; with so many waiting for a slow judge no new work is taken
GRADING_WAIT_S = 0.05  # if there is nothing else to do
REQUEST_FAULTS = (SealError, OSError, RuntimeError, ValueError)  # end a request, not the process


class InnerLoop:
    """Drives one base on one device for many requests at a time."""

    def __init__(self, base: FrozenBase, grader: Grader, settings: InnerLoopSettings, *, model_id: str):
        slots, rows = USUAL_SIZES.get(base.device.type, USUAL_SIZES["cpu"])
        settings = replace(settings, n_slots=settings.n_slots or slots, decode_rows=settings.decode_rows or rows)
        self.base, self.grader, self.settings, self.model_id = base, grader, settings, model_id
        self.trainer = SlotTrainer(base, n_slots=settings.n_slots, token_budget=settings.token_budget)
        self.decoder = GroupedDecoder(base, max_rows=settings.decode_rows)
        if settings.deterministic:  # which passes are captured depends on earlier ones
            self.trainer.captured.works, self.decoder.replay.record = False, None
        self.evaluations: dict[str, Evaluation] = {}  # in training or answering
        self.generations: dict[str, Generation] = {}
        self.gradings: dict[str, Evaluation] = {}  # wait for verdicts
        self.asked: set[Question] = set()  # the base is answering them
        self.baselines: dict[Question, str] = {}  # the base's answers
        self.kept = KeptAdapters(settings.adapters_dir, base.load_adapter, base.name)
        self.grading_threads = DaemonThreads(MOST_GRADED_AT_ONCE)
        self.done: deque[Reply] = deque()
        self.answering = False
        self.n_answer_steps = 0
        self.n_done = 0

    @property
    def busy(self) -> bool:
        return bool(self.evaluations or self.generations or self.gradings or self.done)

    @property
    def free_slots(self) -> int:
        """Number of requests to send now: enough that the next one can enter as soon as a slot is free."""
        if len(self.gradings) >= MOST_GRADED_AT_ONCE:
            return 0
        return max(0, 2 * self.trainer.n_slots.now - len(self.evaluations) - len(self.generations))

    def stats(self) -> dict[str, Any]:
        return {
            "slots": self.trainer.n_slots.now,
            "slots_in_use": len(self.trainer.slots),
            "requests": len(self.evaluations) + len(self.generations) + len(self.gradings),
            "requests_in_grading": len(self.gradings),
            "requests_done": self.n_done,
            "training": self.trainer.progress(),
            "train_tokens": self.trainer.n_tokens,
            "decode_tokens": self.decoder.n_tokens,
            "baselines_kept": len(self.baselines),
            "token_budget": self.trainer.token_budget.now,
            "device": str(self.base.device),
            "dtype": str(self.base.dtype).removeprefix("torch."),
        }

    def submit(self, request: Work) -> None:
        """Take a request, with `request_id` and `seed` set. Raises SealError, which concerns this request only."""
        if request.request_id is None or request.seed is None:
            raise SettingsError("request_id and seed must be set before a request reaches the inner loop")
        if len(set(request.adapter_stack)) < len(request.adapter_stack):
            raise SettingsError(f"adapter_stack is {request.adapter_stack}; name each adapter once")
        stack = dict(map(self.kept.get, request.adapter_stack))
        try:
            if isinstance(request, GenerateRequest):
                self.generations[request.request_id] = Generation(request)
                for row in text_rows(self.base, request, tuple(stack.values())):
                    self.decoder.submit(row)
            else:
                self._evaluate(request.request_id, request, stack)
        except BaseException:
            self.cancel(request.request_id)  # nothing is left of a refused request
            raise

    def cancel(self, request_id: str) -> None:
        """Drop a request and free what it holds. Answers of the base that other requests wait for go on."""
        self.evaluations.pop(request_id, None)
        self.generations.pop(request_id, None)
        if (grading := self.gradings.pop(request_id, None)) is not None:
            grading.verdicts.cancel()
        self.trainer.cancel(request_id)
        rows = [*self.decoder.waiting, *(live.row for live in self.decoder.live)]
        self.decoder.cancel({row.key for row in rows if cast(Key, row.key)[0] == request_id})
        self.done = deque(reply for reply in self.done if reply.request_id != request_id)

    def advance(self) -> list[Reply]:
        """One pass of training, or one token for every text being generated; returns the replies that are complete."""
        if self._answer_now():
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
        """Start answering when half a batch is there or nothing is left to train; then answer to the end. In between, a
        pass is trained every 64 steps, so that a steady stream of texts does not stop training."""
        n_rows = len(self.decoder.waiting) + len(self.decoder.live)
        enough = n_rows >= self.settings.decode_rows // 2 or not self.trainer.busy
        self.answering = n_rows > 0 and (self.answering or enough)
        self.n_answer_steps += self.answering
        return self.answering and not (self.trainer.busy and self.n_answer_steps % ANSWER_STEPS_A_PASS == 0)

    def _evaluate(self, request_id: str, request: TTTRequest, stack: dict[str, Adapter]) -> None:
        job = train_job(request, self.settings.max_seq_length) if request.training_wanted else None
        if job is not None:
            self.base.layout(job.lora)  # refuses unknown targets now
        evaluation = Evaluation(request, questions_of(self.base, request, tuple(stack)), tuple(stack.values()))
        self.evaluations[request_id] = evaluation
        for question in [] if request.skip_baseline else evaluation.questions:
            if question in self.baselines:
                evaluation.set_baseline(question, self.baselines[question])
            elif question not in self.asked:
                self._ask(("", question), question, evaluation.stack)
                self.asked.add(question)
        if job is not None:
            self.trainer.submit(job, evaluation.stack)
        self._grade_if_complete(request_id)

    def _ask(self, key: Key, question: Question, adapters: tuple[Adapter, ...]) -> None:
        row = decode_row(self.base, question.prompt_ids, question.max_new_tokens, key=key, adapters=adapters)
        self.decoder.submit(row)

    def _trained(self, trained: Trained) -> None:
        """Keep the adapter if it has a name, and ask it the questions."""
        request_id = trained.job.name
        evaluation = self.evaluations.get(request_id)
        if evaluation is None:
            return
        if trained.adapter is None:
            self._fail(request_id, SettingsError(trained.error))
            return
        evaluation.trained, evaluation.trained_s = trained, time.monotonic()
        try:
            if (name := evaluation.request.adapter_name) is not None:
                evaluation.adapter_path = str(self.kept.keep(name, trained.adapter))
            for i, question in enumerate(evaluation.questions):
                self._ask((request_id, i), question, (*evaluation.stack, trained.adapter))
        except REQUEST_FAULTS as error:  # a full disk, a prompt that is too long
            self._fail(request_id, error)
        else:
            self._grade_if_complete(request_id)

    def _decoded(self, decoded: Decoded) -> None:
        request_id, place = cast(Key, decoded.key)
        if isinstance(place, Question):
            self._base_answered(place, decoded)
        elif decoded.error and request_id in self.evaluations | self.generations:
            self._fail(request_id, SettingsError(decoded.error))
        elif (generation := self.generations.get(request_id)) is not None:
            generation.texts[place] = decoded
            if len(generation.texts) == len(generation.request.prompts):
                self.done.append(self.generations.pop(request_id).reply(self.model_id))
        elif request_id in self.evaluations:
            self.evaluations[request_id].answers[place] = decoded.text.strip()
            self._grade_if_complete(request_id)

    def _base_answered(self, question: Question, decoded: Decoded) -> None:
        """Store the base's answer, in all requests that wait for it too; or fail these requests."""
        self.asked.discard(question)
        text = decoded.text.strip()
        if not decoded.error:
            self.baselines[question] = text
            while len(self.baselines) > MOST_STORED:
                del self.baselines[next(iter(self.baselines))]
        for request_id, evaluation in list(self.evaluations.items()):
            if decoded.error and evaluation.baseline and question in evaluation.questions:
                self._fail(request_id, SettingsError(decoded.error))
            elif not decoded.error:
                evaluation.set_baseline(question, text)
                self._grade_if_complete(request_id)

    def _grade_if_complete(self, request_id: str) -> None:
        """Score a request that has all its answers, and send it to the grader."""
        evaluation = self.evaluations.get(request_id)
        if evaluation is None or not evaluation.complete:
            return
        # Tokens of a pass of scoring; if deterministic, one text a pass.
        budget = 1 if self.settings.deterministic else self.trainer.token_budget.now
        try:
            if evaluation.request.soft_scores or evaluation.request.return_token_logprobs:
                evaluation.scores = scored_texts(self.base, evaluation, token_budget=budget)
        except REQUEST_FAULTS as error:
            self._fail(request_id, error)
            return
        evaluation.drop_adapters()  # a slow judge must not keep their memory
        evaluation.answered_s = time.monotonic()
        evaluation.verdicts = self.grading_threads.submit(partial(evaluation.grade, self.grader))
        self.gradings[request_id] = self.evaluations.pop(request_id)

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
        in_progress: dict[str, Any] = self.evaluations | self.generations | self.gradings
        wants_traceback = in_progress[request_id].request.traceback
        self.cancel(request_id)
        trace = "".join(traceback.format_exception(error)) if wants_traceback else None
        self.done.append(error_reply(error, request_id=request_id, traceback=trace))


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
