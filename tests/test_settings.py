"""Settings check types and bounds when they are made, whoever makes them."""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from seal_nb.engines.base import Sampling
from seal_nb.errors import SettingsError
from seal_nb.experiments.settings import Training
from seal_nb.experiments.single_passage import SinglePassageSettings
from seal_nb.grading.judge import judge_settings
from seal_nb.server.client import ServeSettings
from seal_nb.settings import Settings
from seal_nb.sft.settings import SftSettings


@pytest.mark.parametrize(
    ("kind", "values", "said"),
    [
        (Training, {"lora_rank": "8"}, "lora_rank='8' is of type str; give a whole number such as 32"),
        (Training, {"lora_rank": np.array([8, 16])}, "lora_rank=array.* is of type ndarray; give a whole number"),
        (Training, {"target_modules": np.array(["q_proj", "v_proj"])}, "target_modules=.* ndarray; give a list"),
        (Training, {"chat": 1}, "chat=1 is of type int; give True or False"),
        (Training, {"finetune_epochs": True}, "finetune_epochs=True is of type bool; give a whole number"),
        (Training, {"target_modules": "q_proj"}, "target_modules='q_proj' is of type str; give a list of texts"),
        (Sampling, {"temperature": math.nan}, "temperature=nan: give a finite number"),
        (Sampling, {"stop": "\n"}, r"stop='\\n' is of type str; give a tuple"),
        (SinglePassageSettings, {"training": {"lora_rank": 3}}, "training=.* is of type dict; give a Training"),
        (SinglePassageSettings, {"arm": "poem"}, "arm='poem': known are self_edits, passage_only"),
        (ServeSettings, {"run_dir": None}, "run_dir=None is of type NoneType; give a path"),
        (ServeSettings, {"run_dir": 3}, "run_dir=3 is of type int; give a path"),
        (ServeSettings, {"n_workers": 1.5}, "n_workers=1.5 is of type float; give a whole number"),
        (SftSettings, {"lora_alpha": 0.0}, "lora_alpha=0.0: must be above 0"),
    ],
)
def test_a_value_that_does_not_fit_is_refused_with_its_name(
    kind: type[Settings], values: dict[str, Any], said: str
) -> None:
    with pytest.raises(SettingsError, match=said):
        kind(**values)


def test_numbers_of_numpy_become_plain_ones_that_a_record_can_hold() -> None:
    made = Training(lora_rank=np.int64(8), finetune_lr=np.float64(1e-3), chat=np.bool_(True))  # type: ignore[arg-type]
    assert json.loads(json.dumps(asdict(made)))["lora_rank"] == 8
    assert (type(made.finetune_lr), type(made.chat)) == (float, bool)


def test_a_whole_number_stays_one_where_a_number_is_meant_as_published_files_have_it() -> None:
    assert json.dumps(Training(lora_alpha=64).lora_params()["alpha"]) == "64"


def test_a_path_may_be_a_text_and_be_absent_where_that_is_meant() -> None:
    assert ServeSettings(run_dir="runs/x").run_dir == Path("runs/x")  # type: ignore[arg-type]
    assert ServeSettings(endpoint_file=None).endpoint_file is None


@pytest.mark.parametrize("field", ["max_tokens=0", "timeout_s=nan", "max_parallel=0"])
def test_a_judge_that_cannot_work_is_refused_by_its_name(field: str) -> None:
    with pytest.raises(SettingsError, match=field.partition("=")[0]):
        judge_settings(f"judge:m?{field}")
