"""A server that ended for want of clients is started once more for one that comes late."""

from pathlib import Path

import pytest

from seal_nb.chain.slurm import SlurmError, restart_server, submit_chain
from seal_nb.chain.stages import make_chain
from seal_nb.errors import DataError, SettingsError
from tests.chain.planning import SMALL, cluster, jobs_in, with_a_server


def again(folder: Path) -> str:
    return restart_server(folder, project=Path.cwd(), tell=print)


def test_forgotten_server_is_submitted_once_more_without_waiting_and_then_it_is_the_chain_s(fakes: Path) -> None:
    folder, first = with_a_server(fakes)
    earlier = (fakes / "submitted").read_text()
    second = again(folder)
    assert int(second) > int(first)
    said = (fakes / "submitted").read_text().removeprefix(earlier)
    assert "--gpus-per-node=2 slurm/ttt_server.sbatch -p output_dir run/base_server -p " in said
    assert "--dependency" not in said
    assert jobs_in(fakes / "run")["base_server"] == second
    (fakes / f"job{second}").write_text(f"JobId={second} JobState=PENDING Reason=Resources\n")
    assert again(folder) == second  # another late client joins it
    assert (fakes / "submitted").read_text() == earlier + said


def test_server_submitted_from_a_job_inherits_the_site_and_nothing_of_that_job(
    fakes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = with_a_server(fakes)
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "43")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    again(folder)
    assert (fakes / "submitted").read_text().endswith(" array= gpus= limit=60\n")


def test_forgotten_server_over_several_nodes_is_an_array_again(fakes: Path) -> None:
    folder, first = with_a_server(fakes, nodes=2)
    second = again(folder)
    assert first.endswith("_0") and second.endswith("_0") and first != second
    assert "--array=0-1" in (fakes / "submitted").read_text().splitlines()[-1]


def test_server_that_slurm_still_knows_is_queued_again_under_its_number(fakes: Path) -> None:
    folder, job = with_a_server(fakes, nodes=2)
    (fakes / f"job{job}").write_text("JobId=1 JobState=COMPLETED Reason=None\n")
    assert again(folder) == job
    assert (fakes / "requeued").read_text() == job.removesuffix("_0") + "\n"


def test_server_that_failed_is_not_started_again(fakes: Path) -> None:
    folder, job = with_a_server(fakes)
    (fakes / f"job{job}").write_text("JobId=1 JobState=FAILED Reason=NonZeroExitCode ExitCode=1:0\n")
    with pytest.raises(SlurmError, match=f"job {job} is FAILED; look at .*02_ttt_server-{job}.log"):
        again(folder)


def test_folder_of_no_server_is_not_started_again(fakes: Path) -> None:
    folder, _ = with_a_server(fakes)
    with pytest.raises(SettingsError, match="not the folder of a submitted server"):
        again(folder.parent / "results")
    with pytest.raises(DataError, match="no chain was submitted here"):
        again(fakes / "elsewhere/base_server")
    assert not (fakes / "elsewhere").exists()


def test_server_is_what_it_was_after_the_rest_was_submitted_again(fakes: Path) -> None:
    folder, job = with_a_server(fakes, nodes=2)
    (fakes / f"job{job}").write_text(f"JobId={job} JobState=RUNNING Reason=None\n")
    submit_chain(make_chain("continual", SMALL), fakes / "run", cluster(project=fakes, idle_timeout_s=5), tell=print)
    (fakes / f"job{job}").unlink()
    again(folder)
    first, *_, last = (fakes / "submitted").read_text().splitlines()
    assert last.partition(" array=")[0] == first.partition(" array=")[0].replace("a100:", "")
    assert "--array=0-1 " in last and "-p idle_timeout_s 1800.0" in last
