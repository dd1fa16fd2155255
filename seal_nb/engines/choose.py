"""An engine by its name, for the length of a ``with`` block."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from seal_nb.engines.api import ApiSettings, OpenAIEngine
from seal_nb.engines.base import Engine
from seal_nb.engines.vllm import VllmEngine, VllmServer
from seal_nb.errors import SettingsError

ENGINES = ("local", "vllm", "openai")


@contextmanager
def chosen_engine(
    name: str,
    *,
    model: str,
    run_dir: Path,
    url: str = "",
    api_key_env: str = "",
    max_parallel: int = 32,
    chat: bool = False,
    n_threads: int = 1,
) -> Iterator[Engine]:
    """The engine that a notebook's parameters name.

    Args:
        name: "local" generates in this process, "vllm" on a vLLM server, "openai" on an OpenAI-compatible service.
        model: folder, hub name or "embedded"; for a server or service, its name for the model.
        run_dir: folder for ``vllm.log``.
        url: address of the server or service. If empty, "vllm" starts a server of its own, which stops at the end of
            the block, and "openai" asks OpenAI.
        api_key_env: name of the environment variable that holds the key; empty if no key is needed.
        max_parallel: requests at a time ("vllm" and "openai").
        chat: send every prompt as a chat ("openai").
        n_threads: CPU threads ("local").

    Raises:
        SettingsError: an unknown engine, or settings that do not fit it.
        EngineError: the server does not start or does not answer.
    """
    if name not in ENGINES:
        raise SettingsError(f"engine={name!r}: known are {', '.join(ENGINES)}")
    if name == "local":
        if url:
            raise SettingsError(f"engine_url={url!r} is for the engines vllm and openai; this one is local")
        from seal_nb.engines.local import load_local_engine

        yield load_local_engine(model, n_threads=n_threads)
    elif name == "vllm" and not url:
        with VllmServer(model, run_dir=run_dir) as server:
            yield VllmEngine.of(server, max_parallel=max_parallel)
    else:
        settings = ApiSettings(base_url=url or ApiSettings.base_url, api_key_env=api_key_env, max_parallel=max_parallel)
        yield (
            VllmEngine.at(settings, model=model)
            if name == "vllm"
            else OpenAIEngine(settings, model=model, chat_only=chat)
        )
