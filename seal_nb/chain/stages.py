"""What an experiment consists of: its settings, and the table of stages that follows from them.

A stage is one run of a notebook, after the stages that it needs. The whole experiment is SEAL's (arXiv 2506.10943);
`make demo` is this table with the small model and small counts. `local` and `slurm` run a table."""

import hashlib
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import Field, asdict, dataclass, field, fields, make_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import StringConstraints, TypeAdapter

from seal_nb.errors import SettingsError, checked
from seal_nb.experiments.settings import ARMS, CPT_ARMS, SINGLE_ARMS
from seal_nb.models import DTYPES
from seal_nb.notebook_runner import Parameter, Value, declared_parameters, find_notebook, format_value
from seal_nb.passages import check_disjoint, load_passages
from seal_nb.prompts import result_key
from seal_nb.results.single_passage import run_file_name
from seal_nb.storage import content_id, data_file, read_json, write_json

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


_TABLE = tomllib.loads(data_file("experiment.toml").read_text())


def _plain_values(table: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in table.items()}


def _field(about: Mapping[str, Any]) -> Any:
    return field(default=_plain_values(about).get("default"), metadata=about)


_Fields: Any = make_dataclass(
    "_Fields",
    [(name, Any, _field(about)) for name, about in _TABLE["settings"].items()],
    namespace={"__post_init__": lambda settings: settings.check()},
    frozen=True,
    kw_only=True,
)


class ExperimentSettings(_Fields):
    """Settings of an experiment on one model: those of ``data/experiment.toml``. None leaves one at the default of the
    notebooks that have it as a parameter."""

    def check(self) -> None:
        """Raises: SettingsError for values that contradict each other, or that no notebook would take."""
        for known, names in ((SINGLE_ARMS, self.arms), (ARMS, [self.continual_arm])):
            if unknown := [arm for arm in names if arm not in known]:
                raise SettingsError(f"arms: {', '.join(unknown)} not known; known are {', '.join(known)}")
        if not {*self.arms} & {*CPT_ARMS}:
            raise SettingsError("arms is empty; name at least one of " + ", ".join(CPT_ARMS))
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
        return {
            entry.metadata.get("parameter", entry.name): list(value) if isinstance(value, tuple) else value
            for entry in fields(self)
            if notebook in entry.metadata.get("notebooks", ()) and (value := getattr(self, entry.name)) is not None
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
    declared = _declared(notebooks[0])[entry.metadata.get("parameter", entry.name)]
    default = declared.default if default is None else default
    return replace(declared, name=entry.name, default=default, help=f"{declared.help} ({', '.join(notebooks)})")


DEMO = ExperimentSettings(**_plain_values(_TABLE["demo"]))
CHAINS = ("rest_em", "evaluation", "continual")


def make_chain(name: str, settings: ExperimentSettings) -> Chain:
    """One of CHAINS, in an order in which one server runs at a time. ``rest_em`` has all stages. The others are of the
    model as it is: ``evaluation`` has single passage and CPT, ``continual`` edits it continually."""
    if name != "rest_em":
        settings = replace(settings, n_rounds=0)
    elif settings.train_dataset and settings.val_dataset:
        files = [settings.train_dataset, settings.val_dataset]
        if all(one.startswith("shipped:") or Path(one).is_file() for one in files):  # a job may write them
            check_disjoint(*map(load_passages, files))
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
    rounds = {"every", "last" if number == s.n_rounds else "not last", "" if number else "base"}
    arms = ("self_edits",) if number else s.arms  # texts that no model wrote are the same in every round
    cpt_arms = [arm for arm in arms if arm in CPT_ARMS]
    ranked_file = run_file_name(f"{following}_rank", "self_edits")
    values = {entry.name: getattr(s, entry.name) for entry in fields(s)} | {
        "label": label,
        "following": following,
        "whose": f"the model of round {number}" if number else "the base model",
        "made_by": f"{label}_train" if number else "",
        "model": in_run(f"{label}_train", "model") if number else s.model,
        "endpoint": in_run(f"{label}_server", ENDPOINT_FILE),
        "texts": in_run(f"{label}_self_edits", SELF_EDITS_FILE),
        "train_texts": in_run(f"{following}_self_edits_train", SELF_EDITS_FILE),
        # The evaluation takes only the first self-edit of each passage, as published; CPT takes all of them.
        "k_written": 1 if number else s.cpt_completions,
        # As published: every round trains on passages that no earlier round has seen.
        "start": number * s.n_train,
        "shown_arms": ", ".join(arms),
        "asked_arms": ",".join(arms),
        "cpt_arms": ",".join(cpt_arms),
        "run_files": tuple(run_file_name(label, arm) for arm in arms),
        "cpt_files": tuple(f"cpt_run_{arm}.json" for arm in cpt_arms),
        "ranked_file": ranked_file,
        "ranked": in_run(f"{following}_rank", ranked_file),
        "n_loops": s.n_train * s.k_completions * s.eval_times,
        "in_processes": f" in {s.sft_processes} processes" if s.sft_processes > 1 else "",
    }
    for about in _TABLE["stages"]:
        is_continual = about["notebook"] == CONTINUAL
        array = "continual" if is_continual and len(s.continual_seeds) > 1 else ""
        for seed in s.continual_seeds if is_continual else (s.seed,):
            values |= {"seed": seed, "of_seed": f"_seed{seed}" if array else ""}
            one = {name: _filled(entry, values) for name, entry in about.items()}
            parameters = {**s.parameters(one["notebook"][:2]), "model": values["model"], **one["parameters"]}
            if one.pop("rounds") in rounds:
                yield Stage(**one | {"parameters": parameters, "background": one["notebook"] == SERVER, "array": array})


def _filled(entry: Any, values: Mapping[str, Any]) -> Any:
    """An entry of the table with the values of its fields. A text that is one field becomes its value."""
    if isinstance(entry, dict):
        return {name: _filled(one, values) for name, one in entry.items()}
    if isinstance(entry, list):
        return tuple(filter(None, (_filled(one, values) for one in entry)))
    if not isinstance(entry, str):
        return entry
    return values[entry[1:-1]] if entry[1:-1] in values else entry.format_map(values)
