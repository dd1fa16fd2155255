"""The wire format of the TTT server: requests, replies, and reading them from JSON.

The published request and reply (SEAL, arXiv 2506.10943, the ZMQ server of its knowledge-incorporation code) are kept
with their defaults. Our own fields are optional, so clients written by others work unchanged (docs/protocol.md)."""

import math
import re
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Annotated, Any, Literal, TypeVar

import pydantic
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, FailFast, Field
from pydantic_core import from_json

from seal_nb.errors import ProtocolError, redacted

PROTOCOL_VERSION = "1.0"
MAX_SEED = 2**32 - 1  # the most that NumPy and torch both accept
NAME_PATTERN = r"^[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}$"  # a safe file name: no separator, no leading dot
MAX_ITEMS = 20_000  # sequences, questions or prompts of one request
MAX_LENGTH = 2**20  # tokens of one sequence
MAX_PADDED = 2**22  # tokens of one padded micro-batch
MAX_VALUES = 400_000  # strings, objects, lists and commas of one message; 20,000 questions and sequences have 300,000
MAX_ERROR = 10_000  # characters of an error
QUICK_BYTES = 2**18  # a message of this size is read in less than 0.05 s, whatever is in it
# A string (the last one may have no end), or a character that comes before a value.
_VALUE = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[\[{,]', re.DOTALL)
# Settings of peft.LoraConfig that change an adapter or its training, and that requests do not have.
PEFT_FIELDS = re.findall(
    r"\w+",
    """alora_invocation_tokens alpha_pattern arrow_config bias corda_config ensure_weight_tying eva_config
    exclude_modules init_lora_weights kasa_config layer_replication layers_pattern layers_to_transform loftq_config
    lora_bias lora_ga_config megatron_config modules_to_save monteclora_config peft_type r rank_pattern
    target_parameters trainable_token_indices use_bdlora use_dora use_qalora use_rslora velora_config""",
)
HARMLESS: tuple[Any, ...] = (None, False, [], {}, "none", "LORA")  # their values that change nothing
VerdictWord = Literal["CORRECT", "INCORRECT", "UNGRADED"]


def _number(value: object) -> object:
    if isinstance(value, bool | str | bytes):
        raise ValueError("a number is required")
    return value


def _finite(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _not_sampled(value: int) -> int:
    if value:
        raise ValueError("sampled padding is no longer supported; leave it 0, and use padding_in_loss for all padding")
    return value


def _targets(value: object) -> object:
    texts = value if isinstance(value, list | tuple) else [value]
    if len(texts) > MAX_ITEMS or not all(isinstance(text, str) for text in texts):
        raise ValueError("give a list of names, or one string: 'all-linear' or a regular expression, as in PEFT")
    return value


Whole = Annotated[int, BeforeValidator(_number)]  # 32.0 too: some JSON writers have only floats
Number = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]
Measured = Annotated[float | None, BeforeValidator(_finite)]  # None: not finite, as after a divergence
Name = Annotated[str, Field(pattern=NAME_PATTERN)]
RequestId = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[\x20-\x7e]+$")]
Targets = Annotated[list[str] | str, BeforeValidator(_targets)]
NotSampled = Annotated[Whole, AfterValidator(_not_sampled)]
T = TypeVar("T")
Items = Annotated[list[T], Field(max_length=MAX_ITEMS), FailFast()]
Names = Annotated[list[Name], Field(max_length=1000), FailFast()]
Seed = Annotated[Whole, Field(ge=0, le=MAX_SEED)]


class _Received(BaseModel):
    """A record from the wire: unknown fields are ignored, and null means "use the default"."""

    model_config = ConfigDict(frozen=True, extra="ignore", hide_input_in_errors=True, protected_namespaces=())

    @pydantic.model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, fields: object) -> object:
        return {k: v for k, v in fields.items() if v is not None} if isinstance(fields, dict) else fields


class EvalQuestion(_Received):
    """One closed-book question.

    Args:
        title: of the passage, for the grader.
        context: the passage; the model never sees it.
        question: as the model is asked, with its topic line.
        answer: the gold answer.
        other_answers: gold answers that are right too; the best verdict counts."""

    title: str = ""
    context: str = ""
    question: str
    answer: str
    other_answers: Annotated[list[str], Field(max_length=1000), FailFast()] = []

    @pydantic.model_serializer(mode="wrap")
    def _as_published(self, fields: pydantic.SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without the field that published clients do not send, where it is empty: requests keep their ids."""
        return {name: value for name, value in fields(self).items() if name != "other_answers" or value}


class TTTRequest(_Received):
    """One inner loop: train a temporary adapter on sequences, answer questions without it and with it."""

    train_sequences: Items[str] = Field(default=[], description="texts to train on; none: baseline only")
    eval_questions: Items[EvalQuestion] = Field(default=[], description="asked without and with the adapter")
    lora_rank: Whole = Field(32, ge=1, le=512)
    lora_alpha: Number = Field(64.0, gt=0)
    lora_dropout: Number = Field(0.0, ge=0, lt=1)
    finetune_epochs: Whole = Field(10, ge=1, le=1000)
    finetune_lr: Number = Field(1e-3, ge=0)
    batch_size: Whole = Field(1, ge=1, le=MAX_ITEMS, description="sequences of a micro-batch")
    gradient_accumulation_steps: Whole = Field(1, ge=1, le=MAX_ITEMS, description="micro-batches of an optimiser step")
    end_mask_substring: str = Field("", description="no loss up to the end of its first occurrence")
    skip_training: bool = Field(False, description="true: baseline only")

    request_id: RequestId | None = Field(None, description="the same id gets the same result again")
    seed: Seed | None = Field(None, description="none: derived from the server's seed and the content")
    target_modules: Targets = Field(default=[], description="names, or one regular expression; empty: PEFT's default")
    max_seq_length: Whole = Field(2048, ge=1, le=MAX_LENGTH, description="tokens; longer sequences are cut")
    padding_in_loss: bool = Field(False, description="true: the published training, with padding")
    pad_to: Whole = Field(2048, ge=1, le=MAX_LENGTH, validate_default=True, description="tokens; with padding_in_loss")
    pad_samples: NotSampled = Field(0, description="must be 0; sampled padding is no longer supported")
    max_new_tokens: Whole = Field(64, ge=1, le=8192, description="tokens of an answer")
    soft_scores: bool = Field(False, description="true: log-probabilities of the gold answers too")
    return_token_logprobs: bool = Field(False, description="true: token scores of sequences, gold answers, passages")
    adapter_name: Name | None = Field(None, description="keep the trained adapter under this name")
    adapter_stack: Names = Field(default=[], description="kept adapters below the new one, frozen, in order")
    skip_baseline: bool = Field(False, description="true: only the adapter answers")
    priority: Whole = Field(0, ge=-100, le=100, description="higher goes first among one client's requests")
    traceback: bool = Field(False, description="true: an error reply carries the remote traceback")
    chat: bool = Field(False, description="true: prompts go through the model's chat template")

    @pydantic.field_validator("pad_to")
    @classmethod
    def _check_padding(cls, value: int, others: pydantic.ValidationInfo) -> int:
        known = others.data  # without the fields that are wrong themselves
        rows = min(known.get("batch_size", 1), len(known.get("train_sequences", ())))
        if known.get("padding_in_loss") and value * rows > MAX_PADDED:
            raise ValueError(f"times {rows} sequences of a batch it must be at most {MAX_PADDED}; lower one of them")
        return value

    @property
    def training_wanted(self) -> bool:
        return bool(self.train_sequences) and not self.skip_training


class GenerateRequest(_Received):
    """Text from the server's model, without or with kept adapters."""

    cmd: Literal["generate"] = "generate"
    prompts: Items[str] = Field(min_length=1)
    max_tokens: Whole = Field(64, ge=1, le=8192, description="tokens of one text")
    temperature: Number = Field(1.0, ge=0, description="0: greedy")
    top_p: Number = Field(1.0, gt=0, le=1)
    stop: Annotated[list[str], Field(max_length=100), FailFast()] = Field(
        default=[], description="texts that end a completion, not part of it"
    )
    seed: Seed | None = None
    request_id: RequestId | None = None
    adapter_stack: Names = Field(default=[])
    priority: Whole = Field(0, ge=-100, le=100)
    traceback: bool = False


class Command(_Received):
    """A command to the server. `shutdown` is the published one."""

    cmd: Literal["shutdown", "status", "cancel", "ping", "forget"]
    request_id: RequestId | None = Field(None, description="which request to cancel")
    adapter_names: Names = Field(default=[], description="kept adapters to delete")


M = TypeVar("M", bound=BaseModel)
Work = TTTRequest | GenerateRequest
Request = Work | Command


class _Sent(BaseModel):
    """A reply. Unknown field names are an error, because only our code makes replies."""

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="null", protected_namespaces=())

    def to_json(self) -> bytes:
        return self.model_dump_json(exclude_none=isinstance(self, ErrorReply)).encode()


class ScoredText(_Sent):
    """Log-probabilities of one text, token by token, in nats, without and with the adapter. None: no token predicts
    this one, or (in a train sequence) it carries no loss. `index` is that of the train sequence, the question, or the
    first question about the passage. The joined `tokens` are the text that was used."""

    kind: Literal["train", "gold", "passage"]
    index: int
    tokens: list[str]
    baseline_logprobs: list[Measured]
    adapter_logprobs: list[Measured] = []  # empty: no adapter was trained


class TTTReply(_Sent):
    """The reply to a TTTRequest, published fields first. Lists over questions have the order of the request."""

    baseline_accuracy: float | None
    adapter_accuracy: float | None
    adapter_gain: float | None
    baseline_texts: list[str]
    adapter_texts: list[str]
    baseline_correct: list[bool | None]
    adapter_correct: list[bool | None]
    gains: list[int | None]

    request_id: str | None = None
    seed: int | None = None
    baseline_verdicts: list[VerdictWord] = []
    adapter_verdicts: list[VerdictWord] = []
    n_ungraded: int = 0
    baseline_gold_logprobs: list[Measured] = []  # nats, summed over the gold answer's tokens
    adapter_gold_logprobs: list[Measured] = []
    gold_token_counts: list[int] = []
    token_logprobs: list[ScoredText] = []
    train_tokens: int = 0
    train_steps: int = 0
    epoch_losses: list[Measured] = []
    timings: dict[str, float] = {}  # seconds: queue_s, train_s, answer_s, grade_s
    model_id: str = ""
    server_id: str = ""
    protocol_version: str = PROTOCOL_VERSION
    adapter_path: str | None = None


class GenerateReply(_Sent):
    """The reply to a GenerateRequest: one text for each prompt, in order."""

    texts: list[str]
    token_counts: list[int]
    finish_reasons: list[Literal["stop", "length"]]
    request_id: str | None = None
    seed: int | None = None
    timings: dict[str, float] = {}
    model_id: str = ""
    server_id: str = ""
    protocol_version: str = PROTOCOL_VERSION


class ErrorReply(_Sent):
    """`{"error": "<Type>: <message>"}` as published. Fields without a value are not sent."""

    error: str
    request_id: str | None = None
    field: str | None = None
    traceback: str | None = None
    server_id: str | None = None
    protocol_version: str = PROTOCOL_VERSION


Reply = TTTReply | GenerateReply | ErrorReply


class WorkerStatus(_Received):
    """One worker process, as the front end knows it."""

    worker_id: str
    host: str
    pid: int
    n_running: int
    capacity: int
    silent_s: float  # since its last heartbeat
    no_step_s: float = 0.0  # since its last step; 0 without work
    model_id: str = ""
    stats: dict[str, Any] = {}

    def number(self, name: str, default: float = 0) -> float:
        """One of its statistics; the default if it is missing, or not a finite number."""
        value = self.stats.get(name)
        return value if isinstance(value, int | float) and math.isfinite(value) else default


class ServerStatus(_Received):
    """The reply to `status`: one server at one moment."""

    server_id: str
    model_id: str
    pid: int
    uptime_s: float
    draining: bool
    n_queued: int
    n_running: int
    n_slots: int
    n_results: int
    n_unsaved: int
    queued_bytes: int
    jobs_per_min: float
    tokens_per_s: float
    rss_bytes: int
    counts: dict[str, int]
    workers: list[WorkerStatus]
    trouble: str = ""


def error_reply(error: BaseException, *, traceback: str | None = None, **known: Any) -> ErrorReply:
    """The reply that reports `error`, with its `field` if it has one. `known`: other fields of ErrorReply."""
    text, field = f"{type(error).__name__}: {error}", getattr(error, "field", None)
    # Half a surrogate pair, as in a broken file name, is not JSON.
    text = redacted(text[: 2 * MAX_ERROR])[:MAX_ERROR].encode(errors="backslashreplace").decode()
    known["field"] = field if isinstance(field, str) and field else None
    return ErrorReply(error=text, traceback=redacted(traceback) if traceback else None, **known)


@dataclass(frozen=True, kw_only=True)
class Answers:
    """Answers of the base or of the adapter, one for each question."""

    texts: Sequence[str]
    verdicts: Sequence[str]  # grading.base.Verdict, or its words
    gold_logprobs: Sequence[float | None] = ()

    def correct(self) -> list[bool | None]:
        return [None if v == "UNGRADED" else v == "CORRECT" for v in self.verdicts]


def accuracy(correct: Sequence[float | None]) -> float | None:
    """The share of graded answers that are correct.

    Args:
        correct: a verdict of each answer: True or False, 1.0 or 0.0; None for an ungraded one.

    Returns:
        A fraction; None where none was graded, and without answers."""
    graded = [verdict for verdict in correct if verdict is not None]
    return sum(graded) / len(graded) if graded else None


def gain(baseline: Sequence[float | None], adapter: Sequence[float | None]) -> float | None:
    """Adapter accuracy minus baseline accuracy, unrounded; None where either is."""
    before, after = accuracy(baseline), accuracy(adapter)
    return None if before is None or after is None else after - before


def rounded(value: float | None) -> float | None:
    """As published: to 4 decimals."""
    return None if value is None else round(value, 4)


def build_reply(*, baseline: Answers | None, adapter: Answers | None = None, **measured: Any) -> TTTReply:
    """The reply with the published numbers, computed from answers. `measured`: other fields of TTTReply. Without
    `baseline` (`skip_baseline`), its accuracy and the gains are null. Without `adapter` (baseline only), the baseline's
    answers are repeated and the gain is 0. All are rounded to 4 decimals, the gain after the subtraction."""
    after = adapter or baseline or Answers(texts=[], verdicts=[])
    before = baseline or Answers(texts=[], verdicts=["UNGRADED"] * len(after.verdicts))
    before_correct, after_correct = before.correct(), after.correct()
    pairs = list(zip(before_correct, after_correct, strict=True))
    shares = accuracy(before_correct), accuracy(after_correct), gain(before_correct, after_correct)
    share_before, share_after, gained = shares if pairs else (0.0, 0.0, 0.0)  # without questions, as published
    return TTTReply(
        baseline_accuracy=rounded(share_before),
        adapter_accuracy=rounded(share_after),
        adapter_gain=rounded(gained),
        baseline_texts=list(before.texts),
        adapter_texts=list(after.texts),
        baseline_correct=before_correct,
        adapter_correct=after_correct,
        gains=[None if a is None or b is None else int(a) - int(b) for b, a in pairs],
        baseline_verdicts=[str(v) for v in baseline.verdicts] if baseline else [],  # type: ignore[misc]
        adapter_verdicts=[str(v) for v in after.verdicts],  # type: ignore[misc]
        n_ungraded=sum(a is None or (b is None and baseline is not None) for b, a in pairs),
        baseline_gold_logprobs=list(before.gold_logprobs),
        adapter_gold_logprobs=list(after.gold_logprobs),
        **measured,
    )


def read_json(message: bytes) -> dict[str, Any]:
    """The JSON object in `message`. Raises ProtocolError if it is anything else (NaN is not JSON)."""
    try:
        fields = from_json(message, allow_inf_nan=False)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"{len(message)} bytes that are not JSON ({error}); send one UTF-8 JSON object") from error
    if not isinstance(fields, dict):
        raise ProtocolError(f"the message is a JSON {type(fields).__name__}; send one JSON object")
    return fields


