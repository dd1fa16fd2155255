"""SQuAD v1.1 from the Hugging Face hub, turned into item files as published (``seal-nb data squad``).

Rajpurkar et al. 2016 (https://huggingface.co/datasets/rajpurkar/squad), CC BY-SA 4.0: name the source, share
alike. One item a paragraph, in the order of the data set, the first answer as gold, as SEAL's own item files
(arXiv 2506.10943) have it. The validation split gives SEAL's ``squad_val.json``.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from seal_nb.errors import DataError
from seal_nb.passages import Passage, Question, to_item
from seal_nb.runs import write_json

REPOSITORY = "rajpurkar/squad"
FILES = {
    "train": "plain_text/train-00000-of-00001.parquet",
    "validation": "plain_text/validation-00000-of-00001.parquet",
}
OUT_NAMES = {"train": "squad_train.json", "validation": "squad_val.json"}  # SEAL's


def passages_from_rows(rows: Iterable[Mapping[str, Any]]) -> list[Passage]:
    """One passage for each paragraph from the hub's rows, one a question, in order of first appearance."""
    questions: dict[tuple[str, str], list[Question]] = {}
    for row in rows:
        key = (row["title"].replace("_", " "), row["context"])
        gold = Question(question=row["question"], answer=row["answers"]["text"][0])
        questions.setdefault(key, []).append(gold)
    return [
        Passage(title=title, context=context, questions=tuple(asked))
        for (title, context), asked in questions.items()
    ]


def fetch_squad(split: str, folder: Path) -> Path:
    """Write the split's item file into ``folder``. Raises: DataError where it cannot be had, with remedy."""
    rows = _rows(split)
    return write_json(folder / OUT_NAMES[split], [to_item(one) for one in passages_from_rows(rows)])


def _rows(split: str) -> list[dict[str, Any]]:
    if split not in FILES:
        raise DataError(f"SQuAD has no split {split!r}", remedy=f"give {' or '.join(FILES)}")
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(
            "SQuAD's files on the hub are parquet, and pyarrow is not installed",
            remedy="pip install -e '.[data]'",
        ) from error
    rows: list[dict[str, Any]] = parquet.read_table(_downloaded(FILES[split])).to_pylist()
    return rows


def _downloaded(file: str) -> str:
    from huggingface_hub import hf_hub_download

    try:
        return hf_hub_download(REPOSITORY, file, repo_type="dataset")
    except (OSError, ValueError, RuntimeError) as error:  # what it raises for every kind of failure
        said = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        raise DataError(
            f"{REPOSITORY} could not be fetched from the hub ({said})",
            remedy="check the network or HF_ENDPOINT; or give train-v1.1.json from SQuAD's own site as the "
            "dataset, which is read as it is",
        ) from error
