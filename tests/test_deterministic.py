"""`deterministic`: a request gives the same bits whoever runs beside it, before it or after it."""

from pathlib import Path

import pytest
import torch

from seal_nb.protocol import GenerateRequest, TTTReply, TTTRequest
from seal_nb.server.client import InnerLoopSettings
from seal_nb.server.loop import InnerLoop, load_inner_loop
from tests.ttt.tiny import save_tiny_model

MEASURED = {"timings", "server_id"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


def loaded(model: Path, **fields: object) -> InnerLoop:
    torch.set_num_threads(1)
    given = {"model": str(model), "device": "cpu", "dtype": "float32", "adapters_dir": model.parent / "adapters"}
    return load_inner_loop(InnerLoopSettings(**given | fields))  # type: ignore[arg-type]


def requests() -> list[TTTRequest]:
    """Questions are shared, so that the base's kept answers come from other requests in another order."""
    questions = [{"title": "T", "question": f"what is {n}?", "answer": f"it is {n}"} for n in range(6)]
    return [
        TTTRequest.model_validate(
            {
                "request_id": f"r{n}",
                "seed": n,
                "train_sequences": [f"T\n{'so ' * (n + 1)}{i}" for i in range(n + 1)],
                "eval_questions": questions[n : n + 3],
                "finetune_epochs": 3,
                "lora_rank": 2 + n,
                "max_new_tokens": 8,
                "soft_scores": True,
            }
        )
        for n in range(4)
    ]


def answered(loop: InnerLoop, asked: list[TTTRequest]) -> dict[str, dict]:
    for one in asked:
        loop.submit(one)
    found = {}
    while loop.busy:
        for reply in loop.advance():
            assert isinstance(reply, TTTReply)
            found[str(reply.request_id)] = reply.model_dump(exclude=MEASURED)
    return found


def test_replies_are_bit_identical_in_any_order_and_company(model: Path) -> None:
    forwards = answered(loaded(model, deterministic=True), requests())
    backwards = answered(loaded(model, deterministic=True), requests()[::-1])
    alone = {
        key: reply for one in requests() for key, reply in answered(loaded(model, deterministic=True), [one]).items()
    }
    assert forwards == backwards == alone


def test_it_is_one_adapter_and_one_text_at_a_time_and_says_so_in_the_model_id(model: Path) -> None:
    loop = loaded(model, deterministic=True, n_slots=8, decode_rows=64)
    assert (loop.trainer.n_slots.now, loop.decoder.max_rows.now) == (1, 1)
    assert loop.model_id == f"{loaded(model).model_id}-deterministic"
    loop.submit(GenerateRequest(prompts=["a", "b"], request_id="g", seed=1, max_tokens=4, temperature=1.0, top_p=1.0))
    while loop.busy:
        loop.advance()
    assert loop.n_done == 1


def test_without_it_replies_agree_within_rounding(model: Path) -> None:
    fixed, free = (answered(loaded(model, deterministic=on), requests()) for on in (True, False))
    for key, one in fixed.items():
        assert free[key]["epoch_losses"] == pytest.approx(one["epoch_losses"], rel=1e-4)
        assert free[key]["adapter_gold_logprobs"] == pytest.approx(one["adapter_gold_logprobs"], rel=1e-3)
