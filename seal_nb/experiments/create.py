"""Creating self-edits: a model or service writes texts about passages (`create_self_edits`)."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from seal_nb.engines.api import ApiSettings, OpenAIEngine
from seal_nb.engines.base import Engine, Prompt, Sampling, contents
from seal_nb.engines.vllm import VllmEngine, VllmServer
from seal_nb.errors import SettingsError
from seal_nb.experiments.session import work_of_texts
from seal_nb.metrics import accuracy
from seal_nb.passages import Passage, to_item
from seal_nb.prompts import SelfEditPrompt, find_prompts
from seal_nb.self_edits import sequences_of_text, write_self_edits
from seal_nb.storage import Journal, runs_folder, write_json, write_record
from seal_nb.views import plots
from seal_nb.views.live import Progress, say


@dataclass(kw_only=True)
class SelfEdits:
    """The passages with their self-edits, and the item file that was written (`path`)."""

    passages: list[Passage]
    path: Path
    n_texts: int
    n_tokens: int
    n_cut: int  # texts that reached max_tokens

    def frame(self) -> pd.DataFrame:
        """One row for each self-edit: words, train sequences, share of words that the passage does not have."""
        rows = []
        for passage in self.passages:
            known = set(re.findall(r"\w+", passage.context.casefold()))
            for number, text in enumerate(passage.completions):
                words = re.findall(r"\w+", text.casefold())
                sequences = sequences_of_text(text, title=passage.title, context="", split_newlines=True)
                new = accuracy([word not in known for word in words])
                rows.append((passage.title, number, len(text.split()), len(sequences), new))
        return pd.DataFrame(rows, columns=["passage", "self_edit", "words", "train_sequences", "new_words"])

    def plot_lengths(self) -> Figure:
        """Words of each self-edit, and of its passage."""
        return plots.plot_self_edit_lengths(
            [passage.title for passage in self.passages],
            [[len(text.split()) for text in passage.completions] for passage in self.passages],
            [len(passage.context.split()) for passage in self.passages],
        )


def create_self_edits(
    passages: Sequence[Passage],
    *,
    model: str = "embedded",
    engine: str = "local",
    prompt_key: str | Sequence[SelfEditPrompt] = "implications",
    k_completions: int = 5,
    temperature: float = 1.0,
    top_p: float = 0.95,
    max_tokens: int = 8192,
    chat: bool = False,
    engine_url: str = "",
    api_key_env: str = "",
    max_parallel: int = 32,
    n_threads: int = 1,
    price_in: float = 0.0,
    price_out: float = 0.0,
    seed: int = 42,
    folder: str | Path = "runs/self_edits",
    dataset: str = "",
) -> SelfEdits:
    """Have a model write self-edits of each passage, and write them to an item file (`self_edits.json`).

    Args:
        passages: to write about.
        model: folder or hub name, or the model's name at a service.
        engine: "local" (transformers, in this process), "vllm" (a server), "openai" (any compatible service).
        prompt_key: key of a published prompt, path of a text file, or prompts; those of a family are used in turn.
        k_completions: self-edits of each passage.
        temperature: 0 is greedy.
        top_p: nucleus sampling.
        max_tokens: tokens of one self-edit at most; a longer text is cut and used, as published.
        chat: through the model's chat template.
        engine_url: of a running server; empty: a vLLM server started here, or OpenAI.
        api_key_env: name of the environment variable that holds the key; empty: OPENAI_API_KEY for OpenAI, else none.
        max_parallel: requests at a time (vllm, openai).
        n_threads: CPU threads (local).
        price_in: of a million prompt tokens, for the line that says how much work it is.
        price_out: of a million new tokens.
        seed: every text derives its own from it.
        folder: for the item file, its record and the journal; a second call writes only what is missing.
        dataset: name of the data, for the record.

    Returns:
        The passages with their self-edits.

    Raises:
        EngineError: when texts are missing in the end; the others are in the journal.
        SettingsError: for settings that do not fit.

    Source: SEAL, arXiv 2506.10943: five self-edits of each passage at temperature 1."""
    folder = runs_folder(folder)
    prompts = find_prompts(prompt_key) if isinstance(prompt_key, str) else list(prompt_key)
    sampling = Sampling(max_tokens=max_tokens, temperature=temperature, top_p=top_p)
    if engine == "local":
        from transformers.utils import logging

        logging.disable_progress_bar()  # a bar in a saved notebook is out of date at once

    def say_work(asked: Sequence[Prompt]) -> None:
        if prompts := [contents(one) for one in asked]:
            work = work_of_texts(prompts, max_tokens=max_tokens, price_in=price_in, price_out=price_out)
            say(f"to do: {work}")

    own: dict[str, Any] = {"api_key_env": api_key_env, "max_parallel": max_parallel, "n_threads": n_threads}
    with (
        Journal(folder / "journal.jsonl") as journal,
        chosen_engine(engine, model=model, run_dir=folder, url=engine_url, **own) as writer,
    ):
        how: dict[str, Any] = {"k_completions": k_completions, "sampling": sampling, "chat": chat}
        told: dict[str, Any] = {"on_start": say_work, "on_text": Progress("self-edits").at}
        written, texts = write_self_edits(writer, passages, prompts=prompts, seed=seed, journal=journal, **how, **told)
        model_id = writer.model_id
    not_sent = sorted({name for text in texts for name in text.not_sent})
    path = write_json(folder / "self_edits.json", [to_item(passage) for passage in written])
    made = {
        "engine": engine,
        "model": model_id,
        "dataset": Path(dataset).name,
        "prompt_key": prompt_key if isinstance(prompt_key, str) else "",
        "prompts": [asdict(prompt) for prompt in prompts],
        **how,
        "sampling": asdict(sampling),
        **({"not_sent": not_sent} if not_sent else {}),
    }
    write_record(path, stage="01_create_self_edits", settings=made, seeds={"seed": seed})
    n_cut = sum(text.finish_reason == "length" for text in texts)
    n_tokens = sum(text.n_tokens for text in texts)
    return SelfEdits(passages=written, path=path, n_texts=len(texts), n_tokens=n_tokens, n_cut=n_cut)


@contextmanager
def chosen_engine(
    name: str, *, model: str, run_dir: Path, url: str = "", api_key_env: str = "", n_threads: int = 1, **api: Any
) -> Iterator[Engine]:
    """The engine that the parameters of `01_create_self_edits` name; ``run_dir`` is for ``vllm.log``. Without ``url``
    "vllm" starts a server of its own, which stops at the end of the block, and "openai" asks OpenAI, whose key is in
    OPENAI_API_KEY unless ``api_key_env`` names another variable. A service at ``url`` gets only a key that is named.
    ``api``: other fields of ``ApiSettings``.
    Raises: SettingsError for settings that do not fit the engine; EngineError where the server does not answer."""
    if name == "local":
        if url:
            raise SettingsError(f"engine_url={url!r} is for the engines vllm and openai; this one is local")
        from seal_nb.engines.local import load_local_engine

        yield load_local_engine(model, n_threads=n_threads)
    elif name == "vllm" and not url:
        with VllmServer(model, run_dir=run_dir) as server:
            yield VllmEngine.of(server, **api)
    elif name in ("vllm", "openai"):
        api_key_env = api_key_env or ("" if url else ApiSettings.api_key_env)
        settings = ApiSettings(base_url=url or ApiSettings.base_url, api_key_env=api_key_env, **api)
        yield VllmEngine.at(settings, model=model) if name == "vllm" else OpenAIEngine(settings, model=model)
    else:
        raise SettingsError(f"engine={name!r}: known are local, vllm, openai")
