"""What `make demo` found, from the committed report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"


def demo(path: Path) -> str:
    """What `make demo` found: dense and sparse side by side."""
    found = _read("demo_smollm2_8k")
    seconds, attention, nll = found["seconds"], found["attention_seconds"], found["answer_nll"]
    answers = [answer.strip(".") for answer in found["answer"].values()]
    rows = [
        ["", "dense", "`flex_prefill`", ""],
        ["blocks computed", "1.00", f"{found['density']:.2f}", _oracle(found["oracle_density"])],
        ["attention mass kept (recall)", "1.00", f"{found['recall']:.3f}", "mean over layers and heads"],
        ["attention", *_seconds(attention), f"{_times(found, 'attention')}, estimation and selection included"],
        ["whole prefill", *_seconds(seconds), _times(found, "prefill")],
        ["answer", *answers, f"right is {found['expected']}"],
        [
            "negative log-likelihood of the right answer, per token",
            *(f"{nll[kind]:.3f}" for kind in ("dense", "sparse")),
            f"{nll['a_shape']:.2f} with sinks and a local window alone (`a_shape`)",
        ],
    ]
    stages = ", ".join(f"{stage} {attention[stage]:.2f}" for stage in ("estimate", "select", "table", "kernel"))
    caption = (
        f"*{found['dtype']}, {found['device']}, {found['threads']} threads, torch {found['torch']}, "
        f"{found['date'][:10]}, medians of {found['repeats']} runs in turn. Seconds of sparse attention in all layers: "
        f"{stages}. `python recipes/demo.py --config recipes/configs/demo.yaml dtype={found['dtype']}`; "
        "`benchmarks/results/demo_smollm2_8k.json`*"
    )
    return f"{markdown(rows)}\n\n{caption}"


def markdown(rows: list[list[str]]) -> str:
    """A table whose first row is its head."""
    head, *body = ("| " + " | ".join(row) + " |" for row in rows)
    return "\n".join([head, "|---" * len(rows[0]) + "|", *body])


def _read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def _seconds(of: dict[str, float]) -> list[str]:
    return [f"{of[kind]:.2f} s" for kind in ("dense", "sparse")]


def _times(found: dict[str, Any], what: str) -> str:
    return f"{found['speedup'][what]:.2f}x"


def _oracle(density: float) -> str:
    return f"an oracle needs {density:.2f} for the same recall"
