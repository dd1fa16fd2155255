"""The messages between front end and workers: kind, a small JSON header, a body.

Worker → front end: ``ready`` (capacity, model_id, …), ``beat`` (lease, capacity, steps, stats), ``result``
(token; body: the reply), ``failed`` (error, traceback: it ends now), ``leaving``. Front end → worker:
``welcome`` (lease), ``beat``, ``expired`` (your lease is gone: drop everything, say ready again), ``job``
(token, key, seed; body: the request as the client sent it), ``cancel`` (key), ``stop``, ``abort`` (you are
stuck: end at once). Clients never speak this; theirs is ``seal_nb.protocol``.
"""

import json
from dataclasses import dataclass
from typing import Any

from seal_nb.errors import ProtocolError


@dataclass(frozen=True, kw_only=True)
class Message:
    """One message, either way."""

    kind: str
    header: dict[str, Any]
    body: bytes = b""


def pack(kind: str, body: bytes = b"", **header: Any) -> list[bytes]:
    """The frames of one message."""
    return [kind.encode(), json.dumps(header).encode(), body]


def unpack(frames: list[bytes]) -> Message:
    """The message in ``frames``. Raises ProtocolError."""
    try:
        kind, header, body = frames
        fields = json.loads(header)
        if not isinstance(fields, dict):
            raise ValueError("the header is not an object")
        return Message(kind=kind.decode("ascii"), header=fields, body=body)
    except (ValueError, RecursionError) as error:
        sizes = [len(frame) for frame in frames]
        raise ProtocolError(f"not a message of this service: frames of {sizes} bytes ({error})") from error
