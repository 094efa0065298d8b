"""Tables of committed measurements: the demo, tasks, calibration and prompts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparse_prefill.tasks import summary

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
PARTS = ("calibrated", "one_value", "held_out")


def demo(path: Path) -> str:
    """What `make demo` found: dense and sparse side by side."""
    return _demo("demo_smollm2_8k", "flex_prefill")


def demo_long(path: Path) -> str:
    """The same of a second model and a longer prompt."""
    return _demo("demo_qwen2_5_coder_16k", "mean_slash")


def _demo(name: str, strategy: str) -> str:
    found = _read(name)
    seconds, attention, nll = found["seconds"], found["attention_seconds"], found["answer_nll"]
    answers = [answer.strip(".") for answer in found["answer"].values()]
    rows = [
        ["", "dense", f"`{strategy}`", ""],
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
    runs = f"medians of {found['repeats']} runs in turn" if found["repeats"] > 1 else "one run each"
    told = (
        f"*{found['model']}, {found['tokens']:,} tokens, {found['dtype']}, {found['device']}, {found['threads']} "
        f"threads, torch {found['torch']}, {found['date'][:10]}, {runs}. Seconds of sparse attention in all layers: "
        f"{stages}. `{found['command']}`; `benchmarks/results/{name}.json`*"
    )
    return f"{markdown(rows)}\n\n{told}"


def tasks(path: Path) -> str:
    """Exact matches and likelihoods of answers inside the prefill, and those of the dense model in plain text."""
    found = _read("tasks_smollm2_2k")
    by_task: dict[str, dict[str, dict]] = {}
    for row in summary(found["tasks"]["results"]):
        by_task.setdefault(row["task"], {})[row["strategy"]] = row
    names = list(next(iter(by_task.values())))
    sparse = [name for name in names if name != "dense"]
    headings = [f"`{name}`" if name != "dense" else name for name in names]
    rows = [
        [
            "task",
            *(f"density of `{name}`" for name in sparse),
            *(f"exact: {heading}" for heading in headings),
            *(f"NLL: {heading}" for heading in headings),
            "beyond the model",
        ]
    ]
    for task, of in by_task.items():
        cells = [f"{of[name]['density']:.2f}" for name in sparse]
        cells += [f"{of[name][key]:.2f}" for key in ("exact", "nll") for name in names]
        rows.append([f"`{task}`", *cells, "yes" if of["dense"]["beyond_model"] else ""])
    in_plain = _read("tasks_smollm2_2k_plain")
    plain = [["dense NLL", "in the chat template", "in plain text"]]
    for row in summary(in_plain["tasks"]["results"]):
        if row["strategy"] == "dense":
            plain.append([f"`{row['task']}`", f"{by_task[row['task']]['dense']['nll']:.2f}", f"{row['nll']:.2f}"])
    return "\n\n".join([markdown(rows), caption(found), markdown(plain), caption(in_plain)])


def calibration(path: Path) -> str:
    """Whether calibrated strategies meet their target on other texts, at the same length and at another."""
    found = _read("calibration_smollm2_4k")
    rows = [["strategy", "its option: least, median, most", "calibrated", "one value for all heads", "held out"]]
    rows[0] += [", ".join(found["held_out"]), "CPU seconds: recall seen, values found"]
    laws = [["recall asked for", "by the law", "calibrated", "distance of the thresholds, natural logarithm"]]
    for row in found["rows"]:
        if "errors" in row:
            law, lengths = row["name"].removeprefix("law of "), ", ".join(f"{n:,}" for n in row["lengths"])
            told = f"b = {row['b']:.1f}, {row['cpu_seconds']:.0f} seconds of CPU time"
            for one in row["errors"]:
                by_law, at_length = (
                    f"{one[f'{kind}recall']:.3f} at {one[f'{kind}density']:.2f}" for kind in ("", "calibrated_")
                )
                laws.append([f"{one['target']}", by_law, at_length, f"{one['log_ratio']:.2f}"])
            at = f"{row['errors'][0]['tokens']:,}"
            continue
        values = ", ".join(f"{row['values'][key]:.3g}" for key in ("least", "median", "most"))
        at_target = [f"{row[key]['recall']:.3f} at {row[key]['density']:.2f}" for key in PARTS]
        by_text = ", ".join(f"{one['recall']:.3f}" for one in row["held_out_by_text"].values())
        seconds = row.get("cpu_seconds")
        spent = f"{seconds['observe']:.0f}, {seconds['bisect']:.1f}" if seconds else ""
        rows.append([f"`{row['name']}`", f"`{row['option']}` {values}", *at_target, by_text, spent])
    of_law = (
        f"The law of `{law}`, fitted on the first {lengths} tokens of the sample ({told}), and asked for {at} tokens "
        "of the held-out texts; beside it a calibration to those very texts:"
    )
    return "\n\n".join([markdown(rows), caption(found), of_law, markdown(laws)])


def batch(path: Path) -> str:
    """A batch of prompts of many lengths, padded and packed."""
    found = _read("prompts_batch_smollm2")
    rows = [["", "seconds", "prompt tokens a second", "against padded dense", "peak memory", "blocks computed"]]
    for name, run in found["runs"].items():
        rates = [f"{run['seconds']:.1f}", f"{run['tokens_per_second']:.0f}", f"{run['speedup']:.2f}x"]
        rows.append([name, *rates, f"{run['peak_gib']:.1f} GiB", f"{run['density']:.2f}"])
    return f"{markdown(rows)}\n\n{caption(found)}"


def chunks(path: Path) -> str:
    """A long prompt in one piece and in chunks."""
    parts = []
    for file in sorted(RESULTS.glob("prompts_chunks_*.json")):
        found = _read(file.stem)
        rows = [[f"`{found['strategy']}`", "seconds", "against dense", "peak memory", "blocks computed"]]
        for name, run in found["runs"].items():
            cells = [f"{run['seconds']:.1f}", f"{run['speedup']:.2f}x", f"{run['peak_gib']:.2f} GiB"]
            rows.append([name, *cells, f"{run['density']:.2f}"])
        tokens = {run["tokens"] for run in found["runs"].values()}.pop()
        parts.append(f"{markdown(rows)}\n\n{caption({**found, 'tokens': tokens})}")
    return "\n\n".join(parts)


def caption(report: Mapping[str, Any]) -> str:
    """What a report was measured on, and by which command."""
    text = report.get("text") or report.get("haystack")
    told = [f"{report['model']} on {text}" if text else str(report["model"])] if report.get("model") else []
    told += [f"{report['tokens']:,} tokens"] if report.get("tokens") else []
    told += [f"{report['layers']} layers"] if report.get("layers") else []
    told += [str(report[key]) for key in ("dtype", "device") if report.get(key)]
    threads = report.get("threads")
    told += [f"{threads} thread{'s' if threads > 1 else ''}"] if threads else []
    told += [f"torch {report['torch']}"] if report.get("torch") else []
    told += [str(report["date"])[:10]] if report.get("date") else []
    command = f"; `{report['command']}`" if report.get("command") else ""
    times = report.get("times")
    of_times = (
        f"; times: {times['date'][:10]}, {times['layers']} layers, {times['threads']} threads, medians of "
        f"{times['repeats']} runs in turn"
        if times
        else ""
    )
    return f"*{', '.join(told)}{command}{of_times}*"


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
