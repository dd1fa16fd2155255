"""The tables of experiments: SEAL's five stages over any number of ReST-EM rounds, and parts of that.

Round 0 is the model as it came. Each round: self-edits of training passages, their reward (one adapter
each), ReST-EM training, then the new model's self-edits of the validation passages, evaluated. The last model
is also edited continually, passage after passage. ``make demo`` is this table with the small model and small
counts; a cluster runs it with Qwen2.5-7B and the published ones. Every setting reaches its
notebook, whose own defaults are those of a minute's try.

One table of stages: which notebook, with which parameters, after which others.

A chain says what an experiment consists of; an executor runs it (``local`` on this machine, ``slurm`` on a
cluster). Paths in parameters are written relative to the run's folder with ``in_run``, so that the same
table serves any folder and any executor. What identifies a stage is its content: notebook, parameters and
what it is made from; a finished stage with the same identity need not run again.

What an experiment on one model consists of, and the small one that `make demo` runs.

Defaults are those of SEAL (arXiv 2506.10943; its run files and scripts), but for ``grader`` and
``padding_in_loss``, whose comments name them; a model, its data and its machine have none.
Of the arms, ``hand_written`` is ours and needs passages that have such texts. What each setting is
called in a notebook stands in ``tables``.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from seal_nb.errors import SettingsError
from seal_nb.experiments.settings import ARMS, Arm
from seal_nb.models import DTYPES
from seal_nb.notebook_runner import Value
from seal_nb.prompts import result_key
from seal_nb.results.single_passage import run_file_name
from seal_nb.storage import content_id, write_json

RUN = "{run}"  # stands for the run's folder in a parameter
DONE_DIR = ".done"
# How a stage computes, not what: fewer slots after an OUT_OF_MEMORY undo nothing that is finished.
MACHINE = frozenset({"n_workers", "n_threads", "n_slots", "n_processes", "endpoint_file", "idle_timeout_s"})
INPUT_FILES = frozenset({"dataset", "prompt_key"})  # parameters that may name a file of the user's


def in_run(stage: str = "", file: str = "") -> str:
    """A path in the folder of ``stage``, for use as a parameter of another stage."""
    return "/".join(part for part in (RUN, stage, file) if part)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One notebook run. Its results lie in the folder of its name; ``output_dir`` need not be given.

    A background stage is a server: it is started before the first stage that needs it and stopped after the
    last; ``produces`` names the file whose appearance means that it is ready. Stages of one ``array`` differ
    in their seed only and are named by it: on a cluster they are one job array, whose task numbers are seeds.
    """

    name: str
    notebook: str
    title: str
    parameters: Mapping[str, Value] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    produces: tuple[str, ...] = ()
    background: bool = False
    array: str = ""

    def __post_init__(self) -> None:
        if self.array and self.name != f"{self.array}_seed{self.parameters.get('seed')}":
            raise SettingsError(f"stage {self.name!r} of array {self.array!r}: name it {self.array}_seed<seed>")
        if self.background and len(self.produces) != 1:
            raise SettingsError(f"background stage {self.name!r}: name the one file that means ready in `produces`")

    def values(self, run_dir: Path) -> dict[str, Value]:
        """The notebook's parameters with real paths."""
        return {
            name: value.replace(RUN, str(run_dir)) if isinstance(value, str) else value
            for name, value in {"output_dir": in_run(self.name), **self.parameters}.items()
        }


@dataclass(frozen=True, kw_only=True)
class Chain:
    """Stages in an order in which they can run one after another."""

    name: str
    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        earlier: set[str] = set()
        for stage in self.stages:
            if stage.name in earlier:
                raise SettingsError(f"chain {self.name!r} has two stages named {stage.name!r}")
            if missing := [name for name in stage.needs if name not in earlier]:
                raise SettingsError(
                    f"stage {stage.name!r} needs {', '.join(missing)}; put it after what it needs, and check the names"
                )
            earlier.add(stage.name)

    def __getitem__(self, name: str) -> Stage:
        return next(stage for stage in self.stages if stage.name == name)

    def __iter__(self) -> Iterator[Stage]:
        return iter(self.stages)

    def users_of(self, server: Stage) -> list[Stage]:
        """The stages during which ``server`` must be up."""
        return [stage for stage in self if server.name in stage.needs]

    def servers_of(self, stage: Stage) -> list[Stage]:
        """The background stages that must be up while ``stage`` runs."""
        return [self[name] for name in stage.needs if self[name].background]

    def identity(self, stage: Stage) -> str:
        """Depends on what the stage computes and from what, not on where the run's folder lies."""
        made_from = [self.identity(self[name]) for name in stage.needs]
        own = {
            name: _content(value) if name in INPUT_FILES else value
            for name, value in stage.parameters.items()
            if name not in MACHINE
        }
        return content_id([stage.notebook, own, made_from])


