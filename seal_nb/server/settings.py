"""What a TTT server may be told: addresses, workers, bounds. Declared once, for all who start one.

No sockets and no torch: the front end, the workers and the launcher all read these records.
"""

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from seal_nb.errors import SettingsError

DEFAULT_INNER_LOOP = "seal_nb.server.worker:load_inner_loop"


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The most that one server takes; anything above is refused with an error that names the bound."""

    max_message_bytes: int = 64 * 2**20
    max_queued: int = 20_000  # requests waiting, of all clients together
    max_queued_per_client: int = 10_000
    max_queued_bytes: int = 2**30
    max_unsaved_bytes: int = 2**28  # of results in memory while the disk is full
    max_sequences: int = 20_000  # CPT on 200 passages sends about 1,000
    max_questions: int = 20_000
    max_rank: int = 512
    max_epochs: int = 1_000
    max_tokens: int = 8_192  # of one answer or one self-edit; published self-edits: 8192


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """One server: a front end and ``n_workers`` worker processes on this machine (others may join)."""

    endpoint: str = "tcp://127.0.0.1:0"  # port 0: a free one, told in the endpoint file
    worker_endpoint: str = ""  # empty: a free port on the address of endpoint
    advertise_host: str = ""  # the name that other nodes know this one by; empty: found out
    model: str = "embedded"
    n_workers: int = 1
    n_slots: int = 0  # adapters trained side by side in one worker; 0: 8 on a CPU, 88 on a GPU
    n_threads: int = 1  # of torch, in one worker
    device: str = "auto"
    dtype: str = "auto"
    deterministic: bool = False  # one adapter and one text at a time in a worker: the same bits every time
    max_seq_length: int = 2048  # tokens
    grader: str = "local"
    seed: int = 0  # seeds of requests that bring none derive from it
    run_dir: Path = Path("runs/server")
    endpoint_file: Path | None = None  # empty: endpoint.json in run_dir
    idle_timeout_s: float = 0.0  # end after so long without a client; 0: never
    drain_s: float = 20.0  # SIGTERM: running requests may take so long; SLURM kills 30 s after it
    lease_s: float = 30.0  # a worker silent for so long has lost its requests
    stall_s: float = 3600.0  # a worker that has requests and makes no step for so long is killed; 0: never
    job_timeout_s: float = 86_400.0  # one try of one request may take so long, else the same; 0: for ever
    max_tries: int = 3  # times that a request may lose its worker
    inner_loop: str = DEFAULT_INNER_LOOP  # module:function that loads what the workers drive
    parent_pid: int = 0  # end with this process; 0: with none
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        object.__setattr__(self, "run_dir", Path(self.run_dir))
        if isinstance(self.limits, dict):
            object.__setattr__(self, "limits", Limits(**self.limits))
        if self.endpoint_file is not None:
            object.__setattr__(self, "endpoint_file", Path(self.endpoint_file))
        for name, least in (("n_workers", 0), ("n_slots", 0), ("n_threads", 1), ("max_tries", 1), ("seed", 0)):
            _at_least(name, getattr(self, name), least)
        for name in ("lease_s", "drain_s", "idle_timeout_s", "stall_s", "job_timeout_s"):
            _at_least(name, getattr(self, name), 0)
        if self.inner_loop.count(":") != 1:
            raise SettingsError(f"inner_loop is {self.inner_loop!r}; write it as module:function")

    @property
    def endpoint_path(self) -> Path:
        return self.endpoint_file or self.run_dir / "endpoint.json"

    @property
    def adapters_dir(self) -> Path:
        return self.run_dir / "adapters"


def option_type(kind: Any) -> Any:
    """What reads a command-line option of this type; bool reads "True" and "False"."""
    return _truth if kind is bool else kind


def _truth(text: str) -> bool:
    try:
        return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
    except KeyError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false") from None


def _at_least(name: str, value: float, least: float) -> None:
    if value < least:
        raise SettingsError(f"{name} is {value}; it must be at least {least}")
