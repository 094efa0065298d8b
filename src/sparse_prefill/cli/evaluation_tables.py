"""Tables of an evaluation's report, as printed in a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sparse_prefill.cli.output import print_table

OF_TEXTS = {  # heading and format by key
    "name": ("strategy", "{}"),
    "ran_dense": ("dense layers", "{}"),
    "density": ("density", "{:.2f}"),
    "recall": ("recall", "{:.3f}"),
    "worst_recall": ("worst 1%", "{:.3f}"),
    "oracle_gap": ("oracle gap", "{:.2f}x"),
    "overlap": ("overlap", "{:.2f}"),
    "output_error": ("error", "{:.3f}"),
    "kl_last_token": ("KL", "{:.3f}"),
    "needle_nll": ("answer NLL", "{:.2f}"),
    "needle_exact": ("answers", "{:.0%}"),
    "perplexity_ratio_whole": ("perplexity", "{:.3f}x"),
    "perplexity_ratio_last_quarter": ("of last 1/4", "{:.3f}x"),
    "attention_ms": ("attention, ms", "{:.1f}"),
    "speedup_attention": ("speed-up", "{:.2f}x"),
}
OF_TASKS = {
    "task": ("task", "{}"),
    "length": ("length", "{}"),
    "strategy": ("strategy", "{}"),
    "samples": ("samples", "{}"),
    "ran_dense": ("dense layers", "{}"),
    "density": ("density", "{:.2f}"),
    "accuracy": ("accuracy", "{:.0%}"),
    "dense_accuracy": ("dense", "{:.0%}"),
    "exact": ("exact", "{:.0%}"),
    "nll": ("answer NLL", "{:.2f}"),
    "beyond_model": ("beyond the model", "{}"),
}


def print_report(report: Mapping[str, Any]) -> None:
    """Print the tables of texts and of tasks, and the layers that have sliding windows."""
    rows, summary = report["rows"], report.get("tasks", {}).get("summary", [])
    print_table([{**row, "ran_dense": _ran_dense(row)} for row in rows], OF_TEXTS)
    if rows and summary:
        print()
    marks = [{"ran_dense": _ran_dense(row), "beyond_model": "yes" if row["beyond_model"] else None} for row in summary]
    print_table([row | mark for row, mark in zip(summary, marks, strict=True)], OF_TASKS)
    windows: Mapping[str, list[int]] = next((row["windows"] for row in (*rows, *summary) if row.get("windows")), {})
    if windows:
        listed = "; ".join(f"{tokens} tokens in layers {_spans(layers)}" for tokens, layers in windows.items())
        print(
            f"\nSliding windows: {listed}. Those under a strategy's min_length run dense, as in use, and count as such "
            "in all numbers."
        )


def _ran_dense(row: Mapping[str, Any]) -> str | None:
    """How many layers ran dense, by reason; None if none did, or for the dense model."""
    found = {reason: len(layers) for reason, layers in row.get("dense_layers", {}).items()}
    if row.get("strategy") == "dense" or not found:
        return None
    return ", ".join(f"{count} {reason}" for reason, count in found.items())


def _spans(layers: Sequence[int]) -> str:
    """Numbers of layers, with consecutive ones as a span: "0-4, 6"."""
    spans: list[list[int]] = []
    for layer in layers:
        if spans and spans[-1][-1] == layer - 1:
            spans[-1].append(layer)
        else:
            spans.append([layer])
    return ", ".join(str(span[0]) if len(span) == 1 else f"{span[0]}-{span[-1]}" for span in spans)
