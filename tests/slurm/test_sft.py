"""The training of a ReST-EM round over two nodes: its processes meet, and write one model."""

import json

from tests.slurm.cluster import Cluster
from tests.slurm.conftest import Project


def test_two_nodes_train_one_model(project: Project, tiny_model: str, slurm: Cluster) -> None:
    folder = project.path("runs/sft")
    folder.mkdir(parents=True)
    rows = [{"prompt": f"Passage {n}. ", "completion": f"Implication {n}."} for n in range(4)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "sft_best1of1_test.jsonl").write_text(text)
    options = (
        "--model",
        tiny_model,
        "--gradient-accumulation-steps",
        "2",
        "--epochs",
        "1",
        "--lora-rank",
        "4",
    )
    job = project.sbatch("sft", "runs/sft", *options)
    assert slurm.wait(job, "COMPLETED")["NumNodes"] == "2"
    result = project.json("runs/sft/model/sft_result.json")
    assert result["n_examples"] == 4
    assert result["n_steps"] == 2
    assert (folder / "model/config.json").is_file()
