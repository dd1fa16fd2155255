"""What an experiment consists of: its settings, and the table of stages that follows from them.

A stage is one run of a notebook, after the stages that it needs. The whole experiment is SEAL's (arXiv 2506.10943);
`make demo` is this table with the small model and small counts. `local` and `slurm` run a table."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import Field, asdict, dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import StringConstraints, TypeAdapter

from seal_nb.errors import SettingsError, checked
from seal_nb.experiments.settings import ARMS
from seal_nb.models import DTYPES
from seal_nb.notebook_runner import Parameter, Value, declared_parameters, find_notebook, format_value
from seal_nb.prompts import result_key
from seal_nb.results.single_passage import run_file_name
from seal_nb.settings import setting
from seal_nb.storage import content_id, read_json, write_json

RUN = "{run}"  # the run's folder, in a parameter
ENGINES = ("local", "vllm")
MARK = ".done/{}.json"  # of a finished stage
ENDPOINT_FILE = "endpoint.json"
SELF_EDITS_FILE = "self_edits.json"
SERVER = "02_ttt_server"
CONTINUAL = "06_continual_self_edits"
NOTEBOOKS = "01_create_self_edits", SERVER, "03_query_server", "04_cpt", "05_rest_em_round", CONTINUAL, "08_results"
# Parameters that change how a stage computes but not its result. Changing one repeats nothing that is finished.
MACHINE = frozenset({"n_workers", "n_threads", "n_slots", "n_processes", "endpoint_file", "idle_timeout_s"})
INPUT_FILES = frozenset({"dataset", "prompt_key"})  # parameters that may name a file of the user's


def in_run(stage: str, file: str) -> str:
    """A path in the folder of ``stage``, as a parameter of another stage."""
    return f"{RUN}/{stage}/{file}"


def _form(pattern: str) -> StringConstraints:
    """Of a text in a record: where one is read, another form is refused."""
    return StringConstraints(pattern=rf"\A({pattern})\z")


NAME = "[A-Za-z][A-Za-z0-9_]{0,99}"
Name = Annotated[str, _form(NAME)]
File = Annotated[str, _form("[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}")]  # in the folder of its stage
Plain = int | float | bool | str


@dataclass(frozen=True, kw_only=True)
class Mark:
    """What is kept of a stage's last run that finished."""

    identity: str
    notebook: str
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One notebook run. Its results are in the folder of its name."""

    name: Name
    notebook: Annotated[str, _form("|".join(NOTEBOOKS))]
    title: str
    # Of the notebook; paths in the run's folder are made by ``in_run``. ``output_dir`` is added.
    parameters: Mapping[Name, Plain | list[Plain]] = field(default_factory=dict)
    needs: tuple[Name, ...] = ()  # names of the stages before it
    produces: tuple[File, ...] = ()  # result files; of a server ENDPOINT_FILE, whose appearance means that it is ready
    background: bool = False  # a server: starts before the first stage that needs it, stops after the last one
    # Shared by stages that differ in their seed only; on a cluster they are one job array.
    array: Annotated[str, _form(f"({NAME})?")] = ""
    # An id of what the stage computes and from what; its chain sets it.
    identity: Annotated[str, _form("[0-9a-f]{24}")] = ""
    job: Annotated[str, _form("([0-9]{1,20}(_[0-9]{1,20})?)?")] = ""  # SLURM's number, in an array ``12_43``
    nodes: int = 1  # of a server on a cluster, to submit its job again
    idle_timeout_s: float = 0.0  # likewise

    def values(self, run_dir: Path) -> dict[str, Value]:
        """The notebook's parameters with real paths."""
        return {
            name: value.replace(RUN, str(run_dir)) if isinstance(value, str) else value
            for name, value in {"output_dir": f"{RUN}/{self.name}", **self.parameters}.items()
        }

    def missing(self, run_dir: Path) -> list[str]:
        """Result files that the stage has not written."""
        return [file for file in self.produces if not (run_dir / self.name / file).exists()]

    def mark(self, run_dir: Path) -> Mark | None:
        """Of the last run that finished; None if none did. Raises: DataError."""
        path = run_dir / MARK.format(self.name)
        return checked(TypeAdapter(Mark).validate_python, read_json(path), path=path) if path.is_file() else None

    def is_done(self, run_dir: Path) -> bool:
        """Whether the stage finished here with this identity and its results are still there; never for a server."""
        mark = self.mark(run_dir)
        same = mark is not None and mark.identity == self.identity
        return same and not self.background and not self.missing(run_dir)

    def mark_done(self, run_dir: Path, *, seconds: float) -> None:
        mark = Mark(identity=self.identity, notebook=self.notebook, seconds=round(seconds, 1))
        write_json(run_dir / MARK.format(self.name), asdict(mark))

    def log(self, run_dir: Path) -> Path:
        return run_dir / (f"{self.name}/{self.notebook}-{self.job}.log" if self.job else f"logs/{self.name}.log")

    def executed(self, run_dir: Path) -> Path:
        return run_dir / self.name / (f"{self.notebook}-{self.job}.ipynb" if self.job else f"{self.notebook}.ipynb")


