"""The inner loop: requests in, replies out (SEAL, arXiv 2506.10943, section 3.1).

For each request the base answers the questions (these answers are stored), an adapter is trained and answers them, and
a grader gives verdicts. Many requests share the slots and one batch; grading runs in threads, as a judge takes seconds.
"""

import logging
import math
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch

from seal_nb.errors import SettingsError
from seal_nb.grading.base import Grader, Verdict
from seal_nb.grading.choose import make_grader
from seal_nb.inner_loop.evaluation import Evaluation, Generation, Key, Question, evaluation_of, scored_texts, train_job
from seal_nb.inner_loop.settings import InnerLoopSettings
from seal_nb.models import FOUR_BIT, model_identity, resolve_model
from seal_nb.peft_files import KeptAdapters, adapter_for
from seal_nb.processes import DaemonThreads
from seal_nb.protocol import GenerateRequest, Reply, TTTRequest, Work, error_reply
from seal_nb.ttt.base import FrozenBase
from seal_nb.ttt.decode import Decoded, DecodeRow, GroupedDecoder
from seal_nb.ttt.device import Limit, wide
from seal_nb.ttt.lora import Adapter, LoraSettings, features
from seal_nb.ttt.passes import CHUNK
from seal_nb.ttt.trainer import SlotTrainer, Trained

ANSWER_STEPS_A_PASS = 64
# Slots, texts of a batch. So many published train sequences (47 tokens) fill a pass (4096 tokens, on a CPU 376).
USUAL_SIZES = {"cuda": (88, 320), "cpu": (8, 64)}
MOST_STORED = 20_000  # answers of the base: some 50 MB; a server runs for weeks
MOST_GRADED_AT_ONCE = 32  # requests; with so many waiting for a slow judge no new work is taken
LOSS_BYTES = 13  # of each logit of a chunk: the logit, its float32 value and gradient, and what softmax needs
TEXT_TOKENS = 256  # of a prompt and its answer, for the estimate of memory
GRADING_WAIT_S = 0.05  # if there is nothing else to do
log = logging.getLogger(__name__)


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
        sizes = {name: getattr(settings, name) for name in ("n_slots", "token_budget", "decode_rows")}
        self.memory = memory_needed(base, rank=LoraSettings.rank, text_tokens=TEXT_TOKENS, **sizes)
        self.requests: dict[str, Evaluation | Generation] = {}  # by request id
        self.asked: set[Question] = set()  # the base is answering them
        self.baselines: dict[Question, Decoded] = {}  # the base's answers
        self.kept = KeptAdapters(settings.adapters_dir, partial(adapter_for, base), base.name)
        self.grading_threads = DaemonThreads(MOST_GRADED_AT_ONCE)
        self.done: list[Reply] = []
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
            "memory_needed_bytes": sum(self.memory.values()),
            "device": str(self.base.device),
            "dtype": str(self.base.dtype).removeprefix("torch."),
        }

    def submit(self, request: Work) -> None:
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
        """Drop a request and free what it holds. Answers of the base that other requests wait for go on."""
        one = self.requests.pop(request_id, None)
        if isinstance(one, Evaluation) and one.verdicts is not None:
            one.verdicts.cancel()
        self.trainer.cancel(request_id)
        self.decoder.cancel(lambda key: cast(Key, key)[0] == request_id)

    def advance(self) -> list[Reply]:
        """One pass of training, or one token for every text being generated; returns the replies that are complete."""
        if self._answer_now():
            for decoded in self.decoder.step():
                self._decoded(cast(Key, decoded.key), decoded)
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
        for i, (key, prompt) in enumerate(zip(generation.keys, request.prompts, strict=True)):
            seed = (int(request.seed or 0) + i) % 2**63
            ids = self.base.encode(prompt)
            self.base.room_after(ids, f"prompts[{i}]", n_new=1)
            self._ask(key, ids, request.max_tokens, stack, seed=seed, **sampling)

    def _evaluate(self, request_id: str, request: TTTRequest, stack: dict[str, Adapter]) -> None:
        job = train_job(request, self.settings.max_seq_length) if request.training_wanted else None
        if job is not None:
            self.base.layout(job.lora)  # refuses unknown targets now
        self.requests[request_id] = evaluation = evaluation_of(self.base, request, stack)
        for question in evaluation.baseline:
            if question in self.baselines:
                evaluation.texts[question] = self.baselines[question]
            elif question not in self.asked:
                self._ask(question, question.prompt_ids, question.max_new_tokens, evaluation.stack)
                self.asked.add(question)
        if job is not None:
            self.trainer.submit(job, evaluation.stack)
        self._grade_if_complete(evaluation)

    def _ask(self, key: Key, ids: Sequence[int], max_tokens: int, stack: tuple[Adapter, ...], **sampling: Any) -> None:
        """Generate a text, as far as there is room in the model's context."""
        n = min(max_tokens, self.base.room_after(ids, "a prompt", n_new=1))
        self.decoder.submit(DecodeRow(key=key, token_ids=ids, adapters=stack, max_new_tokens=n, **sampling))

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
            for key, question in zip(evaluation.answers, evaluation.questions, strict=True):
                self._ask(key, question.prompt_ids, question.max_new_tokens, stack)
            self._grade_if_complete(evaluation)

    def _decoded(self, key: Key, decoded: Decoded) -> None:
        """Give a text, or the error for which there is none, to all requests that wait for it."""
        if isinstance(key, Question):
            self.asked.discard(key)
            if not decoded.error:
                self.baselines[key] = replace(decoded, token_ids=())  # texts are enough
            while len(self.baselines) > MOST_STORED:
                del self.baselines[next(iter(self.baselines))]
            request_ids = [request_id for request_id, one in self.requests.items() if key in one.keys]
        else:
            request_ids = [key[0]]
        for request_id in request_ids:
            one = self.requests.get(request_id)
            if one is None or key in one.texts:  # it has failed, or it has the stored answer
                continue
            with self._failing_alone(request_id):
                if decoded.error:
                    raise SettingsError(decoded.error)
                one.texts[key] = decoded
                if isinstance(one, Evaluation):
                    self._grade_if_complete(one)

    def _grade_if_complete(self, evaluation: Evaluation) -> None:
        """Score a request that has all its answers, and send it to the grader."""
        if not evaluation.complete:
            return
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
    loop = InnerLoop(base, grader, settings, model_id=model_id)
    parts = ", ".join(f"{use} {n / 2**20:.0f}" for use, n in loop.memory.items())
    log.info("memory, in MiB, with adapters of rank %d on all Linear layers: %s", LoraSettings.rank, parts)
    return loop


