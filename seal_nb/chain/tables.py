"""The tables of experiments: SEAL's five stages over any number of ReST-EM rounds, and parts of that.

Round 0 is the model as it came. Each round: self-edits of training passages, their reward (one adapter
each), ReST-EM training, then the new model's self-edits of the validation passages, evaluated. The last model
is also edited continually, passage after passage. ``make demo`` is this table with the small model and small
counts; a cluster runs it with Qwen2.5-7B and the published ones. Every setting reaches its
notebook, whose own defaults are those of a minute's try.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from seal_nb.chain.settings import ExperimentSettings
from seal_nb.chain.table import Chain, Stage, in_run
from seal_nb.experiments.arms import run_file_name
from seal_nb.notebook_runner import Value
from seal_nb.prompts import result_key

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
            title=f"ReST-EM {self.next_label}: keep each passage's best self-edit, "
            f"train on writing it{together}",
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
