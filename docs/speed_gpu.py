"""The tables of what was measured on a GPU, from committed measurements."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from measured import markdown

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
RECALL = 0.95
STAGES = ("estimate", "select", "table", "kernel")
LOW_OVERHEAD = ("flex_prefill", "flash_prefill", "prism", "xattention")


def gpu(path: Path) -> str:
    """Goals, times of each prompt, and those of the kernel by its options: one section for each measurement."""
    reports = [json.loads(file.read_text()) for file in sorted(RESULTS.glob("gpu_*.json"))]
    return "\n\n".join(_section(report) for report in reports)


def _section(report: dict) -> str:
    best = ", ".join(f"{name.split()[0]} {rate:,.0f} {name.split()[1]}" for name, rate in report["ceilings"].items())
    made = [case for case in report["results"] if case["case"].endswith("tokens")]
    goals = [["goal", "found", ""], *(row for case in made for row in _goals(case))]
    caption = (
        f"*{report['device']}, {report['dtype']}, torch {report['torch']}, {report['date'][:10]}; at best: {best}; "
        f"`{report['command']}`*"
    )
    return "\n\n".join([markdown(goals), *map(_case, report["results"]), *_tried(report["results"]), caption])


def _goals(case: dict) -> Iterator[list[str]]:
    dense, tokens, rows = case["dense"], case["tokens"], case["strategies"]
    if tokens == 4096:
        by_default = [row["short"] for row in rows if "short" in row]
        told = f"{min(by_default) * 1e3:.2f} to {max(by_default) * 1e3:.2f} ms, SDPA {_ms(dense['default, in a row'])}"
        is_met = max(by_default) <= 1.05 * dense["default, in a row"]
        yield ["4,096 tokens by default, calls in a row: not slower than SDPA", told, _met(is_met)]
    if tokens not in (32768, 131072):
        return
    is_long = tokens == 131072
    sure = [row for row in rows if row["recall"] >= RECALL]
    fastest = min(sure, key=lambda row: row["graph"])
    ratios = {"the flash kernel of SDPA": dense["flash_attention"] / fastest["graph"]}
    if is_long:
        ratios["the best dense kernel"] = case["best dense"] / fastest["graph"]
    for (against, found), least in zip(ratios.items(), (20, 10) if is_long else (5,), strict=True):
        goal = f"{tokens:,} tokens, recall `{RECALL}` or more: `{least}x` as fast as {against}"
        yield [goal, f"`{fastest['name']}` {found:.2f}x, recall {fastest['recall']:.3f}", _met(found >= least)]
    most = 0.03 if is_long else 0.1
    shares = {
        row["name"]: sum(row[stage] for stage in STAGES[:-1]) / case["best dense"]
        for row in rows
        if row["name"] in LOW_OVERHEAD
    }
    replayed = {row["name"]: row["search graph"] / case["best dense"] for row in rows if "search graph" in row}
    goal = f"{tokens:,} tokens: estimate, select and table at most `{most}` of the best dense kernel"
    yield [goal, _told(shares), _met(max(shares.values(), default=0.0) <= most)]
    if replayed := {name: share for name, share in replayed.items() if name in LOW_OVERHEAD}:
        yield [f"{goal}, as a CUDA graph", _told(replayed), _met(max(replayed.values()) <= most)]
    if is_long:
        parts = {row["name"]: row["density"] * dense["dense flex"] / row["kernel"] for row in rows}
        worst = min(parts, key=lambda name: parts[name])
        told = f"{parts[worst]:.2f} (`{worst}`) to {max(parts.values()):.2f}"
        goal = f"{tokens:,} tokens: density x dense FlexAttention at least `0.85` of the kernel's time"
        yield [goal, told, _met(parts[worst] >= 0.85)]


def _told(shares: dict[str, float]) -> str:
    return ", ".join(f"`{name}` {share:.3f}" for name, share in shares.items())


def _case(case: dict) -> str:
    names = {"default": "SDPA", "flash_attention": "its flash kernel", "cudnn_attention": "that of cuDNN"}
    dense = ", ".join(f"{names.get(name, name)} {_ms(took)}" for name, took in case["dense"].items())
    rows = [
        ["strategy", "density", "recall", "oracle's density", *STAGES, "host", "call", "CUDA graph", "against SDPA"],
        *(
            [
                f"`{row['name']}`",
                *(f"{row[key]:.3f}" for key in ("density", "recall", "oracle density")),
                *(f"{row[key] * 1e3:.2f}" for key in (*STAGES, "host", "seconds", "graph")),
                f"{row['graph against best dense']:.2f}x",
            ]
            for row in case["strategies"]
        ),
    ]
    name = case["case"] if case["case"].endswith("tokens") else f"{case['model']}, {case['tokens']:,} tokens, captured"
    return f"### {name}\n\n{dense}.\n\n{markdown(rows)}"


def _tried(cases: list[dict]) -> Iterator[str]:
    """The kernel's times by its options and by the order of its rows."""
    tried = [case for case in cases if "kernel options" in case]
    if not tried:
        return
    rows = [["", *(f"{case['tokens']:,} tokens, ms" for case in tried)]]
    for key, named in (("kernel options", _options), ("order of rows", lambda row: f"rows {row['order']}")):
        for of_cases in zip(*(case[key] for case in tried), strict=True):
            cells = (f"{row['seconds'] * 1e3:.2f}" if "seconds" in row else "not there" for row in of_cases)
            rows.append([named(of_cases[0]), *cells])
    yield f"### Options of the kernel\n\n{markdown(rows)}"


def _options(row: dict) -> str:
    return ", ".join(f"`{name}={value}`" for name, value in row["options"].items()) or "those of the library"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms"


def _met(holds: bool) -> str:
    return "met" if holds else "missed"
