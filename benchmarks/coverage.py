"""How often intervals contain the truth, and how often "real" is said without an effect, before and after.

Every simulated number of docs/statistics.md comes from here. *Before* are the methods of the first version: the
percentile bootstrap over passages (or sequences) with a sign-flip test. *After* are the functions of `seal_nb.metrics`.
Passages differ in difficulty and in what an adapter gives them; answers to a question without and with the adapter are
correlated. Answers of a passage correlate by 0.16 (published evaluations: 0.09 to 0.16). Differences between an adapter
and its baseline have a standard deviation of 0.27 over passages (0.28 to 0.34).

    python -m benchmarks.coverage               # about 20 minutes on one core, writes benchmarks/coverage.json
    python -m benchmarks.coverage --quick       # a tenth of the runs, writes nothing
    python -m benchmarks.coverage continual     # one study"""

import argparse
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import norm

from seal_nb.metrics import Difference, adjusted, mean_interval, paired_difference
from seal_nb.results.continual import forgetting

N_QUESTIONS = 5
N_PASSAGES = (6, 12, 30, 50, 200)
EFFECTS = (0.0, 0.06, 0.27)
BASELINE = 0.33
DIFFICULTY_SD, SLOPE_SD, QUESTION_SHARE = 0.45, 0.35, 0.5  # of the latent scale, in which an answer's own noise is 1
N_RESAMPLES = 1_000
Rows = dict[str, Any]


def answers(generator: np.random.Generator, n: int, *, baseline: float, effect: float) -> tuple[np.ndarray, np.ndarray]:
    """(n, N_QUESTIONS) verdicts without and with the adapter, whose expected accuracies are exact."""
    difficulty = DIFFICULTY_SD * generator.standard_normal((n, 1))
    slope = SLOPE_SD * generator.standard_normal((n, 1))
    shared = np.sqrt(QUESTION_SHARE) * generator.standard_normal((n, N_QUESTIONS))
    own = np.sqrt(1 - QUESTION_SHARE) * generator.standard_normal((2, n, N_QUESTIONS))
    scales = np.sqrt(1 + DIFFICULTY_SD**2), np.sqrt(1 + DIFFICULTY_SD**2 + SLOPE_SD**2)
    before = norm.ppf(baseline) * scales[0] + difficulty + shared + own[0] > 0
    after = norm.ppf(baseline + effect) * scales[1] + difficulty + slope + shared + own[1] > 0
    return before, after


@functools.cache
def drawn_passages(n: int) -> np.ndarray:
    """(N_RESAMPLES, n): how often each passage is in each sample, the same samples every time."""
    return np.random.default_rng(0).multinomial(n, [1 / n] * n, size=N_RESAMPLES) / n


def bootstrap(values_P: np.ndarray) -> tuple[float, float]:
    """The percentile interval over passages, as in the first version."""
    low, high = np.quantile(drawn_passages(len(values_P)) @ values_P, [0.025, 0.975])
    return round(float(low), 12), round(float(high), 12)


def sign_flip_p(values_P: np.ndarray) -> float:
    signs = np.random.default_rng(0).choice([-1, 1], size=(N_RESAMPLES, len(values_P)))
    if len(values_P) <= 12:
        signs = 1 - 2 * (np.arange(2 ** len(values_P))[:, None] >> np.arange(len(values_P)) & 1)
    return float((np.abs(signs @ values_P) >= abs(values_P.sum()) - 1e-9).mean())


def was_real(values_P: np.ndarray) -> bool:
    """As the first version called it: interval and sign-flip test."""
    low, high = bootstrap(values_P)
    return not low <= 0 <= high and sign_flip_p(values_P) < 0.05


def share(found: Iterator[bool] | list[bool]) -> float:
    return round(float(np.mean(list(found))), 4)


