"""Settings of a TTT server and of its workers. Each one is declared once, with its help text.

`parse` reads a command line into settings, `options` writes settings as a command line. `seal-nb serve`, `TTTServer`
and the server that starts its workers all use them.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from seal_nb.errors import SettingsError


def setting(default: Any, text: str, *, least: float | None = None) -> Any:
    """A dataclass field with its help text and its lower bound."""
    return field(default=default, metadata={"text": text, "least": least})


@dataclass(frozen=True, kw_only=True)
class _Settings:
    def __post_init__(self) -> None:
        for one in fields(self):
            value, least = getattr(self, one.name), one.metadata["least"]
            if option_type(one.type) is Path and value is not None:
                object.__setattr__(self, one.name, Path(value))
            elif least is not None and value < least:
                raise SettingsError(f"{one.name} is {value}; it must be at least {least}")


@dataclass(frozen=True, kw_only=True)
class Limits(_Settings):
    """Limits. A request above one of them is refused with an error that names the limit."""

    max_message_bytes: int = setting(64 * 2**20, "bytes of one request")
    max_queued: int = setting(20_000, "waiting requests of all clients together")
    max_queued_per_client: int = setting(10_000, "waiting requests of one client")
    max_queued_bytes: int = setting(2**30, "bytes of all waiting requests")
    max_unsaved_bytes: int = setting(2**28, "bytes of results kept in memory while the disk is full")
    max_sequences: int = setting(20_000, "train sequences of one request; CPT on 200 passages sends about 1,000")
    max_questions: int = setting(20_000, "questions or prompts of one request")
    max_rank: int = setting(512, "LoRA rank")
    max_epochs: int = setting(1_000, "epochs of training")
    max_tokens: int = setting(8_192, "tokens of one answer or one generated text; published self-edits: 8192")


@dataclass(frozen=True, kw_only=True)
class SharedSettings(_Settings):
    """Settings that the server passes on to its workers."""

    model: str = setting("embedded", "model folder or hub name; embedded: the small model that the package fetches")
    device: str = setting("auto", "auto, cpu, cuda or cuda:N; auto: CUDA where there is a GPU")
    dtype: str = setting("auto", "of the base model: auto, float32, bfloat16, float64 or 4bit")
    deterministic: bool = setting(False, "true: one adapter and one text at a time, so results are equal bit by bit")
    n_slots: int = setting(0, "adapters trained at the same time in one worker; 0: 8 on a CPU, 88 on a GPU", least=0)
    n_threads: int = setting(1, "CPU threads of one worker", least=1)
    max_seq_length: int = setting(2048, "tokens; longer train sequences are cut")
    grader: str = setting("local", "local, exact or a judge such as judge:gpt-4.1 (docs/graders.md)")
    inner_loop: str = setting(
        "seal_nb.server.worker:load_inner_loop", "module:function that loads the inner loop; tests replace it"
    )
    lease_s: float = setting(30.0, "a worker that is silent for so many seconds loses its requests", least=0)
    parent_pid: int = setting(0, "end when this process ends; 0: do not watch any process")


@dataclass(frozen=True, kw_only=True)
class ServeSettings(SharedSettings, Limits):
    """The server: a front end, and n_workers worker processes on this machine."""

    endpoint: str = setting("tcp://127.0.0.1:0", "address for clients; port 0: a free port (see the endpoint file)")
    worker_endpoint: str = setting("", "address for workers; empty: a free port at the host of endpoint")
    advertise_host: str = setting("", "name by which other nodes reach this one; empty: the host name")
    n_workers: int = setting(1, "worker processes on this machine; 0: workers join from elsewhere", least=0)
    run_dir: Path = setting(Path("runs/server"), "folder for results, adapters and keys of one server")  # noqa: RUF009
    endpoint_file: Path | None = setting(None, "tells clients where the server is; empty: in run_dir")  # noqa: RUF009
    seed: int = setting(0, "requests without a seed get one that is derived from this", least=0)
    idle_timeout_s: float = setting(0.0, "end after so many seconds without a client; 0: never", least=0)
    drain_s: float = setting(20.0, "seconds for running requests after SIGTERM; SLURM kills after 30", least=0)
    stall_s: float = setting(
        3600.0, "a worker that has requests and makes no step for so many seconds is killed; 0: never", least=0
    )
    job_timeout_s: float = setting(
        86_400.0, "a worker that needs more seconds for one request is killed; 0: never", least=0
    )
    max_tries: int = setting(3, "a request is given up after it has lost its worker so many times", least=1)

    @property
    def endpoint_path(self) -> Path:
        return self.endpoint_file or self.run_dir / "endpoint.json"

    @property
    def adapters_dir(self) -> Path:
        return self.run_dir / "adapters"


@dataclass(frozen=True, kw_only=True)
class WorkerSettings(SharedSettings):
    """One worker process. It needs connect or endpoint_file to find the front end."""

    connect: str = setting("", "address of a front end on this machine")
    endpoint_file: str = setting("", "endpoint file of the server")
    key_file: str = setting("", "CURVE secret key; empty: keys/worker.key_secret in the server's run folder")
    adapters_dir: str = setting("", "folder of kept adapters; empty: adapters in the server's run folder")
    beat_s: float = setting(1.0, "seconds between heartbeats")
    patience_s: float = setting(600.0, "end after so many seconds without a front end")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.connect and not self.endpoint_file:
            raise SettingsError("neither connect nor endpoint_file is given; give the server's endpoint.json")


S = TypeVar("S", bound=_Settings)


def parse(kind: type[S], argv: Sequence[str] | None, *, prog: str, description: str, **defaults: Any) -> S:
    """Settings from a command line with one option for each field; `defaults` replace declared ones."""
    parser = argparse.ArgumentParser(prog=prog, description=description)
    for owner in kind.__mro__[:-2]:
        group = parser.add_argument_group(str(owner.__doc__).splitlines()[0].rstrip("."))
        for one in fields(kind):
            if one.name in owner.__annotations__:
                default = defaults.get(one.name, one.default)
                text = one.metadata["text"] + (f" (default: {default})" if default not in ("", None) else "")
                name, metavar = f"--{one.name.replace('_', '-')}", one.name.rpartition("_")[2].upper()
                group.add_argument(name, type=option_type(one.type), default=default, metavar=metavar, help=text)
    return kind(**vars(parser.parse_args(argv)))


def options(settings: _Settings) -> list[str]:
    """The command line from which `parse` makes `settings` again."""
    values = {one.name: getattr(settings, one.name) for one in fields(settings)}
    return [f"--{name.replace('_', '-')}={value}" for name, value in values.items() if value is not None]


def option_type(kind: Any) -> Any:
    """The function that reads a command-line option of this type; for bool it reads "true" and "false"."""
    return {bool: _truth, Path | None: Path}.get(kind, kind)


def _truth(text: str) -> bool:
    try:
        return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
    except KeyError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false") from None
