"""`seal-nb submit`: what is refused before the queue; and that scripts, pages and dry run say the same."""

import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from seal_nb.chain import slurm
from seal_nb.chain.slurm import SlurmError, dry_run, submit_chain
from seal_nb.chain.stages import DEMO, make_chain
from seal_nb.cli import _parser
from seal_nb.errors import RunMismatch, SettingsError
from seal_nb.notebook_runner import declared_parameters, default_notebooks_dir
from seal_nb.server.worker import WorkerSettings
from tests.chain.planning import ROOT, SMALL, cluster, jobs_in, with_a_server
from tests.chain.test_tables import PUBLISHED


def run_submit(words: list[str]) -> None:
    arguments = _parser("submit").parse_args(["submit", *words])
    arguments.command(arguments)


DRY_RUN = ROOT / "docs/published_experiment.txt"


def test_where_one_job_is_refused_none_is_left_in_the_queue(fakes: Path) -> None:
    with pytest.raises(SlurmError, match=r"'base_cpt' was refused, so none was .*invalid partition.*site\.sh"):
        submit_chain(make_chain("evaluation", SMALL), fakes / "run", cluster(project=fakes), tell=print)
    assert (fakes / "cancelled").read_text() == "101 102 103\n"
    assert jobs_in(fakes / "run") == {}


def test_number_of_a_job_is_found_among_what_a_site_prints(fakes: Path) -> None:
    first, _, last = (fakes / "bin/sbatch").read_text().rpartition("echo $number")
    noisy = f"{first}echo Welcome; echo 7 jobs; echo; echo $number';hpc'{last}"
    (fakes / "bin/sbatch").write_text(noisy + "\necho 'Hello \xe9' >&2; echo Bye\n")
    greeting = "#!/bin/bash\necho Welcome to JobState=OURS\n"
    (fakes / "bin/scontrol").write_text(greeting + (fakes / "bin/scontrol").read_text())
    chain, place = make_chain("continual", SMALL), cluster(project=fakes)
    submit_chain(chain, fakes / "run", place, tell=print)
    assert list(jobs_in(fakes / "run").values()) == ["101", "102_0", "102_1", "103"]
    (fakes / "job102").write_text("JobId=102 JobState=PENDING Reason=Resources\n")
    assert slurm.look_up("102")["JobState"] == "PENDING"
    (fakes / "bin/sbatch").write_text("#!/bin/bash\necho no number 5\n")
    with pytest.raises(SlurmError, match="sbatch gave 'no number 5.n' for the number"):
        submit_chain(chain, fakes / "other", place, tell=print)


def test_more_seeds_than_an_array_may_have_are_refused_before_any_job(fakes: Path) -> None:
    (fakes / "bin/scontrol").write_text("#!/bin/bash\necho 'MaxArraySize            = 3'\n")
    place = cluster(project=fakes)
    with pytest.raises(SettingsError, match=r"continual is an array of over 3 jobs .*fewer --continual-seeds"):
        submit_chain(
            make_chain("continual", replace(SMALL, continual_seeds=(1, 2, 3, 4))), fakes / "run", place, tell=print
        )
    assert not (fakes / "submitted").exists()
    submit_chain(make_chain("continual", replace(SMALL, continual_seeds=(1, 2, 10**9))), fakes / "x", place, tell=print)
    assert "--array=0-2" in (fakes / "submitted").read_text()


def test_jobs_with_other_settings_on_their_way_are_named(fakes: Path) -> None:
    chain, place = make_chain("continual", SMALL), cluster(project=fakes)
    submit_chain(chain, fakes / "run", place, tell=print)
    server = jobs_in(fakes / "run")["base_server"]
    (fakes / f"job{server}").write_text("JobId=1 JobState=RUNNING Reason=None\n")
    other = make_chain("continual", replace(SMALL, model="another"))
    with pytest.raises(RunMismatch, match=f"base_server \\({server}\\).*scancel {server}"):
        submit_chain(other, fakes / "run", place, tell=print)
    assert "base_server" not in submit_chain(chain, fakes / "run", place, tell=print)


def test_dataset_that_is_no_file_is_refused_before_the_queue(fakes: Path) -> None:
    (fakes / "slurm").unlink()
    (fakes / "slurm").mkdir()
    (fakes / "slurm/site.sh").write_text("true\n")
    words = ["evaluation", "--run-dir", "run", "--small", "--val-dataset", "squad.json"]
    with pytest.raises(SettingsError, match="val_dataset is 'squad.json', which is no file"):
        run_submit([*words, "--project", str(fakes)])


def test_prompt_that_there_is_not_is_refused_before_the_queue(fakes: Path) -> None:
    with_a_server(fakes)
    words = ["evaluation", "--run-dir", "other", "--small", "--project", str(fakes)]
    with pytest.raises(SettingsError, match="unknown prompt_key 'implicatons'"):
        run_submit([*words, "--prompt-key", "implicatons"])
    with pytest.raises(SettingsError, match="prompt_key 'spa' is a family of 7 prompts"):
        run_submit(["continual", *words[1:], "--prompt-key", "spa"])
    (fakes / "mine.txt").write_text("{title}\n{context}\nIn short:")
    with pytest.raises(SlurmError, match="'base_cpt' was refused"):
        run_submit([*words, "--prompt-key", "mine.txt"])
    assert "-p prompt_key mine.txt" in (fakes / "submitted").read_text()