def as_options(values: Mapping[str, Value]) -> list[str]:
    """The parameters as options of ``seal-nb run``. Raises: SettingsError for a text that it would take for one."""
    for name, value in values.items():
        if isinstance(value, str) and value.startswith("-"):
            raise SettingsError(f"{name} is {value!r}, which begins as an option does; write ./{value} for a path")
    return [word for name, value in values.items() for word in ("-p", name, format_value(value))]


@dataclass(frozen=True, kw_only=True)
class Chain:
    """Stages in an order in which they can run one after another."""

    name: str
    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        earlier: dict[str, Stage] = {}
        for stage in self.stages:
            earlier[stage.name] = replace(stage, identity=stage.identity or _identity(stage, earlier))
        object.__setattr__(self, "stages", tuple(earlier.values()))

    def __getitem__(self, name: str) -> Stage:
        return next(stage for stage in self.stages if stage.name == name)

    def __iter__(self) -> Iterator[Stage]:
        return iter(self.stages)

    def users_of(self, server: Stage) -> list[Stage]:
        """The stages that send requests to ``server``."""
        return [stage for stage in self if server.name in stage.needs]

    def servers_of(self, stage: Stage) -> list[Stage]:
        """The servers to which ``stage`` sends requests."""
        return [self[name] for name in stage.needs if self[name].background]

    def array(self, name: str) -> list[Stage]:
        """The stages of one job array. The place of a stage is the number of its task."""
        return [stage for stage in self if stage.array == name]

    def with_fields(self, values: Mapping[str, dict[str, Any]]) -> "Chain":
        """A copy with other values of fields, by stage and field."""
        return replace(self, stages=tuple(replace(stage, **values.get(stage.name, {})) for stage in self))