def check_values(message: bytes) -> None:
    """Raises ProtocolError for a message with too many values, which would take seconds and gigabytes to read."""
    if len(message) > QUICK_BYTES and sum(1 for _ in islice(_VALUE.finditer(message), MAX_VALUES + 1)) > MAX_VALUES:
        raise ProtocolError(
            f"the message has more than {MAX_VALUES} strings, objects, lists and commas; send less at once"
        )


def parse_request(message: bytes | dict[str, Any]) -> Request:
    """Validate a request (or its decoded fields). Raises ProtocolError naming the field, its value and the remedy."""
    fields = read_json(message) if isinstance(message, bytes) else message
    if (cmd := fields.get("cmd")) is not None:
        return validated(GenerateRequest, fields) if cmd == "generate" else validated(Command, fields)
    if fields.get("train_sequences") is None and fields.get("eval_questions") is None:
        found = f"neither train_sequences nor eval_questions nor cmd, but {_shown(sorted(fields))}"
        raise ProtocolError(f"the request has {found}; send one of them", field="train_sequences")
    for name in [name for name in PEFT_FIELDS if name in fields]:
        if fields[name] not in HARMLESS and (name, fields[name]) != ("init_lora_weights", True):
            remedy = "leave it out and send lora_rank" if name == "r" else "leave it out"
            problem = f"field {name!r} is {_shown(fields[name])}: requests do not have this setting of PEFT"
            raise ProtocolError(f"{problem}; {remedy}", field=name)
    return validated(TTTRequest, fields)


