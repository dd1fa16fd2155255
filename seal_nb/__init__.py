"""Put knowledge into a language model's weights with self-edits (SEAL, arXiv 2506.10943): `import seal_nb as seal`.

Load passages, start or connect to a TTT server, run an experiment, look at DataFrames and figures: docs/api.md.
Names are imported when they are first used. torch is never imported, so a laptop can drive a cluster.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from seal_nb.experiments.continual import continual
    from seal_nb.experiments.cpt import cpt
    from seal_nb.experiments.create import create_self_edits
    from seal_nb.experiments.rest_em import rest_em_round
    from seal_nb.experiments.session import connect, ttt_server
    from seal_nb.experiments.settings import Training
    from seal_nb.experiments.single_passage import eval_questions, evaluate, reply_frame, train_and_ask, train_sequences
    from seal_nb.experiments.sweep import sweep
    from seal_nb.metrics import accuracy
    from seal_nb.passages import Passage, load_passages
    from seal_nb.prompts import self_edit_prompt
    from seal_nb.protocol import EvalQuestion
    from seal_nb.results.collect import collect, read_run
    from seal_nb.results.run import compare
    from seal_nb.sft.settings import SftSettings
    from seal_nb.storage import runs_folder
    from seal_nb.views.live import Summary
    from seal_nb.views.plots import plot_gold_logprobs, plot_losses
    from seal_nb.views.tables import show

_NAMES = {
    "experiments.continual": ["continual"],
    "experiments.cpt": ["cpt"],
    "experiments.create": ["create_self_edits"],
    "experiments.rest_em": ["rest_em_round"],
    "experiments.session": ["connect", "ttt_server"],
    "experiments.settings": ["Training"],
    "experiments.single_passage": ["eval_questions", "evaluate", "reply_frame", "train_and_ask", "train_sequences"],
    "experiments.sweep": ["sweep"],
    "metrics": ["accuracy"],
    "passages": ["Passage", "load_passages"],
    "prompts": ["self_edit_prompt"],
    "protocol": ["EvalQuestion"],
    "results.collect": ["collect", "read_run"],
    "results.run": ["compare"],
    "sft.settings": ["SftSettings"],
    "storage": ["runs_folder"],
    "views.live": ["Summary"],
    "views.tables": ["show"],
    "views.plots": ["plot_gold_logprobs", "plot_losses"],
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names}
__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'seal_nb' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(import_module(f"seal_nb.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
