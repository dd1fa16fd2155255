"""Continual self-edits: passages are edited into the weights one after the other (`continual`).

SEAL, arXiv 2506.10943, `continual_self_edits.py`: the model as it is now writes a self-edit of the next passage, an
adapter is trained on it, and all passages so far are asked again. The published code merges each adapter into the
weights. Here it stays as a frozen adapter in a stack, which gives the same outputs, so all sequences advance together.
Other strategies are in `continual_strategies`; the matrix and its means are in `results.continual`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seal_nb.experiments.continual_strategies import (
    ContinualSettings,
    Edits,
    answers_by_retrieval,
    draw_sequences,
    edit_and_merge,
    edit_request,
    texts_of_step,
    unedited_request,
)
from seal_nb.experiments.control import ask_control, control_frame
from seal_nb.experiments.session import TTT, ask, tell_work
from seal_nb.experiments.settings import Arm, Training, names_in
from seal_nb.metrics import Verdicts
from seal_nb.passages import Passage
from seal_nb.protocol import TTTReply, TTTRequest
from seal_nb.results.continual import (
    ContinualRun,
    Matrix,
    continual_estimates,
    continual_matrix,
    strategy_rows,
    summarize_sequences,
    verdict_row,
)
from seal_nb.storage import Journal, runs_folder, write_json, write_record
from seal_nb.views import plots

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


class Continual(dict[str, list[list[list[Verdicts | None]]]]):
    """Verdicts after every edit, by strategy, with tables and figures. `continual["stacked"][s][t][p]` are the verdicts
    on passage p of sequence s after t edits; None where the passage was not asked. `sequences[s]` are the passages of a
    sequence, `texts[strategy][s]` the self-edits."""

    def __init__(
        self,
        sequences: Sequence[Sequence[Passage]],
        verdicts: Mapping[str, list[list[list[Verdicts | None]]]],
        texts: Mapping[str, list[list[str]]],
        control: Mapping[str, TTTReply],
    ) -> None:
        super().__init__(verdicts)
        self.sequences, self.texts, self._control = sequences, texts, control

    def matrices(self, strategy: str) -> list[list[list[float | None]]]:
        """One matrix for each sequence: row t, column p is the accuracy on passage p after t edits."""
        return [continual_matrix(rows) for rows in self[strategy]]

    def mean_matrix(self, strategy: str) -> Matrix:
        """The matrix averaged over sequences."""
        return self._run(strategy).mean

    def _run(self, strategy: str) -> ContinualRun:
        return ContinualRun(value=summarize_sequences(self.matrices(strategy), dataset="", base_model=""))

    def estimates(self) -> "pd.DataFrame":
        """Strategy, quantity, mean and 95 % interval; differences are paired over sequences."""
        import pandas as pd

        return pd.DataFrame(
            {"strategy": name, "quantity": quantity, **asdict(estimate)}
            for name in self
            for quantity, estimate in continual_estimates(self.matrices(name)).items()
        )

    def strategies(self) -> "pd.DataFrame":
        """Accuracy on all passages after the last edit, each strategy against the first."""
        import pandas as pd

        return pd.DataFrame(strategy_rows({name: self.matrices(name) for name in self}))

    def unrelated(self) -> "pd.DataFrame":
        """Accuracy on general questions before and after all edits; empty unless they were asked."""
        return control_frame(self._control)

    def plot_matrix(self, strategy: str) -> "Figure":
        """The mean matrix as a heat map; cells of passages that were not asked are blank."""
        return plots.plot_continual_matrix(self.mean_matrix(strategy), n_sequences=len(self.sequences))

    def plot_curve(self, strategy: str) -> "Figure":
        """Accuracy on all passages so far after each edit, and of the model that was never edited."""
        run = self._run(strategy)
        curve = run.curve()
        return plots.plot_continual_curve(run.seen(), curve["never_edited"], just_edited=curve["just_edited"])


def continual(
    ttt: TTT,
    passages: Sequence[Passage],
    *,
    strategies: str | Sequence[str] = "stacked",
    n_sequences: int = 8,
    n_datapoints: int = 8,
    arm: Arm = "self_edits",
    training: Training | None = None,
    replay_passages: int = 0,
    prompt_key: str = "implications",
    max_tokens: int = 8192,
    temperature: float = 1.0,
    top_p: float = 0.95,
    split_newlines: bool = True,
    check_unrelated: bool = False,
    seed: int = 42,
    folder: str | Path = "runs/continual",
    dataset: str = "",
    price_per_hour: float = 0.0,
) -> Continual:
    """Edit the passages of random sequences into the weights one by one; ask all passages so far after each edit.

    Args:
        ttt: the server; it keeps the adapters. The strategy merged starts others like it, so it must come from
            `ttt_server`.
        passages: the sequences are drawn from them.
        strategies: of stacked (frozen adapters on one base), merged (a model folder and a server for each edit, as
            published), replay (each edit also trains on the self-edits before it), retrieval (one adapter for each
            passage on the untouched model; BM25 chooses which one answers a question).
        n_sequences: sequences.
        n_datapoints: passages of a sequence.
        arm: self_edits (the model writes them, as published), hand_written or passage_only.
        training: settings of the adapters; the published ones unless given.
        replay_passages: with replay: earlier passages trained on again with each edit; 0: all.
        prompt_key: of the self-edits' prompt.
        max_tokens: tokens of one self-edit at most.
        temperature: of the self-edits.
        top_p: of the self-edits.
        split_newlines: each line of a self-edit is a train sequence (published: yes).
        check_unrelated: ask twenty general questions before and after all edits (stacked and replay).
        seed: draws the sequences and seeds all requests.
        folder: for summaries, their records and the journal; a second call asks only for what is missing.
        dataset: name of the data, for the summaries.
        price_per_hour: of the server; adds the cost to the line that says how much work it is.

    Returns:
        Verdicts by strategy. The summaries (`summary_continual.json` …) are in `folder`.

    Raises:
        SettingsError: for settings that do not fit, such as fewer passages than a sequence needs.
        RemoteError: when a request failed on the server.

    Source: SEAL, arXiv 2506.10943, "catastrophic forgetting".
    """
    folder = runs_folder(folder)
    settings = {
        name: ContinualSettings(
            strategy=name,  # type: ignore[arg-type]
            n_sequences=n_sequences,
            n_datapoints=n_datapoints,
            arm=arm,
            replay_passages=replay_passages,
            prompt_key=prompt_key,
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            split_newlines=split_newlines,
            seed=seed,
            training=training or Training(),
        )
        for name in names_in("strategies", strategies)
    }
    first = next(iter(settings.values()))
    sequences = draw_sequences(passages, first)
    edits_of: dict[str, list[Edits]] = {}
    with Journal(folder / "journal.jsonl") as journal:
        row_zero = [unedited_request(sequence, first, model_id=ttt.model_id) for sequence in sequences]
        unedited = [ask(ttt, row_zero, journal, what="never edited").of(request) for request in row_zero]
        for name, one in settings.items():
            if name == "merged":
                edits_of[name] = edit_and_merge(ttt, sequences, one, journal, folder=folder / name)
                continue
            edits_of[name] = [Edits() for _ in sequences]
            for step in range(1, n_datapoints + 1):
                texts = texts_of_step(ttt, journal, sequences, edits_of[name], one)
                requests = [
                    edit_request(number, sequence, [*edits.texts, text], edits.stack, one, model_id=ttt.model_id)
                    for number, (sequence, edits, text) in enumerate(zip(sequences, edits_of[name], texts, strict=True))
                ]
                what = f"{name}, edit {step} of {n_datapoints}"
                tell_work(ttt, requests, journal, what=what, price_per_hour=price_per_hour)
                collected = ask(ttt, requests, journal, what=f"{name}, edit {step}")
                for edits, text, request in zip(edits_of[name], texts, requests, strict=True):
                    edits.add(text, request, collected.of(request))
                if name == "retrieval":
                    stacks = [edits.stack for edits in edits_of[name]]
                    answered = answers_by_retrieval(ttt, journal, sequences, stacks, settings=one)
                    for edits, reply in zip(edits_of[name], answered, strict=True):
                        edits.replies[-1] = reply
        control = {}
        if check_unrelated:
            stacked = [name for name in settings if name in ("stacked", "replay")]
            ends = {f"{name} {s + 1}": edits.stack for name in stacked for s, edits in enumerate(edits_of[name])}
            control = ask_control(ttt, journal, ends, first.training, seed=seed)
    verdicts = {
        name: [
            [
                verdict_row(reply.adapter_correct, [len(passage.questions) for passage in sequence], step)
                for step, reply in enumerate([unedited[s], *edits.replies])
            ]
            for s, (sequence, edits) in enumerate(zip(sequences, edits_S, strict=True))
        ]
        for name, edits_S in edits_of.items()
    }
    result = Continual(
        sequences, verdicts, {name: [edits.texts for edits in edits_S] for name, edits_S in edits_of.items()}, control
    )
    for name, one in settings.items():
        records = [
            sequence_record(sequence, edits.texts, [row_zero[s], *edits.requests], [unedited[s], *edits.replies])
            for s, (sequence, edits) in enumerate(zip(sequences, edits_of[name], strict=True))
        ]
        summary = summarize_sequences(result.matrices(name), dataset=Path(dataset).name, base_model=ttt.model_id)
        path = write_json(folder / summary_file_name(name), summary | {"strategy": name, "sequences": records})
        write_record(path, stage="06_continual_self_edits", settings=asdict(one), seeds={"seed": seed})
    return result


def sequence_record(
    sequence: Sequence[Passage], texts: Sequence[str], requests: Sequence[TTTRequest], replies: Sequence[TTTReply]
) -> dict[str, Any]:
    """What a summary keeps of one sequence: self-edits, answers and verdicts of every step, row 0 first."""
    return {
        "titles": [passage.title for passage in sequence],
        # Titles repeat: without its questions no answer could be graded again.
        "questions": [
            [{"question": one.question, "answer": one.answer} for one in passage.questions] for passage in sequence
        ],
        "self_edits": list(texts),
        "steps": [
            {
                "request_id": request.request_id,
                "seed": request.seed,
                "texts": reply.adapter_texts,
                "correct": reply.adapter_correct,
                "n_ungraded": sum(verdict is None for verdict in reply.adapter_correct),
            }
            for request, reply in zip(requests, replies, strict=True)
        ],
    }


def summary_file_name(strategy: str) -> str:
    """`summary_continual.json` for stacked adapters, the published way; other strategies add their name."""
    return "summary_continual.json" if strategy == "stacked" else f"summary_continual_{strategy}.json"
