"""Whether a request is within what one server takes: ``settings.Limits`` against a message and a request.

A refusal names the field, its value and the bound. What waits in the queue is bounded by ``desk``.
"""

from seal_nb.errors import ProtocolError
from seal_nb.protocol import GenerateRequest, TTTRequest, Work
from seal_nb.service.settings import Limits


def check_size(message: bytes, most: int) -> None:
    """Raises ProtocolError for a message above the bound, before anything reads it."""
    if len(message) > most:
        raise ProtocolError(
            f"the message has {len(message)} bytes, {most} are the most; send fewer sequences or questions"
        )


def check_limits(request: Work, limits: Limits) -> None:
    """Raises ProtocolError naming the field, its value and the bound."""
    if isinstance(request, GenerateRequest):
        bounds = [
            ("prompts", len(request.prompts), limits.max_questions),
            ("max_tokens", request.max_tokens, limits.max_tokens),
        ]
    else:
        bounds = _bounds(request, limits)
    for name, value, most in bounds:
        if value > most:
            raise ProtocolError(
                f"field {name!r} is too large: {value}, this server takes {most} at most; "
                "send less, or raise the bound where the server is started",
                field=name,
            )


def _bounds(request: TTTRequest, limits: Limits) -> list[tuple[str, int, int]]:
    return [
        ("train_sequences", len(request.train_sequences), limits.max_sequences),
        ("eval_questions", len(request.eval_questions), limits.max_questions),
        ("lora_rank", request.lora_rank, limits.max_rank),
        ("finetune_epochs", request.finetune_epochs, limits.max_epochs),
        ("max_new_tokens", request.max_new_tokens, limits.max_tokens),
        ("batch_size", request.batch_size, limits.max_sequences),
        ("gradient_accumulation_steps", request.gradient_accumulation_steps, limits.max_sequences),
        ("max_seq_length", request.max_seq_length, 2**20),
        ("pad_to", request.pad_to, 2**20),
        ("adapter_stack", len(request.adapter_stack), 1_000),
        ("target_modules", len(request.target_modules), 1_000),
    ]
