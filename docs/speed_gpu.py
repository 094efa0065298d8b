"""The tables of what was measured on a GPU, from committed measurements."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from measured import markdown

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
RECALL = 0.95
STAGES = ("estimate", "select", "table", "kernel")
BEST = "the best dense kernel"
SHARES = {"density": "density", "recall": "recall", "oracle density": "oracle's density"}
TIMES = {
    **{stage: stage for stage in STAGES},
    "host": "host",
    "seconds": "call",
    "search graph": "graph before the kernel",
    "graph": "CUDA graph",
    "CudaGraphs": "`CudaGraphs`",
}
LOW_OVERHEAD = ("flex_prefill", "flash_prefill", "prism", "xattention")


def gpu(path: Path) -> str:
    """Goals, times of each prompt, and those of the kernel by its options: one section for each measurement."""
    files = sorted(RESULTS.glob("gpu_*.json"))
    reports = sorted((json.loads(file.read_text()) for file in files), key=lambda report: report["date"])
    if not reports:
        return ""
    made = [case for report in reports for case in report["results"] if case["case"].endswith("tokens")]
    goals = [["goal", "found", ""], *_goals(made)]
    return "\n\n".join([markdown(goals), *map(_section, reports)])


def made_heads(path: Path) -> str:
    """The blocks that a recall takes on the made heads, counted without a GPU."""
    parts = []
    for report in (json.loads(file.read_text()) for file in sorted(RESULTS.glob("made_heads*.json"))):
        rows = [["strategy"]]
        for of_length in report["results"]:
            for row in of_length["rows"]:
                if [f"`{row['name']}`"] not in (known[:1] for known in rows):
                    rows.append([f"`{row['name']}`"])
            rows[0] += [f"{of_length['tokens']:,} tokens: {what}" for what in ("at", "density", "by default")]
            cells = {f"`{row['name']}`": _counted(row) for row in of_length["rows"]}
            for row in rows[1:]:
                row += cells[row[0]]
        parts.append(
            f"{markdown(rows)}\n\n*Recall {report['recall']}, {report['model']}, {report['device']}, torch "
            f"{report['torch']}, {report['date'][:10]}; `{report['command']}`*"
        )
    return "\n\n".join(parts)


def _counted(row: dict) -> list[str]:
    found, usual = row.get("at the recall"), row["as it stands"]
    default = f"{usual['density']:.3f}, recall {usual['recall']:.3f}"
    if found is None:
        return ["-", "-", default]
    told = ", ".join(f"`{name}={value:.3g}`" for name, value in found["options"].items())
    times = found["density"] / found["oracle density"]
    return [told, f"{found['density']:.3f}, `{times:.2f}x`", default]


def _section(report: dict) -> str:
    best = ", ".join(f"{name.split()[0]} {rate:,.0f} {name.split()[1]}" for name, rate in report["ceilings"].items())
    caption = (
        f"*{report['device']}, {report['dtype']}, torch {report['torch']}, {report['date'][:10]}; at best: {best}; "
        f"`{report['command']}`*"
    )
    return "\n\n".join([*map(_case, report["results"]), *_tried(report["results"]), caption])


def _goals(cases: list[dict]) -> Iterator[list[str]]:
    """Of all measurements together; each strategy is held against the dense kernels of its own run."""
    for tokens in sorted({case["tokens"] for case in cases}):
        same = [case for case in cases if case["tokens"] == tokens]
        if tokens == 4096:
            yield from _short_goals(same)
        if tokens in (32768, 131072):
            yield from _recall_goals(tokens, same)
            yield from _overhead_goals(tokens, same)
        if tokens == 131072:
            yield _kernel_goal(tokens, same)
        if tokens == 1 << 20:
            held = {row["name"]: row["peak_gib"] / case["tensors_gib"] for case in same for row in case["strategies"]}
            goal = f"{tokens:,} tokens, 32 heads: a layer runs, peak under `1.5` of queries, keys, values and output"
            yield [goal, _told(held), _met(max(held.values()) < 1.5)]


def _short_goals(cases: list[dict]) -> Iterator[list[str]]:
    for case in cases:
        by_default = [row["short"] for row in case["strategies"] if "short" in row]
        sdpa = case["dense"]["default, in a row"]
        middle = sorted(by_default)[len(by_default) // 2]
        told = f"{min(by_default) * 1e3:.2f} to {max(by_default) * 1e3:.2f} ms, median {_ms(middle)}, SDPA {_ms(sdpa)}"
        goal = "4,096 tokens by default, calls in a row: not slower than SDPA"
        yield [goal, told, _met(middle <= 1.05 * sdpa)]  # all run the same dense kernel


def _recall_goals(tokens: int, cases: list[dict]) -> Iterator[list[str]]:
    def ratio(found: tuple[dict, dict], kernel: str) -> float:
        case, row = found
        return (case["best dense"] if kernel == BEST else case["dense"]["flash_attention"]) / row["graph"]

    goals = {"the flash kernel of SDPA": 20, BEST: 10} if tokens == 131072 else {"the flash kernel of SDPA": 5}
    sure = [(case, row) for case in cases for row in case["strategies"] if row["recall"] >= RECALL]
    for kernel, least in goals.items():
        fastest = max(sure, key=lambda found: ratio(found, kernel))
        found, row = ratio(fastest, kernel), fastest[1]
        goal = f"{tokens:,} tokens, recall `{RECALL}` or more: `{least}x` as fast as {kernel}"
        yield [goal, f"`{row['name']}` `{found:.2f}x`, recall {row['recall']:.3f}", _met(found >= least)]


def _overhead_goals(tokens: int, cases: list[dict]) -> Iterator[list[str]]:
    most = 0.03 if tokens == 131072 else 0.1
    staged, replayed = {}, {}  # of later measurements where there are several
    for case in cases:
        for row in case["strategies"]:
            if row["name"] in LOW_OVERHEAD:
                staged[row["name"]] = sum(row[stage] for stage in STAGES[:-1]) / case["best dense"]
            if row["name"] in LOW_OVERHEAD and "search graph" in row:
                replayed[row["name"]] = row["search graph"] / case["best dense"]
    goal = f"{tokens:,} tokens: estimate, select and table at most `{most}` of the best dense kernel"
    yield [goal, _told(staged), _met(max(staged.values(), default=0.0) <= most)]
    if replayed:
        yield [f"{goal}, as a CUDA graph", _told(replayed), _met(max(replayed.values()) <= most)]


def _kernel_goal(tokens: int, cases: list[dict]) -> list[str]:
    parts = {}
    for case in cases:
        for row in case["strategies"]:
            kernel = row["graph"] - row["search graph"] if "search graph" in row else row["kernel"]
            parts[row["name"]] = row["density"] * case["dense"]["dense flex"] / kernel
    worst = min(parts, key=lambda name: parts[name])
    goal = f"{tokens:,} tokens: density x dense FlexAttention at least `0.85` of the kernel's time"
    return [goal, f"`{parts[worst]:.2f}` (`{worst}`) to `{max(parts.values()):.2f}`", _met(parts[worst] >= 0.85)]


def _told(shares: dict[str, float]) -> str:
    return ", ".join(f"`{name}` `{share:.3f}`" for name, share in shares.items())


def _case(case: dict) -> str:
    names = {"default": "SDPA", "flash_attention": "its flash kernel", "cudnn_attention": "that of cuDNN"}
    dense = ", ".join(f"{names.get(name, name)} {_ms(took)}" for name, took in case["dense"].items())
    columns = [name for name in (*SHARES, *TIMES) if any(name in row for row in case["strategies"])]
    rows = [["strategy", *({**SHARES, **TIMES}[name] for name in columns), "against SDPA"]]
    for row in case["strategies"]:
        cells = (_cell(row, name) for name in columns)
        ratio = row.get("graph against best dense", row["against best dense"])
        rows.append([f"`{row['name']}`", *cells, f"{ratio:.2f}x"])
    name = case["case"] if case["case"].endswith("tokens") else f"{case['model']}, {case['tokens']:,} tokens, captured"
    return f"### {name}\n\n{dense}.\n\n{markdown(rows)}"


def _cell(row: dict, name: str) -> str:
    if name not in row:
        return ""
    return f"{row[name]:.3f}" if name in SHARES else f"{row[name] * 1e3:.2f}"


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
