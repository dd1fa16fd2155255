"""The tables of `benchmarks.gpu` in Markdown, as they stand in docs/inner_loop.md. Pure text.

python -m benchmarks.gpu_table      (puts those of benchmarks/gpu.json into the docs)
"""

import json
from pathlib import Path
from typing import Any

from benchmarks.speed_table import grid

DOCS = Path(__file__).resolve().parents[1] / "docs/inner_loop.md"
MARKS = ("<!-- gpu tables -->\n", "<!-- end of gpu tables -->\n")


def markdown(result: dict[str, Any]) -> str:
    """Tables of the parts that were measured."""
    makers = {"training": _training, "profile": _profile, "decoding": _decoding}
    parts = [_head(result), *(make(result[name]) for name, make in makers.items() if result.get(name))]
    if "round_minutes" in result:
        parts.append(_round(result))
    return "\n\n".join(parts) + "\n"


def _head(result: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines = [f"{result['device']}, {versions}, {result['config']} in {result['dtype']}, random weights."]
    if product := result.get("matmul"):
        lines.append(f"The best {product['size']}³ product: {product['best_tflops']:.4g} TFLOP/s.")
    for dtype, c in result.get("check", {}).items():
        lines.append(
            f"Slots against one adapter alone, {c['config']}, {dtype}: update {c['update_distance']:.2g}"
            f" (limit {c['update_distance_limit']:.2g}), losses by {c['loss_difference']:.2g}:"
            f" {'passed' if c['passed'] else 'FAILED'}."
        )
    return "\n".join(f"- {line}" for line in lines)


def _training(found: dict[str, Any]) -> str:
    columns = {
        "tokens/s": ("tokens_per_s", ",.0f"),
        "of the product's speed": ("matmul_share", ".1%"),
        "ms a step": ("ms_per_step", ".1f"),
        "ms to issue it": ("issue_ms", ".1f"),
        "kernels": ("kernels_per_step", ","),
        "waits": ("synchronisations_per_step", ""),
        "GiB": ("peak_memory_gib", ".1f"),
    }
    rows = [[n, *(_cell(row[key], form) for key, form in columns.values())] for n, row in found.items()]
    return grid(["slots", *columns], rows)


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"


def _profile(found: dict[str, Any]) -> str:
    names = list(dict.fromkeys(name for row in found.values() for name in row["groups_ms"]))
    rows = [[name, *(_cell(row["groups_ms"].get(name), ".1f") for row in found.values())] for name in names]
    rows.append(["device busy", *(f"{row['busy_ms']:.1f}" for row in found.values())])
    rows.append(["a step without the profiler", *(f"{row['wall_ms']:.1f}" for row in found.values())])
    return grid(["where a step spends, ms", *(f"{n} slots" for n in found)], rows)


def _decoding(found: dict[str, Any]) -> str:
    steps = [k for k in found if k.startswith("ms_per_step")]
    rows = [[f"ms a step, {k.split('_')[3]} rows", f"{found[k]:.1f}"] for k in steps]
    if "tokens_per_s" in found:
        rows.append([f"tokens/s, {found['adapters']} adapters", f"{found['tokens_per_s']:,.0f}"])
    return grid(["answers", ""], rows)


def _round(result: dict[str, Any]) -> str:
    alone, ours = result["alone"], result["round"]
    ways = {
        "published": ("PEFT + Trainer, padded", alone["published_step_s"]),
        "careful": (f"{result['careful_way']}, not padded", result["careful_step_s"]),
    }
    rows = []
    for way, (name, step_s) in ways.items():
        keys = (f"round_minutes_{way}", f"ratio_{way}", f"ratio_{way}_training")
        rows.append([f"{way}: {name}*", f"{1e3 * step_s:.0f}", *(f"{result[key]:,.1f}" for key in keys)])
    own = f"slots, N = {ours['slots']}, from {ours['requests']} requests"
    rows.append([own, "", f"{result['round_minutes']:.2f}", "", ""])
    head = ["a round of 750 requests", "ms a step", "minutes", "slots are faster", "in training alone"]
    return grid(head, rows) + "\n\n\\* extrapolated from timed steps and answers"


def in_docs(text: str, tables: str, marks: tuple[str, str] = MARKS) -> str:
    """The docs' text with these tables between the marks."""
    before, rest = text.split(marks[0])
    return before + marks[0] + tables + marks[1] + rest.split(marks[1])[1]


if __name__ == "__main__":
    measured = json.loads(Path(__file__).with_name("gpu.json").read_text())
    DOCS.write_text(in_docs(DOCS.read_text(), markdown(measured)))