def is_done(chain: Chain, stage: Stage, run_dir: Path) -> bool:
    """Whether ``stage`` finished in this folder with these parameters and its results are still there."""
    return is_finished(run_dir, stage.name, chain.identity(stage), stage.produces)


def mark_done(chain: Chain, stage: Stage, run_dir: Path, *, seconds: float) -> None:
    """Remember that ``stage`` finished, and how long it took."""
    mark_finished(run_dir, stage.name, chain.identity(stage), notebook=stage.notebook, seconds=seconds)


def is_finished(run_dir: Path, name: str, identity: str, produces: Iterable[str]) -> bool:
    """``is_done``, for who knows a stage by its identity alone."""
    marker = read_marker(run_dir, name)
    return marker.get("identity") == identity and all((run_dir / name / file).exists() for file in produces)


def mark_finished(run_dir: Path, name: str, identity: str, *, notebook: str, seconds: float) -> None:
    marker = {"identity": identity, "notebook": notebook, "seconds": round(seconds, 1)}
    write_json(run_dir / DONE_DIR / f"{name}.json", marker)


def read_marker(run_dir: Path, name: str) -> dict[str, Any]:
    """What was remembered of the stage of that name; empty if nothing was."""
    try:
        marker = json.loads((run_dir / DONE_DIR / f"{name}.json").read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
    return marker if isinstance(marker, dict) else {}


def _content(value: Value) -> Value:
    """A file's content for its name: edited, it is another experiment."""
    path = Path(str(value))
    if not path.is_file():
        return value
    about = path.stat()
    return _digest(path, about.st_mtime_ns, about.st_size)


@lru_cache(maxsize=64)
def _digest(path: Path, _mtime_ns: int, _size: int) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


ENGINES = ("local", "vllm")


@dataclass(frozen=True, kw_only=True)
class ExperimentSettings:
    """Counts, texts, and how adapters and models are trained."""

    model: str
    train_dataset: str
    val_dataset: str
    n_train: int = 50  # passages of a ReST-EM round
    n_val: int = 200  # passages of an evaluation
    k_completions: int = 5  # self-edits a training passage
    eval_times: int = 3  # adapters a self-edit when it is ranked
    n_rounds: int = 2
    arms: tuple[Arm, ...] = ("passage_only", "self_edits")  # of round 0, single passage and CPT
    prompt_key: str = "implications"  # what the model is asked for; a key, a family, or a text file
    engine: str = "local"  # writes the self-edits: local, or vllm (a server of each such stage's own)
    max_tokens: int = 8192  # of one self-edit
    max_new_tokens: int = 64  # of an answer
    seed: int = 42
    shuffle: bool = False  # the published order of a dataset that is not in that order yet

    target_modules: tuple[str, ...] = ()  # of the inner loop; empty: PEFT's default
    lora_rank: int = 32
    lora_alpha: float = 64
    finetune_epochs: int = 10
    finetune_lr: float = 1e-3
    padding_in_loss: bool = False  # published: padded to 2048 tokens and trained on that
    grader: str = "local"  # of the servers; published: GPT-4.1, judge:gpt-4.1
    dtype: str = "auto"  # of the servers' base model
    deterministic: bool = False  # servers do one text at a time: the same bits every time, and slower

    cpt_completions: int = 5  # self-edits a validation passage in the one adapter
    cpt_epochs: int = 3
    cpt_lr: float = 1e-3  # published for the passage-only arm: 1e-4
    cpt_batch_size: int = 4
    cpt_accumulation: int = 2  # published for the model after round 2: 1

    sft_lora_rank: int = 64
    sft_lora_alpha: int = 128
    sft_target_modules: tuple[str, ...] = ("all-linear",)
    sft_epochs: int = 2
    sft_lr: float = 3e-4
    sft_batch_size: int = 1
    sft_accumulation: int = 10  # micro-batches a step, of all processes; published: 5 on each of 2 GPUs

    continual_arm: Arm = "self_edits"
    continual_seeds: tuple[int, ...] = tuple(range(42, 50))  # a run each; published: 8
    n_sequences: int = 8  # of a run
    n_datapoints: int = 8  # passages of a sequence
    continual_max_new_tokens: int = 64

    n_workers: int
    n_threads: int
    n_slots: int = 0  # adapters in training at a time in one worker; 0: usual for the device
    sft_processes: int  # of a ReST-EM training, one GPU each; published: 2

    def __post_init__(self) -> None:
        if unknown := [arm for arm in (*self.arms, self.continual_arm) if arm not in ARMS]:
            raise SettingsError(f"arms: {', '.join(unknown)} not known; known are {', '.join(ARMS)}")
        if not self.continual_seeds or len(set(self.continual_seeds)) < len(self.continual_seeds):
            raise SettingsError(f"continual_seeds is {self.continual_seeds}; give at least one, each once")
        if not self.arms:
            raise SettingsError("arms is empty; name at least one of " + ", ".join(ARMS))
        if self.engine not in ENGINES:
            raise SettingsError(
                f"engine is {self.engine!r}; in a chain the model itself writes, by {' or '.join(ENGINES)}; "
                "for another's self-edits run 01_create_self_edits alone"
            )
        if self.dtype not in DTYPES:
            raise SettingsError(f"dtype is {self.dtype!r}; it must be one of {', '.join(DTYPES)}")
        if self.sft_processes < 1 or self.sft_accumulation % self.sft_processes:
            raise SettingsError(
                f"sft_accumulation is {self.sft_accumulation}, which {self.sft_processes} sft_processes "
                "cannot share; it counts the micro-batches of all of them: give a multiple"
            )


# About 15 minutes on 2 cores. The small model learns nothing through q_proj and v_proj alone; two of the MLP
# layers teach it what all seven linear layers do, for two thirds of the time.
DEMO = ExperimentSettings(
    model="embedded",
    train_dataset="shipped:train",
    val_dataset="shipped:val",
    n_train=4,
    n_val=6,
    k_completions=2,
    eval_times=1,
    arms=("passage_only", "self_edits", "hand_written"),
    max_tokens=80,
    target_modules=("up_proj", "down_proj"),
    lora_rank=16,
    lora_alpha=32,
    finetune_epochs=6,
    finetune_lr=3e-3,
    cpt_completions=1,
    cpt_lr=3e-3,
    cpt_accumulation=1,
    sft_accumulation=1,  # four examples: with ten a step there would be two steps
    continual_seeds=(42,),
    n_sequences=2,
    n_datapoints=3,
    continual_max_new_tokens=32,
    n_workers=2,
    n_threads=1,
    n_slots=8,
    sft_processes=1,
)


ENDPOINT_FILE = "endpoint.json"
SELF_EDITS_FILE = "self_edits.json"
MODEL_FOLDER = "model"


def rest_em_chain(settings: ExperimentSettings) -> Chain:
    """All stages in an order in which one server is up at a time."""
    rounds = [_Round(settings, number) for number in range(settings.n_rounds + 1)]
    return _with_results("rest_em", settings, [stage for one in rounds for stage in one.stages()])


def evaluation_chain(settings: ExperimentSettings) -> Chain:
    """The model as it is, on the validation passages: single passage and CPT."""
    base = _Round(settings, 0)
    stages = [base.validation_self_edits(), base.server(), base.evaluate(), base.cpt()]
    return _with_results("evaluation", settings, stages)


def continual_chain(settings: ExperimentSettings) -> Chain:
    """The model as it is, edited continually."""
    base = _Round(settings, 0)
    return _with_results("continual", settings, [base.server(), *base.continual()])


CHAINS: dict[str, Callable[[ExperimentSettings], Chain]] = {
    "rest_em": rest_em_chain,
    "evaluation": evaluation_chain,
    "continual": continual_chain,
}


@dataclass(frozen=True)
class _Round:
    """The stages around one model: round 0 is the base model, round n the one that n ReST-EM rounds made."""

    settings: ExperimentSettings
    number: int

    @property
    def label(self) -> str:
        return f"round{self.number}" if self.number else "base"

    @property
    def model(self) -> str:
        return in_run(f"{self.label}_train", MODEL_FOLDER) if self.number else self.settings.model

    @property
    def made_by(self) -> tuple[str, ...]:
        return (f"{self.label}_train",) if self.number else ()

    @property
    def next_label(self) -> str:
        return f"round{self.number + 1}"

    def stages(self) -> Iterator[Stage]:
        ranks = self.number < self.settings.n_rounds
        yield self.validation_self_edits()
        if ranks:
            yield self.training_self_edits()
        yield self.server()
        yield self.evaluate()
        if not self.number:
            yield self.cpt()
        if ranks:
            yield self.rank()
            yield self.train()
        else:
            yield from self.continual()

    def validation_self_edits(self) -> Stage:
        s = self.settings
        return self._self_edits(
            f"{self.label}_self_edits",
            f"each of {s.n_val} validation passages",
            dataset=s.val_dataset,
            n_articles=s.n_val,
            # Only the first of each passage is evaluated, as published; CPT takes all.
            k_completions=1 if self.number else s.cpt_completions,
        )

    def training_self_edits(self) -> Stage:
        s = self.settings
        return self._self_edits(
            f"{self.next_label}_self_edits_train",
            f"each of {s.n_train} training passages, {s.k_completions} times",
            dataset=s.train_dataset,
            n_articles=s.n_train,
            # As published: every round trains on passages that no earlier round has seen.
            start=self.number * s.n_train,
            k_completions=s.k_completions,
        )

    def _self_edits(self, name: str, what: str, **asked: Value) -> Stage:
        return Stage(
            name=name,
            notebook="01_create_self_edits",
            title=f"{self._who()} writes self-edits: {what}",
            parameters={
                **asked,
                "model": self.model,
                "shuffle": self.settings.shuffle,
                "prompt_key": self.settings.prompt_key,
                "engine": self.settings.engine,
                "max_tokens": self.settings.max_tokens,
                "seed": self.settings.seed,
            },
            needs=self.made_by,
            produces=(SELF_EDITS_FILE,),
        )

    def server(self) -> Stage:
        name = f"{self.label}_server"
        return Stage(
            name=name,
            notebook="02_ttt_server",
            title=f"TTT server on {self._who()}: {self.settings.n_workers} worker processes",
            parameters={
                "model": self.model,
                "endpoint_file": in_run(name, ENDPOINT_FILE),
                "n_workers": self.settings.n_workers,
                "n_threads": self.settings.n_threads,
                "n_slots": self.settings.n_slots,
                "grader": self.settings.grader,
                "dtype": self.settings.dtype,
                "deterministic": self.settings.deterministic,
            },
            needs=self.made_by,
            produces=(ENDPOINT_FILE,),
            background=True,
        )

    def evaluate(self) -> Stage:
        # What no model wrote is the same in every round.
        arms = ("self_edits",) if self.number else self.settings.arms
        return Stage(
            name=f"{self.label}_evaluate",
            notebook="03_query_server",
            title=f"single-passage evaluation on {self.settings.n_val} passages: {', '.join(arms)}",
            parameters={
                **self._asked(f"{self.label}_self_edits", n=self.settings.n_val, k=1),
                "exp_name": self.label,
                "eval_times": 1,
                "arms": ",".join(arms),
            },
            needs=(f"{self.label}_self_edits", f"{self.label}_server"),
            produces=tuple(run_file_name(self.label, arm) for arm in arms),
        )

    def cpt(self) -> Stage:
        s = self.settings
        return Stage(
            name=f"{self.label}_cpt",
            notebook="04_cpt",
            title=f"CPT: one adapter for {s.n_val} passages",
            parameters={
                **self._asked(f"{self.label}_self_edits", n=s.n_val, k=s.cpt_completions),
                "arms": ",".join(s.arms),
                "finetune_epochs": s.cpt_epochs,
                "finetune_lr": s.cpt_lr,
                "batch_size": s.cpt_batch_size,
                "gradient_accumulation_steps": s.cpt_accumulation,
            },
            needs=(f"{self.label}_self_edits", f"{self.label}_server"),
            produces=tuple(f"cpt_run_{arm}.json" for arm in s.arms),
        )

    def rank(self) -> Stage:
        s, texts = self.settings, f"{self.next_label}_self_edits_train"
        loops = s.n_train * s.k_completions * s.eval_times
        return Stage(
            name=f"{self.next_label}_rank",
            notebook="03_query_server",
            title=f"ReST-EM {self.next_label}: reward of each self-edit ({loops} inner loops)",
            parameters={
                **self._asked(texts, n=s.n_train, k=s.k_completions),
                "exp_name": f"{self.next_label}_rank",
                "eval_times": s.eval_times,
                "arms": "self_edits",
            },
            needs=(texts, f"{self.label}_server"),
            produces=(run_file_name(f"{self.next_label}_rank", "self_edits"),),
        )

    def train(self) -> Stage:
        s, rank = self.settings, f"{self.next_label}_rank"
        together = f" in {s.sft_processes} processes" if s.sft_processes > 1 else ""
        return Stage(
            name=f"{self.next_label}_train",
            notebook="05_rest_em_round",
            title=f"ReST-EM {self.next_label}: keep each passage's best self-edit, train on writing it{together}",
            parameters={
                "run_json": in_run(rank, run_file_name(rank, "self_edits")),
                "model": self.model,
                "train": True,
                "lora_rank": s.sft_lora_rank,
                "lora_alpha": s.sft_lora_alpha,
                "target_modules": list(s.sft_target_modules),
                "finetune_epochs": s.sft_epochs,
                "finetune_lr": s.sft_lr,
                "batch_size": s.sft_batch_size,
                "gradient_accumulation_steps": s.sft_accumulation,
                "n_processes": s.sft_processes,
                "seed": s.seed,
            },
            needs=(rank, *self.made_by),
            produces=(MODEL_FOLDER,),
        )

    def continual(self) -> Iterator[Stage]:
        seeds = self.settings.continual_seeds
        for seed in seeds:
            yield self._continual(seed, array="continual" if len(seeds) > 1 else "")

    def _continual(self, seed: int, *, array: str) -> Stage:
        s = self.settings
        return Stage(
            name=f"{array}_seed{seed}" if array else "continual",
            notebook="06_continual_self_edits",
            title=f"continual self-edits, seed {seed}: {s.n_sequences} × {s.n_datapoints} passages",
            parameters={
                "dataset": s.val_dataset,
                "endpoint": in_run(f"{self.label}_server", ENDPOINT_FILE),
                "model": self.model,
                "n_sequences": s.n_sequences,
                "n_datapoints": s.n_datapoints,
                "arm": s.continual_arm,
                "prompt_key": s.prompt_key,
                "max_tokens": s.max_tokens,
                **self._inner_loop(),
                "max_new_tokens": s.continual_max_new_tokens,
                "seed": seed,
            },
            needs=(f"{self.label}_server",),
            produces=("summary_continual.json",),
            array=array,
        )

    def _asked(self, texts: str, *, n: int, k: int) -> dict[str, Value]:
        """Parameters of a stage that queries this round's server about the passages of ``texts``."""
        return {
            "dataset": in_run(texts, SELF_EDITS_FILE),
            "endpoint": in_run(f"{self.label}_server", ENDPOINT_FILE),
            "model": self.model,
            "n_articles": n,
            "k_completions": k,
            **self._inner_loop(),
            "seed": self.settings.seed,
        }

    def _inner_loop(self) -> dict[str, Value]:
        lora = ("lora_rank", "lora_alpha", "finetune_epochs", "finetune_lr")
        names = (*lora, "padding_in_loss", "max_new_tokens")
        own = {name: getattr(self.settings, name) for name in names}
        return {"target_modules": list(self.settings.target_modules), **own}

    def _who(self) -> str:
        return f"the model of round {self.number}" if self.number else "the base model"


def _with_results(name: str, settings: ExperimentSettings, stages: Iterable[Stage]) -> Chain:
    made = tuple(stages)
    results = Stage(
        name="results",
        notebook="08_results",
        title="all results side by side",
        parameters={"runs_dir": in_run(), "prompt_key": result_key(settings.prompt_key)},
        needs=tuple(stage.name for stage in made if not stage.background),
    )
    return Chain(name=name, stages=(*made, results))
