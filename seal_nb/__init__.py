"""Put knowledge into a language model's weights with self-edits (SEAL, arXiv 2506.10943): `import seal_nb as seal`.

Load passages, start or connect to a TTT server, run an experiment, look at DataFrames and figures: docs/api.md.
Names are imported when they are first used. torch is never imported, so a laptop can drive a cluster.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from seal_nb.experiments.continual import continual as continual
    from seal_nb.experiments.cpt import cpt as cpt
    from seal_nb.experiments.create import create_self_edits as create_self_edits
    from seal_nb.experiments.rest_em import rest_em_round as rest_em_round
    from seal_nb.experiments.session import connect as connect
    from seal_nb.experiments.session import ttt_server as ttt_server
    from seal_nb.experiments.settings import Training as Training
    from seal_nb.experiments.single_passage import eval_questions as eval_questions
    from seal_nb.experiments.single_passage import evaluate as evaluate
    from seal_nb.experiments.single_passage import reply_frame as reply_frame
    from seal_nb.experiments.single_passage import train_and_ask as train_and_ask
    from seal_nb.experiments.single_passage import train_sequences as train_sequences
    from seal_nb.experiments.sweep import sweep as sweep
    from seal_nb.metrics import accuracy as accuracy
    from seal_nb.passages import Passage as Passage
    from seal_nb.passages import load_passages as load_passages
    from seal_nb.prompts import self_edit_prompt as self_edit_prompt
    from seal_nb.protocol import EvalQuestion as EvalQuestion
    from seal_nb.results.collect import collect as collect
    from seal_nb.results.collect import read_run as read_run
    from seal_nb.results.compare import compare as compare
    from seal_nb.sft.settings import SftSettings as SftSettings
    from seal_nb.storage import runs_folder as runs_folder
    from seal_nb.views.live import Summary as Summary
    from seal_nb.views.plots import plot_gold_logprobs as plot_gold_logprobs
    from seal_nb.views.plots import plot_losses as plot_losses
    from seal_nb.views.tables import show as show

_MODULES = {
    "EvalQuestion": "protocol",
    "Passage": "passages",
    "SftSettings": "sft.settings",
    "Summary": "views.live",
    "Training": "experiments.settings",
    "accuracy": "metrics",
    "collect": "results.collect",
    "compare": "results.compare",
    "connect": "experiments.session",
    "continual": "experiments.continual",
    "cpt": "experiments.cpt",
    "create_self_edits": "experiments.create",
    "eval_questions": "experiments.single_passage",
    "evaluate": "experiments.single_passage",
    "load_passages": "passages",
    "plot_gold_logprobs": "views.plots",
    "plot_losses": "views.plots",
    "read_run": "results.collect",
    "reply_frame": "experiments.single_passage",
    "rest_em_round": "experiments.rest_em",
    "runs_folder": "storage",
    "self_edit_prompt": "prompts",
    "show": "views.tables",
    "sweep": "experiments.sweep",
    "train_and_ask": "experiments.single_passage",
    "train_sequences": "experiments.single_passage",
    "ttt_server": "experiments.session",
}
__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'seal_nb' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(import_module(f"seal_nb.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