def coverage(n_runs: int) -> list[Rows]:
    """Coverage of the intervals of a difference and of a mean, and "real" (an error where the effect is 0)."""
    rows = []
    for n in N_PASSAGES:
        for effect in EFFECTS:
            generator, seen = np.random.default_rng([n, round(100 * effect)]), []
            for _ in range(n_runs):
                before, after = answers(generator, n, baseline=BASELINE, effect=effect)
                difference, mean = paired_difference(after.tolist(), before.tolist()), mean_interval(after.tolist())
                of_passages = after.mean(axis=1) - before.mean(axis=1)
                low, high = bootstrap(of_passages)
                low_mean, high_mean = bootstrap(after.mean(axis=1))
                rate = BASELINE + effect
                seen.append((
                    low <= effect <= high, difference.low <= effect <= difference.high,
                    low_mean <= rate <= high_mean, mean.low <= rate <= mean.high, difference.is_real,
                ))  # fmt: skip
            names = ("difference_before", "difference_after", "mean_before", "mean_after", "real_after")
            rows.append(
                {"passages": n, "effect": effect} | dict(zip(names, np.mean(seen, axis=0).round(4), strict=True))
            )
    return rows


def rare_answers(n_runs: int) -> list[Rows]:
    """The same where few answers are right: a small model on passages that it cannot know."""
    rows = []
    for n in (6, 12, 30, 200):
        for rate in (0.02, 0.05):
            generator, seen = np.random.default_rng([n, round(100 * rate)]), []
            for _ in range(n_runs):
                _, after = answers(generator, n, baseline=0.0, effect=rate)
                mean, gain = (
                    mean_interval(after.tolist()),
                    paired_difference(after.tolist(), np.zeros_like(after).tolist()),
                )
                low, high = bootstrap(after.mean(axis=1))
                seen.append((low <= rate <= high, mean.low <= rate <= mean.high, gain.low <= rate <= gain.high))
            names = ("mean_before", "mean_after", "gain_after")
            rows.append({"passages": n, "rate": rate} | dict(zip(names, np.mean(seen, axis=0).round(4), strict=True)))
    return rows


def many_arms(n_runs: int, n_arms: int = 10, n: int = 50) -> Rows:
    """Ten arms without any effect, every two compared: how often at least one difference is called real."""
    generator, before, after = np.random.default_rng(10), [], []
    for _ in range(n_runs):
        difficulty = DIFFICULTY_SD * generator.standard_normal((1, n, 1))
        slope = SLOPE_SD * generator.standard_normal((n_arms, n, 1))
        noise = generator.standard_normal((n_arms, n, N_QUESTIONS))
        arms = (norm.ppf(BASELINE) + difficulty + slope + noise > 0).tolist()
        differences = [paired_difference(a, b) for at, a in enumerate(arms) for b in arms[:at]]
        before.append(any(one.is_real for one in differences))
        after.append(any(one.is_real for one in adjusted(differences) if one))
    return {"arms": n_arms, "passages": n, "any_real_before": share(before), "any_real_after": share(after)}