def _identity(stage: Stage, earlier: Mapping[str, Stage]) -> str:
    """The place of the run's folder does not change it. A file counts by its content."""
    own = {name: value for name, value in stage.parameters.items() if name not in MACHINE}
    for name in INPUT_FILES & set(own):
        if (path := Path(str(own[name]))).is_file():
            own[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return content_id([stage.notebook, own, [earlier[name].identity for name in stage.needs]])


def _to(notebooks: str, default: Any = None, name: str = "") -> Any:
    """A setting that becomes the parameter ``name`` of these notebooks; None leaves it at their default."""
    return field(default=default, metadata={"notebooks": notebooks.split(), "name": name})


@dataclass(frozen=True, kw_only=True)
class ExperimentSettings:
    """Settings of an experiment on one model. The defaults are those of SEAL (arXiv 2506.10943) where it has one.
    ``_to`` names the notebooks that have a setting as a parameter; they declare its type and meaning, and its default
    where it is None here."""

    model: str = setting("", "model folder or hub name")
    train_dataset: str = setting("", "passages of the ReST-EM rounds: item or SQuAD file, or shipped:train")
    val_dataset: str = setting("", "passages of the evaluations: item or SQuAD file, or shipped:val")
    n_train: int = setting(50, "passages of a ReST-EM round")
    n_val: int = setting(200, "passages of an evaluation")
    k_completions: int = setting(5, "self-edits of each training passage")
    eval_times: int = setting(3, "adapters trained on each self-edit to find its reward")
    n_rounds: int = setting(2, "ReST-EM rounds")
    arms: tuple[str, ...] = setting(("passage_only", "self_edits"), "of the base model's evaluations")
    shuffle: bool | None = _to("01")
    prompt_key: str | None = _to("01 06")
    engine: str | None = _to("01")
    max_tokens: int = _to("01 06", 8192)
    seed: int | None = _to("01 03 04 05")

    target_modules: tuple[str, ...] = _to("03 04 06", ())
    lora_rank: int | None = _to("03 04 06")
    lora_alpha: float | None = _to("03 04 06")
    finetune_epochs: int = _to("03 06", 10)
    finetune_lr: float | None = _to("03 06")
    padding_in_loss: bool | None = _to("03 04 06")
    max_new_tokens: int = _to("03 04", 64)

    grader: str | None = _to("02")
    dtype: str | None = _to("02")
    deterministic: bool | None = _to("02")
    n_workers: int = _to("02", 1)
    n_threads: int = _to("02", 1)
    n_slots: int = _to("02", 0)

    cpt_completions: int = setting(5, "self-edits of each validation passage in the one adapter of CPT")
    cpt_epochs: int = _to("04", 3, "finetune_epochs")
    cpt_lr: float | None = _to("04", name="finetune_lr")
    cpt_batch_size: int = _to("04", 4, "batch_size")
    cpt_accumulation: int = _to("04", 2, "gradient_accumulation_steps")

    sft_lora_rank: int | None = _to("05", name="lora_rank")
    sft_lora_alpha: int | None = _to("05", name="lora_alpha")
    sft_target_modules: tuple[str, ...] | None = _to("05", name="target_modules")
    sft_epochs: int | None = _to("05", name="finetune_epochs")
    sft_lr: float | None = _to("05", name="finetune_lr")
    sft_batch_size: int | None = _to("05", name="batch_size")
    sft_accumulation: int = _to("05", 10, "gradient_accumulation_steps")
    sft_processes: int = _to("05", 1, "n_processes")

    continual_arm: str = _to("06", "self_edits", "arm")
    continual_seeds: tuple[int, ...] = setting(tuple(range(42, 50)), "a continual run for each seed")
    n_sequences: int = _to("06", 8)
    n_datapoints: int = _to("06", 8)
    continual_max_new_tokens: int = _to("06", 64, "max_new_tokens")

    def __post_init__(self) -> None:
        if unknown := [arm for arm in (*self.arms, self.continual_arm) if arm not in ARMS]:
            raise SettingsError(f"arms: {', '.join(unknown)} not known; known are {', '.join(ARMS)}")
        if not self.arms:
            raise SettingsError("arms is empty; name at least one of " + ", ".join(ARMS))
        seeds = self.continual_seeds
        if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
            raise SettingsError(f"continual_seeds is {seeds}; give at least one, each once, from 0 on")
        if self.engine not in (None, *ENGINES):
            raise SettingsError(
                f"engine is {self.engine!r}; in a chain the model itself writes the self-edits, with "
                f"{' or '.join(ENGINES)}; run 01_create_self_edits alone for another model's"
            )
        if self.dtype not in (None, *DTYPES):
            raise SettingsError(f"dtype is {self.dtype!r}; it must be one of {', '.join(DTYPES)}")
        if self.sft_processes < 1 or self.sft_accumulation % self.sft_processes:
            raise SettingsError(
                f"sft_accumulation is {self.sft_accumulation}, which {self.sft_processes} sft_processes cannot "
                "share; it counts the micro-batches of all processes: give a multiple"
            )

    def parameters(self, notebook: str) -> dict[str, Plain | list[Plain]]:
        """The parameters that these settings give to the notebook with this number."""
        given = {entry: getattr(self, entry.name) for entry in fields(self)}
        return {
            entry.metadata["name"] or entry.name: list(value) if isinstance(value, tuple) else value
            for entry, value in given.items()
            if notebook in entry.metadata.get("notebooks", ()) and value is not None
        }


# That an experiment gives to a server.
SERVER_PARAMETERS = {"model"} | {e.name for e in fields(ExperimentSettings) if "02" in e.metadata.get("notebooks", ())}


@cache
def _declared(notebook: str) -> dict[str, Parameter]:
    return declared_parameters(find_notebook(notebook))


def declaration(entry: "Field[Any]") -> Parameter:
    """Type, default and meaning of a field of ExperimentSettings; a notebook's parameter where it has none."""
    default: Any = entry.default
    if "text" in entry.metadata:
        kind = f"list[{type(default[0]).__name__}]" if isinstance(default, tuple) else type(default).__name__
        return Parameter(name=entry.name, type_name=kind, default=default, help=entry.metadata["text"])
    notebooks = entry.metadata["notebooks"]
    declared = _declared(notebooks[0])[entry.metadata["name"] or entry.name]
    default = declared.default if default is None else default
    return replace(declared, name=entry.name, default=default, help=f"{declared.help} ({', '.join(notebooks)})")


# About 15 minutes on 2 cores. The small model learns nothing through q_proj and v_proj alone. Two of the MLP
# layers teach it what all seven linear layers do, for two thirds of the time.
DEMO = ExperimentSettings(
    model="embedded", train_dataset="shipped:train", val_dataset="shipped:val", n_train=4, n_val=6,
    k_completions=2, eval_times=1, arms=("passage_only", "self_edits", "hand_written"), max_tokens=80,
    target_modules=("up_proj", "down_proj"), lora_rank=16, lora_alpha=32, finetune_epochs=6, finetune_lr=3e-3,
    cpt_completions=1, cpt_lr=3e-3, cpt_accumulation=1,
    sft_accumulation=1,  # four examples: with ten a step there would be two steps
    continual_seeds=(42,), n_sequences=2, n_datapoints=3, continual_max_new_tokens=32, n_workers=2, n_slots=8,
)  # fmt: skip


CHAINS = ("rest_em", "evaluation", "continual")


def make_chain(name: str, settings: ExperimentSettings) -> Chain:
    """One of CHAINS, in an order in which one server runs at a time. ``rest_em`` has all stages. The others are of the
    model as it is: ``evaluation`` has single passage and CPT, ``continual`` edits it continually."""
    if name != "rest_em":
        settings = replace(settings, n_rounds=0)
    stages = [stage for number in range(settings.n_rounds + 1) for stage in _round(settings, number)]
    if name == "evaluation":
        stages = [stage for stage in stages if stage.notebook != CONTINUAL]
    elif name == "continual":
        stages = [stage for stage in stages if stage.background or stage.notebook == CONTINUAL]
    prompt = {"prompt_key": result_key(settings.prompt_key)} if settings.prompt_key else {}
    results = Stage(
        name="results", notebook="08_results", title="all results side by side", parameters={"runs_dir": RUN, **prompt},
        needs=tuple(stage.name for stage in stages if not stage.background),
    )  # fmt: skip
    return Chain(name=name, stages=(*stages, results))


def _round(s: ExperimentSettings, number: int) -> Iterator[Stage]:
    """The stages around one model. Round 0 is the base model, round n the model after n ReST-EM rounds."""
    label, following = f"round{number}" if number else "base", f"round{number + 1}"
    whose = f"the model of round {number}" if number else "the base model"
    model = in_run(f"{label}_train", "model") if number else s.model
    made_by = (f"{label}_train",) if number else ()
    texts, train_texts, server = f"{label}_self_edits", f"{following}_self_edits_train", f"{label}_server"
    rank, endpoint = f"{following}_rank", in_run(server, ENDPOINT_FILE)
    is_last = number == s.n_rounds

    def stage(
        name: str, notebook: str, title: str, needs: tuple[str, ...], produces: tuple[str, ...],
        array: str = "", **own: Any,
    ) -> Stage:  # fmt: skip
        parameters = {**s.parameters(notebook[:2]), "model": model, **own}
        return Stage(
            name=name, notebook=notebook, title=title, parameters=parameters, needs=needs, produces=produces,
            background=name == server, array=array,
        )  # fmt: skip

    def asked_about(writer: str) -> dict[str, Any]:
        """What a client of the server needs and asks about: the self-edits of the stage ``writer``."""
        return {"needs": (writer, server), "dataset": in_run(writer, SELF_EDITS_FILE), "endpoint": endpoint}

    yield stage(
        texts, "01_create_self_edits", f"{whose} writes self-edits: each of {s.n_val} validation passages",
        made_by, (SELF_EDITS_FILE,), dataset=s.val_dataset, n_articles=s.n_val,
        # The evaluation takes only the first self-edit of each passage, as published; CPT takes all of them.
        k_completions=1 if number else s.cpt_completions,
    )  # fmt: skip
    if not is_last:
        what = f"each of {s.n_train} training passages, {s.k_completions} times"
        yield stage(
            train_texts, "01_create_self_edits", f"{whose} writes self-edits: {what}", made_by, (SELF_EDITS_FILE,),
            # As published: every round trains on passages that no earlier round has seen.
            start=number * s.n_train, dataset=s.train_dataset, n_articles=s.n_train, k_completions=s.k_completions,
        )  # fmt: skip
    title = f"TTT server on {whose}: {s.n_workers} worker processes"
    yield stage(server, SERVER, title, made_by, (ENDPOINT_FILE,), endpoint_file=endpoint)
    arms = ("self_edits",) if number else s.arms  # texts that no model wrote are the same in every round
    yield stage(
        f"{label}_evaluate", "03_query_server",
        f"single-passage evaluation on {s.n_val} passages: {', '.join(arms)}", **asked_about(texts),
        produces=tuple(run_file_name(label, arm) for arm in arms),
        exp_name=label, arms=",".join(arms), n_articles=s.n_val, k_completions=1, eval_times=1,
    )  # fmt: skip
    if not number:
        yield stage(
            f"{label}_cpt", "04_cpt", f"CPT: one adapter for {s.n_val} passages", **asked_about(texts),
            produces=tuple(f"cpt_run_{arm}.json" for arm in arms),
            arms=",".join(arms), n_articles=s.n_val, k_completions=s.cpt_completions,
        )  # fmt: skip
    if not is_last:
        run_file, n_loops = run_file_name(rank, "self_edits"), s.n_train * s.k_completions * s.eval_times
        yield stage(
            rank, "03_query_server", f"ReST-EM {following}: reward of each self-edit ({n_loops} inner loops)",
            **asked_about(train_texts), produces=(run_file,), exp_name=rank, arms="self_edits",
            n_articles=s.n_train, k_completions=s.k_completions, eval_times=s.eval_times,
        )  # fmt: skip
        title = f"ReST-EM {following}: keep each passage's best self-edit, train on writing it"
        title += f" in {s.sft_processes} processes" if s.sft_processes > 1 else ""
        how: dict[str, Any] = {"run_json": in_run(rank, run_file), "train": True}
        yield stage(f"{following}_train", "05_rest_em_round", title, (rank, *made_by), ("model",), **how)
        return
    array = "continual" if len(s.continual_seeds) > 1 else ""
    for seed in s.continual_seeds:
        yield stage(
            f"continual_seed{seed}" if array else "continual", CONTINUAL,
            f"continual self-edits, seed {seed}: {s.n_sequences} × {s.n_datapoints} passages",
            (server,), ("summary_continual.json",), array, dataset=s.val_dataset, endpoint=endpoint, seed=seed,
        )  # fmt: skip
