"""An engine by its name, for as long as a ``with`` block lasts: what a notebook's parameter becomes."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from seal_nb.engines.api import ApiSettings
from seal_nb.engines.base import Engine
from seal_nb.errors import SettingsError

ENGINES = ("local", "vllm", "openai")
OPENAI_URL = ApiSettings().base_url


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
    """ "local": in this process; "vllm": the server at ``url``, or one of our own that ends with the block
    and whose log lies in ``run_dir``; "openai": the service at ``url``, OpenAI itself where it is empty.

    ``api_key_env`` names the variable that holds the key, empty where none is needed. ``chat``: an openai
    service is only asked in chats. Raises: SettingsError, EngineError.
    """
    if name not in ENGINES:
        raise SettingsError(f"engine={name!r}: known are {', '.join(ENGINES)}")
    if name == "local":
        if url:
            raise SettingsError(f"engine_url={url!r} is for the engines vllm and openai; this one is local")
        from seal_nb.engines.local import load_local_engine

        yield load_local_engine(model, n_threads=n_threads)
        return
    settings = ApiSettings(base_url=url or OPENAI_URL, api_key_env=api_key_env, max_parallel=max_parallel)
    if name == "openai":
        from seal_nb.engines.api import OpenAIEngine

        yield OpenAIEngine(settings, model=model, chat_only=chat)
        return
    from seal_nb.engines.vllm import VllmEngine, VllmOptions, VllmServer

    if url:
        yield VllmEngine.at(settings, model=model)
        return
    with VllmServer(VllmOptions(model=model), run_dir=run_dir) as server:
        yield VllmEngine.of(server, max_parallel=max_parallel)