def test_setting_without_a_default_is_asked_for(fakes: Path) -> None:
    with pytest.raises(SettingsError, match="--model, --train-dataset, --val-dataset not given"):
        run_submit(["rest_em", "--run-dir", "run", "--executor", "local"])


def published() -> str:
    """The dry run of the published experiment, on a cluster with two GPUs a node."""
    return dry_run(PUBLISHED, ROOT / "runs/qwen", cluster(site={"SEAL_GPUS": "2"}))


def test_published_experiment_becomes_the_jobs_that_the_documentation_shows() -> None:
    assert published() == DRY_RUN.read_text().rstrip("\n"), (
        f"if the change is meant, write what tests.chain.test_slurm_submit.published() gives to {DRY_RUN}"
    )


def test_job_that_the_readme_shows_is_one_of_the_published_experiment() -> None:
    readme = (ROOT / "README.md").read_text()
    (shown,) = re.findall(r"^```sh\n(# ReST-EM.*?)^```", readme, re.DOTALL | re.MULTILINE)
    assert shown.replace(" \\\n    ", " ") in published(), "it is shown in several lines"


def test_command_that_the_readme_shows_is_the_published_experiment(
    capsys: pytest.CaptureFixture[str], fakes: Path
) -> None:
    (command,) = re.findall(r"^seal-nb submit (.*)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    (fakes / "slurm").unlink()
    shutil.copytree(ROOT / "slurm", fakes / "slurm")
    (fakes / "slurm/site.sh").write_text("export SEAL_GPUS=2\n")
    run_submit([*shlex.split(command), "--dry-run", "--project", str(fakes)])
    assert capsys.readouterr().out.rstrip("\n") == published()


def test_chain_is_not_run_here_while_its_jobs_are_on_their_way(fakes: Path) -> None:
    submit_chain(make_chain("continual", DEMO), fakes / "run", cluster(project=fakes), tell=print)
    (fakes / "job102").write_text("JobId=102 JobState=PENDING Reason=Resources\n")
    with pytest.raises(RunMismatch, match="SLURM jobs 102 work here"):
        run_submit(["continual", "--run-dir", "run", "--small", "--executor", "local"])


def shown_calls() -> list[tuple[str, list[str]]]:
    """(script, words behind it) of each sbatch that the page or a script's head shows."""
    texts = [(ROOT / "docs/slurm.md").read_text()]
    texts += [path.read_text().replace("# sbatch", "sbatch") for path in sorted((ROOT / "slurm").glob("*.sbatch"))]
    found = re.findall(r"^(?:.*: )?sbatch .*?slurm/(\w+)\.sbatch(.*)$", "\n".join(texts), re.MULTILINE)
    return [(script, rest.split()) for script, rest in found]


@pytest.mark.parametrize(("script", "words"), shown_calls())
def test_shown_call_of_a_script_has_parameters_of_its_notebook(script: str, words: list[str]) -> None:
    assert (ROOT / f"slurm/{script}.sbatch").is_file()
    notebooks = [path for path in default_notebooks_dir().glob("*.ipynb") if path.stem[3:] == script]
    names = {words[at + 1]: "1" for at, word in enumerate(words) if word == "-p"}
    (notebook,) = notebooks
    declared = declared_parameters(notebook)
    assert set(names) <= set(declared)


def test_defaults_that_scripts_pass_are_parameters_of_their_notebooks() -> None:
    for path in sorted((ROOT / "slurm").glob("*.sbatch")):
        text = path.read_text()
        for notebook, rest in re.findall(r"^ *run_stage (\w+) (.*)$", text, re.MULTILINE):
            declared = declared_parameters(default_notebooks_dir() / f"{notebook}.ipynb")
            passed = re.findall(r"-p (\w+) (\S+)", rest)
            assert {name for name, _ in passed} <= set(declared), path.name
    server = declared_parameters(default_notebooks_dir() / "02_ttt_server.ipynb")
    passed_on = re.search(r"for name in (.*); do", (ROOT / "slurm/ttt_server.sbatch").read_text())[1].split()
    assert {"n_workers", "idle_timeout_s", *passed_on} <= set(server)


def test_workers_of_other_nodes_are_told_all_that_a_result_depends_on() -> None:
    passed_on = re.search(r"for name in (.*); do", (ROOT / "slurm/ttt_server.sbatch").read_text())[1].split()
    assert set(passed_on) >= {"model", "max_seq_length", "grader", "dtype", "deterministic"}
    assert set(passed_on) <= set(WorkerSettings.__dataclass_fields__)


def test_dry_run_here_shows_a_command_a_stage_and_starts_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_submit(["rest_em", "--small", "--executor", "local", "--run-dir", str(tmp_path / "run"), "--dry-run"])
    shown = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("#")]
    assert len(shown) == len(list(make_chain("rest_em", DEMO)))
    assert all(line.startswith("seal-nb run ") for line in shown)
    assert not (tmp_path / "run").exists()
