"""The tables of the pages about speed, from committed measurements."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path

from measured import markdown

from sparse_prefill.evaluation.profiling import RECALL, tables

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
sys.path.insert(0, str(ROOT / "benchmarks"))
from peers import table as peers_table  # noqa: E402

LOW_OVERHEAD = ("flex_prefill", "flash_prefill", "prism", "xattention")
DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
LONG = 12_000  # tokens from which on the goals are those of long prompts


def profiles(path: Path) -> str:
    """Where time goes, and what the stages have to do: one section for each measurement."""
    return "\n\n".join(_profile(report) for report in _reports("profile_*.json"))


def goals(path: Path) -> str:
    """What attention is held to on a CPU, and what was measured."""
    rows = [["goal", "measured on", "found", ""]]
    for report in _reports("profile_*.json"):
        case = report["results"][-1]  # the longest
        rows += [[goal, _name(report, case), *found] for goal, *found in _goals(case)]
        if case["tokens"] >= LONG:
            goal, *found = _growth(report["results"][0], case, _swept(report, case))
            rows.append([goal, _name(report, case), *found])
    for report in _reports("prompts_chunks_*.json"):
        run = report["runs"]["sparse in one piece"]
        on = f"{_model(report)}, {run['tokens']:,} tokens, {report['dtype']}"
        told = f"`{report['strategy']}` {run['speedup']:.2f}x, density {run['density']:.2f}"
        rows.append(["a whole prefill at least `1.7x` as fast, of any recall", on, told, _met(run["speedup"] >= 1.7)])
    for report in _reports("demo_*_16k.json"):
        on = f"{_model(report)}, {report['tokens']:,} tokens, {report['dtype']}, all layers"
        strategy, times = report["strategy"].partition("(")[0], report["speedup"]
        kept = f"density {report['density']:.2f}, recall {report['recall']:.3f}"
        for what, least in (("attention", 3), ("prefill", 1.7)):
            name = "attention" if what == "attention" else "a whole prefill"
            goal = f"{name} at a recall of `{RECALL}` or more at least `{least}x` as fast"
            met = report["recall"] >= RECALL and times[what] >= least
            rows.append([goal, on, f"`{strategy}` {times[what]:.2f}x, {kept}", _met(met)])
    for report in _reports("crossover_*.json"):
        early = [name for name, row in report["strategies"].items() if (row["crossover"] or 2049) <= 2048]
        told = f"{len(early)} of {len(report['strategies'])} strategies, among them `{'`, `'.join(early[:4])}`"
        rows.append(["faster than SDPA from 2,048 tokens on", _model(report), told, _met(bool(early))])
    return markdown(rows) if len(rows) > 1 else ""


def growth(path: Path) -> str:
    """How times at fixed recalls grow with the length."""
    parts = []
    for report in _reports("growth_*.json"):
        short, long = report["results"][0], report["results"][-1]
        methods = list(report["growth"][0]["powers"])
        tokens = [f"{case['tokens']:,} tokens, ms" for case in (short, long)]
        rows = [["recall", *tokens, "power", "an oracle's blocks", *(f"`{method}`" for method in methods)]]
        for row in report["growth"]:
            times = (f"{s * 1e3:.1f} (`{name}`)" for s, name in zip(row["seconds"], row["fastest"], strict=True))
            powers = (row["power"], row["oracle power"], *row["powers"].values())
            told = ("-" if power is None else f"{power:.2f}" for power in powers)
            rows.append([f"`{row['recall']}`", *times, *told])
        parts.append(f"{markdown(rows)}\n\n{_caption(report, long)}")
    return "\n\n".join(parts)


def long_prompts(path: Path) -> str:
    """What one layer of a very long prompt takes."""
    parts = []
    for report in _reports("long_*.json"):
        heads, kv_heads, dim = report["heads"]
        rows = [
            ["strategy", "density", "parts", "lists, GiB", "tensors, GiB", "peak, GiB", "peak / tensors", "seconds"]
        ]
        for row in report["rows"]:
            sizes = (row["lists_gib"], row["tensors_gib"], row["peak_gib"], row["peak_gib"] / row["tensors_gib"])
            told = (*(f"{size:.2f}" for size in sizes), f"{row['seconds']:.0f}")
            rows.append([f"`{row['name']}`", f"{row['density']:.4f}", str(row["parts"]), *told])
        parts.append(
            f"{markdown(rows)}\n\n*{report['tokens']:,} tokens, {heads} query heads and {kv_heads} key heads of {dim}, "
            f"{report['dtype']}, {report['text']}, {report['device']}, {report['threads']} threads, torch "
            f"{report['torch']}, {report['date'][:10]}; `{report['command']}`*"
        )
    return "\n\n".join(parts)


def peers(path: Path) -> str:
    """Times of other implementations, and which weren't installed."""
    parts = []
    for report in _reports("peers_*.json"):
        for case in report["results"]:
            missing = report["not installed"]
            told = f"\n\nNot installed there: {', '.join(missing)}." if missing else ""
            parts.append(f"{peers_table(case)}{told}\n\n{_caption(report, case)}")
    return "\n\n".join(parts)


