"""The table of `benchmarks.gpu`. Pure text."""

from collections.abc import Iterator
from typing import Any


def table(result: dict[str, Any]) -> str:
    parts = (_head(result), _slots(result), _round(result))
    return "\n" + "\n\n".join("\n".join(part) for part in parts)


def _head(result: dict[str, Any]) -> Iterator[str]:
    yield f"{result['device']}, torch {result['torch']}, {result['config']}, {result['dtype']}, " + (
        f"{result['minutes']:.1f} minutes"
    )
    for c in result["checks"]:
        yield (
            f"slots against one adapter alone, {c['config']}, {c['dtype']}: update {c['update_distance']:.2g}"
            f" (alone, padded otherwise: {c['update_distance_alone_padded_otherwise']:.2g}), loss"
            f" {c['loss_difference']:.2g}: {'passed' if c['passed'] else 'FAILED'}"
        )
    yield f"best {result['settings']['matmul_size']}³ product: {result['matmul_tflops']:.4g} TFLOP/s"


def _slots(result: dict[str, Any]) -> Iterator[str]:
    yield f"{'N':>3}{'tokens/s':>10}{'jobs/min':>10}{'ms/step':>9}{'of peak':>9}{'GiB':>7}{'syncs':>7}"
    for row in result["slots"]:
        memory, syncs = row["peak_memory_gib"], row["synchronisations_a_step"]
        yield (
            f"{row['slots']:>3}{row['tokens_per_s']:>10.0f}{row['jobs_per_minute']:>10.1f}"
            f"{1e3 * row['step_s']:>9.1f}{row['matmul_share']:>9.1%}"
            f"{'' if memory is None else f'{memory:.1f}':>7}{'' if syncs is None else syncs:>7}"
        )


def _round(result: dict[str, Any]) -> Iterator[str]:
    published, whole = result["published"], result["whole_jobs"]
    yield (
        f"published way (extrapolated from {published['steps_timed']} steps of"
        f" {published['padded_step_s']:.3g} s): a round of 750 runs in {published['round_minutes']:.0f} min;"
        f" not padded {published['round_minutes_unpadded']:.0f} min"
    )
    yield (
        f"slots, N = {whole['slots']}, from {whole['jobs']} whole jobs: a round in"
        f" {whole['round_minutes']:.2f} min (training {whole['round_train_minutes']:.2f},"
        f" answering {whole['round_answer_minutes']:.2f})"
    )
