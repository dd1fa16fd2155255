"""An engine by its name, for the length of a ``with`` block."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from seal_nb.engines.api import ApiSettings, OpenAIEngine
from seal_nb.engines.base import Engine
from seal_nb.engines.vllm import VllmEngine, VllmServer
from seal_nb.errors import SettingsError


@contextmanager
def chosen_engine(
    name: str,
    *,
    model: str,
    run_dir: Path,
    url: str = "",
    api_key_env: str = "",
    max_parallel: int = 32,
    n_threads: int = 1,
) -> Iterator[Engine]:
    """The engine that the parameters of `01_create_self_edits` name; ``run_dir`` is for ``vllm.log``. Without ``url``
    "vllm" starts a server of its own, which stops at the end of the block, and "openai" asks OpenAI, whose key is in
    OPENAI_API_KEY unless ``api_key_env`` names another variable. A service at ``url`` gets only a key that is named.
    Raises: SettingsError for settings that do not fit the engine; EngineError where the server does not answer."""
    if name == "local":
        if url:
            raise SettingsError(f"engine_url={url!r} is for the engines vllm and openai; this one is local")
        from seal_nb.engines.local import load_local_engine

        yield load_local_engine(model, n_threads=n_threads)
    elif name == "vllm" and not url:
        with VllmServer(model, run_dir=run_dir) as server:
            yield VllmEngine.of(server, max_parallel=max_parallel)
    elif name in ("vllm", "openai"):
        api_key_env = api_key_env or ("" if url else ApiSettings.api_key_env)
        settings = ApiSettings(base_url=url or ApiSettings.base_url, api_key_env=api_key_env, max_parallel=max_parallel)
        yield VllmEngine.at(settings, model=model) if name == "vllm" else OpenAIEngine(settings, model=model)
    else:
        raise SettingsError(f"engine={name!r}: known are local, vllm, openai")