def _goals(case: dict) -> Iterator[list[str]]:
    rows, is_long = case["strategies"], case["tokens"] >= LONG
    key = "kernel / (density x dense flex)"
    ratios = {row["name"]: row[key] for row in rows}
    worst = max(ratios, key=lambda name: ratios[name])
    told = f"{min(ratios.values()):.2f} to {ratios[worst]:.2f} (`{worst}`)"
    yield ["kernel at most `1.15` x its density's share of dense FlexAttention", told, _met(ratios[worst] <= 1.15)]
    most = 0.05 if is_long else 0.08
    overheads = {row["name"]: row["overhead / sdpa"] for row in rows if row["name"] in LOW_OVERHEAD}
    if overheads:
        told = ", ".join(f"`{name}` {value:.3f}" for name, value in overheads.items())
        goal = f"estimate, select and table at most `{most}` of dense SDPA"
        yield [goal, told, _met(max(overheads.values()) <= most)]
    least = 3 if is_long else 2.5
    goal = f"the best strategy of recall `{RECALL}` or more at least `{least}x` as fast as SDPA"
    if best := _fastest(case):
        told = (
            f"`{best['name']}` {best['speed-up over sdpa']:.2f}x, recall {best['recall']:.3f}; its limit is "
            f"{best['limit over sdpa']:.2f}x"
        )
        yield [goal, told, _met(best["speed-up over sdpa"] >= least)]
    else:
        yield [goal, "none of that recall", "missed"]


def _swept(report: dict, case: dict) -> dict | None:
    """Growth at the recall of the goals between settings of methods, where that was measured on the same tensors."""
    for other in _reports("growth_*.json"):
        if _name(other, other["results"][-1]) == _name(report, case):
            return next((row for row in other["growth"] if row["recall"] == RECALL and row["power"]), None)
    return None


def _growth(short: dict, long: dict, swept: dict | None) -> list[str]:
    """How the time of the fastest strategy of a recall grows from one length to another.

    Of settings between which the recall lies where many were measured, else of those that have it or a higher one.
    """
    goal = f"at a recall of `{RECALL}`, time grows from {short['tokens']:,} tokens with a power of at most `1.4`"
    if swept:
        first, last = swept["fastest"]
        told = f"{swept['power']:.2f}, from `{first}` to `{last}`; that of an oracle's blocks alone is"
        return [goal, f"{told} {swept['oracle power']:.2f}", _met(swept["power"] <= 1.4)]
    begin, end = _fastest(short), _fastest(long)
    if begin is None or end is None:
        return [goal, "none of that recall", "missed"]

    def power(at_begin: float, at_end: float) -> float:
        return math.log(at_end / at_begin) / math.log(long["tokens"] / short["tokens"])

    found = power(begin["total"], end["total"])
    limit = power(*(case["dense flex"] * case[f"oracle density at {RECALL}"] for case in (short, long)))
    told = f"{found:.2f}, from `{begin['name']}` to `{end['name']}`; that of an oracle's blocks alone is {limit:.2f}"
    return [goal, told, _met(found <= 1.4)]


def _fastest(case: dict) -> dict | None:
    """The row of the fastest strategy that keeps enough of the attention."""
    sure = [row for row in case["strategies"] if row["recall"] >= RECALL]
    return min(sure, key=lambda row: row["total"]) if sure else None


def _profile(report: dict) -> str:
    best = ", ".join(f"{name.split()[0]} {rate:.1f} {name.split()[1]}" for name, rate in report["ceilings"].items())
    parts = []
    for case in report["results"]:
        dense = ", ".join(
            f"{told} {case[key] * 1e3:.1f} ms a layer, {case[f'{key} gflop/s']:.1f} GFLOP/s"
            for told, key in (("SDPA", "sdpa"), ("dense FlexAttention", "dense flex"))
        )
        times, work = tables(case).split("\n\n")
        work = f'<details markdown="1"><summary>What the stages do</summary>\n\n{work}\n\n</details>'
        parts += [f"### {_name(report, case)}", f"{dense}. At best: {best}.", times, work, _caption(report, case)]
    return "\n\n".join(parts)


def _name(report: dict, case: dict) -> str:
    """The model, or what there is in place of one, the length and the dtype."""
    name = _model(report) or case["case"]
    return f"{name}, {case['tokens']:,} tokens, {DTYPES.get(case['dtype'], case['dtype'])}"


def _model(report: dict) -> str:
    return (report["model"] or "").removesuffix("-Instruct")


def _caption(report: dict, case: dict) -> str:
    on = f" of {report['text']}" if report.get("text") else ""
    return (
        f"*{_name(report, case)}{on}, mean of {case['layers']} layers, {report['device']}, {report['threads']} "
        f"thread{'s' if report['threads'] > 1 else ''}, torch {report['torch']}, {report['date'][:10]}; "
        f"`{report['command']}`*"
    )


def _met(holds: bool) -> str:
    return "met" if holds else "missed"


def _reports(pattern: str) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob(pattern))]