def continual(n_runs: int) -> list[Rows]:
    """Sequences drawn from a pool of passages whose mean change is zero in the population, but not in the pool."""
    rows = []
    for pool, n_sequences, k in ((12, 8, 6), (12, 64, 6), (50, 8, 8), (200, 8, 8), (200, 64, 8)):
        generator, before, after = np.random.default_rng(pool + n_sequences), [], []
        for _ in range(n_runs if n_sequences < 64 else n_runs // 4):
            of_passage = 0.25 * generator.standard_normal(pool)
            drawn = np.array([generator.permutation(pool)[:k] for _ in range(n_sequences)])
            change = of_passage[drawn] + 0.25 * generator.standard_normal((n_sequences, k))
            before.append(was_real(change.mean(axis=1)))
            zeros = np.zeros_like(change).tolist()
            how: dict[str, Any] = {"unit": "sequences", "groups_P_Q": drawn.tolist(), "n_each": N_QUESTIONS}
            after.append(paired_difference(change.tolist(), zeros, **how).is_real)
        about = {"pool": pool, "sequences": n_sequences, "passages_of_a_sequence": k}
        rows.append(about | {"false_real_before": share(before), "false_real_after": share(after)})
    return rows


def forgetting_of_nothing(n_runs: int, k: int = 8, n_sequences: int = 8) -> list[Rows]:
    """Forgetting where nothing is forgotten: each cell of a passage is its accuracy and noise."""
    rows = []
    for n_questions in (5, 10, 20):
        generator, means, chances, ps = np.random.default_rng(n_questions), [], [], []
        for _ in range(n_runs):
            rates = generator.beta(2, 3, size=(n_sequences, 1, k))
            matrices = (generator.binomial(n_questions, rates, size=(n_sequences, k + 1, k)) / n_questions).tolist()
            found = forgetting(matrices, {"unit": "sequences"})
            measured, chance = found["forgetting"], found["forgetting_by_chance"]
            assert isinstance(measured, Difference) and chance is not None
            means.append(measured.mean)
            chances.append(chance.mean)
            ps.append(measured.p_value)
        about = {"questions": n_questions, "sequences": n_sequences, "passages_of_a_sequence": k}
        about |= {
            "forgetting_before": round(float(np.mean(means)), 4),
            "chance_after": round(float(np.mean(chances)), 4),
        }
        rows.append(about | {"p_below_5_percent": share([p < 0.05 for p in ps])})
    return rows


def seeds(n_runs: int, n: int = 30) -> list[Rows]:
    """One adapter for all passages (CPT): its seed moves all of them. One seed, or three that are pooled."""
    rows = []
    for n_seeds in (1, 3, 8):
        generator, covered = np.random.default_rng(n_seeds), []
        for _ in range(n_runs):
            passage, seed = 0.2 * generator.standard_normal((n, 1)), 0.04 * generator.standard_normal(n_seeds)
            scores = np.clip(0.4 + passage + seed + 0.2 * generator.standard_normal((n, n_seeds)), -2, 3)
            zeros, labels = np.zeros_like(scores).tolist(), [list(range(n_seeds))] * n
            found = paired_difference(scores.tolist(), zeros, groups_P_Q=labels, group="seeds")
            covered.append(found.low <= 0.4 <= found.high)
        rows.append({"seeds": n_seeds, "passages": n, "coverage_after": share(covered)})
    return rows


def markdown(found: dict[str, Any]) -> list[str]:
    """The rows of the tables in docs/statistics.md."""
    lines = []
    for at, row in enumerate(found["coverage"]):
        if not row["effect"]:
            of_n = found["coverage"][at : at + 3]
            before, after = ([f"{one[f'difference_{when}']:.3f}" for one in of_n] for when in ("before", "after"))
            means = [f"{one['mean_after']:.3f}" for one in of_n]
            cells = [str(row["passages"]), *before, *after, " ".join(means), f"{row['real_after']:.3f}"]
            lines.append(f"| {' | '.join(cells)} |")
    for one in found["continual"]:
        drawn = f"{one['sequences']} × {one['passages_of_a_sequence']}"
        lines.append(f"| {one['pool']} | {drawn} | {one['false_real_before']:.1%} | {one['false_real_after']:.1%} |")
    for one in found["forgetting"]:
        points, chance = 100 * one["forgetting_before"], 100 * one["chance_after"]
        lines.append(f"| {one['questions']} | {points:+.1f} | {chance:+.1f} | {one['p_below_5_percent']:.1%} |")
    for one in found["rare_answers"]:
        shares = [f"{one[name]:.3f}" for name in ("mean_before", "mean_after", "gain_after")]
        lines.append(f"| {one['passages']} | {one['rate']:.0%} | {' | '.join(shares)} |")
    return lines


def table(rows: list[Rows] | Rows) -> str:
    import pandas as pd

    return str(pd.DataFrame(rows if isinstance(rows, list) else [rows]).to_string(index=False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the runs; nothing is written")
    studies: dict[str, tuple[Callable[[int], Any], int]] = {
        "coverage": (coverage, 10_000), "rare_answers": (rare_answers, 10_000), "many_arms": (many_arms, 1_000),
        "continual": (continual, 2_000), "forgetting": (forgetting_of_nothing, 300), "seeds": (seeds, 4_000),
    }  # fmt: skip
    parser.add_argument("studies", nargs="*", choices=[*studies, []], help="default: all")
    asked, path = parser.parse_args(), Path(__file__).with_suffix(".json")
    found = json.loads(path.read_text()) if path.exists() else {}
    for name in asked.studies or studies:
        study, n_runs = studies[name]
        found[name] = study(n_runs // 10 if asked.quick else n_runs)
        print(f"\n{name}\n{table(found[name])}", flush=True)
        if not asked.quick:
            path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