def memory_needed(
    base: FrozenBase, *, rank: int, n_slots: int, token_budget: int, decode_rows: int, text_tokens: int
) -> dict[str, int]:
    """Bytes by use, with adapters on all Linear layers, and texts of ``text_tokens`` tokens with their prompts. As many
    trained adapters as slots are kept until they have answered. Training in float32, with rows of 64 tokens on a CPU,
    took 1.06 times as much; decoding took up to 1.4 times the cache, since it is copied as it grows."""
    config, size, exact = base.config, base.dtype.itemsize, wide(base.dtype).itemsize
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    n_features = sum(sum(features(linear)) for linear in base.linears.values())
    adapter = rank * n_features * (exact + size * (size < exact))  # its weights, and a copy in the base's dtype
    return {
        "base": sum(t.nbytes for t in [*base.model.parameters(), *base.model.buffers()]),
        "training": n_slots * (adapter + 3 * rank * n_features * exact),  # with gradient and two moments
        "trained": n_slots * adapter,
        "pass": token_budget * n_features * size,  # it keeps about what goes into and comes out of each Linear
        "loss": min(CHUNK, token_budget) * config.vocab_size * LOSS_BYTES,
        "kv_cache": decode_rows * text_tokens * config.num_hidden_layers * 2 * kv_heads * head_size * size,
    }