def validated(kind: type[M], fields: dict[str, Any]) -> M:
    """A record of these fields. Raises: ProtocolError for the first wrong one."""
    try:
        return kind.model_validate(fields)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where, problem = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
        value = "is missing" if first["type"] == "missing" else f"is {_shown(first['input'])}"
        others = f" ({error.error_count() - 1} more fields are wrong)" if error.error_count() > 1 else ""
        remedy = f"correct {where!r} as docs/protocol.md describes it, or leave it out where it has a default"
        raise ProtocolError(f"field {where!r} {value}: {problem}{others}; {remedy}", field=where) from None


def _shown(value: object) -> str:
    text = ascii(value[:80]) if isinstance(value, str) else reprlib.repr(value)  # which looks at a few items only
    text = text.encode("ascii", "backslashreplace").decode()
    return text if len(text) <= 80 else f"{text[:80]}…"


def read_reply(message: bytes) -> Reply | dict[str, Any]:
    """A reply record, or the plain object of a reply to a command; unknown fields are ignored. Raises ProtocolError."""
    fields = read_json(message)
    kind: type[TTTReply] | type[GenerateReply] | type[ErrorReply]
    for mark, kind in (("error", ErrorReply), ("baseline_accuracy", TTTReply), ("token_counts", GenerateReply)):
        if mark in fields:
            return validated(kind, {name: fields[name] for name in fields.keys() & kind.model_fields.keys()})
    return fields
