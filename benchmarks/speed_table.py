"""The table of `benchmarks.inner_loop`: ways side by side, where the gain comes from, growth. Pure text."""

from collections.abc import Iterator
from typing import Any

NAMES = {
    "published": "published: PEFT + Trainer, padded",
    "careful": "careful: PEFT + Trainer, not padded",
    "slots": "slots",
}


def by_source(published: dict[str, Any], careful: dict[str, Any], ours: dict[str, Any]) -> list[dict[str, Any]]:
    """Seconds of one request in one process, one change after the other, all in the same processes and
    threads."""
    answers = careful["baseline_s"] + careful["answer_s"]
    kept = careful["baseline_s"] * ours["baseline_share"] + careful["answer_s"]
    stages = [
        ("published way", published["train_s"] + answers),
        ("no padding", careful["train_s"] + answers),
        ("training in slots", ours["train_s"] + answers),
        ("baseline kept", ours["train_s"] + kept),
        ("grouped decoding", ours["train_s"] + ours["answer_s"]),
    ]
    before = [stages[0][1], *(seconds for _, seconds in stages)]
    return [
        {"change": name, "s_per_request": seconds, "factor": previous / seconds}
        for (name, seconds), previous in zip(stages, before, strict=False)
    ]


def table(result: dict[str, Any]) -> str:
    parts = [_head(result), _ways(result), _sources(result), _growth(result), _ratios(result)]
    return "\n\n".join("\n".join(lines) for lines in parts)


def _head(result: dict[str, Any]) -> Iterator[str]:
    machine, work = result["machine"], result["workload"]
    yield f"{machine['cpu']}, {machine['cores']} cores, {result['dtype']}, {result['minutes']:.1f} minutes"
    yield f"requests: {work['source']}; {work['steps_per_request']:.0f} steps," + (
        f" {work['train_tokens_per_request']:.0f} train tokens a request"
    )


def _ways(result: dict[str, Any]) -> Iterator[str]:
    yield f"{'whole requests':38}{'proc x thr':>11}{'a minute':>10}{'train s':>9}{'answer s':>9}{'RSS MB':>8}"
    for row in result["ways"]:
        name, *numbers = _way(row)
        cells = zip([*numbers, str(row.get("peak_rss_mb", ""))], (11, 10, 9, 9, 8), strict=True)
        yield f"{name:38}" + "".join(f"{text:>{width}}" for text, width in cells)
    yield "* extrapolated from timed steps; seconds and memory are those of one process"


def _sources(result: dict[str, Any]) -> Iterator[str]:
    yield f"{'where the gain comes from':38}{'s/request':>11}{'factor':>10}"
    for row in result["gain_by_source"]:
        yield f"{row['change']:38}{row['s_per_request']:>11.1f}{row['factor']:>10.2f}"
    yield from _grading(result["parallel_grading"])


def _grading(row: dict[str, Any]) -> Iterator[str]:
    """Apart, since all ways above are graded by a rule that takes no time."""
    yield f"were a judge asked, {row['latency_s']:g} s a call, {row['answers']} answers a request:"
    yield f"{'  one call after another, as published':38}{row['one_by_one_s']:>11.1f}{1:>10.2f}"
    yield f"{'  parallel grading':38}{row['at_once_s']:>11.1f}{row['factor']:>10.2f}"


def _growth(result: dict[str, Any]) -> Iterator[str]:
    yield "training alone, four slots, one thread"
    for row in result["growth"]["sequence_length"]:
        yield f"  sequences of {row['tokens']:>4} tokens: {row['tokens_per_s']:>8.0f} tokens/s"
    for row in result["growth"]["jobs"]:
        yield f"  {row['jobs']:>3} jobs of one epoch: {row['s_per_job']:>8.2f} s a job"


def _ratios(result: dict[str, Any]) -> Iterator[str]:
    yield f"slots against the published way (extrapolated): {result['ratio_published']:.1f} x"
    yield f"slots against the careful way: {result['ratio_unpadded']:.2f} x"
    kept = result["ratio_unpadded_baseline_kept"]
    yield f"slots against the careful way, if that kept the baseline's answers too: {kept:.2f} x"


def markdown(result: dict[str, Any]) -> str:
    """The tables as they stand in docs/inner_loop.md."""
    judge = result["parallel_grading"]
    sources = [
        [row["change"], f"{row['s_per_request']:,.1f}", f"{row['factor']:.2f}"] for row in result["gain_by_source"]
    ]
    verdicts = [
        ["one call after another, as published", f"{judge['one_by_one_s']:.1f}", ""],
        ["parallel grading", f"{judge['at_once_s']:.1f}", f"{judge['factor']:.2f}"],
    ]
    asked = f"{judge['answers']} answers to a judge, {judge['latency_s']:g} s a call"
    return "\n\n".join(
        [
            grid(
                ["whole requests", "processes x threads", "a minute", "training, s", "answers, s"],
                [_way(row) for row in result["ways"]],
            ),
            grid(["where the gain comes from", "s a request", "factor"], sources),
            grid([asked, "s a request", "factor"], verdicts),
        ]
    )


def _way(row: dict[str, Any]) -> list[str]:
    name = NAMES[row["way"]] + (f", N = {row['slots']}" if "slots" in row else "")
    return [
        name + ("*" if "extrapolated_from_steps" in row else ""),
        f"{row['processes']} x {row['threads']}",
        f"{row['requests_per_minute']:.3g}",
        f"{row['train_s']:,.1f}",
        f"{row['answer_s'] + row.get('baseline_s', 0.0):.1f}",
    ]


def grid(head: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *rows])


def rounded(value: Any) -> Any:
    """Four significant digits are more than the measurement has."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: rounded(v) for key, v in value.items()}
    return [rounded(v) for v in value] if isinstance(value, list | tuple) else value
