"""The pages that are written from the code, one for each strategy and wrapper, and the tables of what was measured.

    python docs/pages.py

writes the marked regions of README.md and of the hand-written pages again. The pages of methods, and the regions of the
site, are made by its build (hooks.py), and so are never out of date.
"""

from __future__ import annotations

import inspect
import json
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import measured
import speed
import speed_gpu
from claims import CLAIMS
from measured import caption, markdown

from sparse_prefill import Strategy, estimators, registry, selectors
from sparse_prefill.wrapper import Wrapper

DOCS = Path(__file__).parent
ROOT = DOCS.parent
KINDS = {"strategies": registry.strategies, "wrappers": registry.wrappers}
GUARDS = ("sink", "local", "last", "block_size", "min_length")  # fields of every strategy, last in each table

# Columns of the measured tables: key of the row, heading, format.
COLUMNS = (
    ("density", "density", "{:.2f}"),
    ("recall", "recall", "{:.3f}"),
    ("worst_recall", "worst 1 %", "{:.3f}"),
    ("oracle_gap", "oracle gap", "{:.2f}x"),
    ("overlap", "overlap", "{:.2f}"),
    ("output_error", "output error", "{:.3f}"),
    ("kl_last_token", "KL, nats", "{:.3f}"),
    ("needle_nll", "needle NLL", "{:.2f}"),
    ("needle_exact", "answers right", None),
    ("perplexity_ratio", "perplexity", "{:.3f}x"),
    ("perplexity_ratio_last_quarter", "last quarter", "{:.3f}x"),
    ("estimate_ms", "estimate, ms", "{:.1f}"),
    ("select_ms", "select, ms", "{:.1f}"),
    ("table_ms", "table, ms", "{:.1f}"),
    ("kernel_ms", "kernel, ms", "{:.1f}"),
    ("attention_ms", "attention, ms", "{:.1f}"),
    ("speedup_attention", "against SDPA", "{:.2f}x"),
)
# What the README shows.
HIGHLIGHTS = (
    "dense",
    "flex_prefill",
    "flex_prefill 0.95",
    "mean_slash",
    "mean_slash 0.005",
    "xattention",
    "xattention 0.97",
    "flash_prefill",
    "minference",
    "mean_pool",
    "delta(a_shape)",
    "a_shape",
)
SHORT = ("density", "recall", "kl_last_token", "needle_exact", "perplexity_ratio", "speedup_attention")

ROLE = re.compile(r":(?:attr|class|func|meth):`~?([\w.]+)`")
SECTION = re.compile(r"^(Args|Attributes|Raises|Returns|Examples?|Notes?|References):$", re.MULTILINE)


def ours(kind: registry.Registry) -> list[str]:
    """Names that this package registers, without those of installed packages."""
    return [name for name in kind.names() if kind.factory(name).__module__.startswith("sparse_prefill.")]


def page(name: str) -> str:
    """The page of one registered strategy or wrapper.

    Args:
        name (str): its name.

    Returns:
        str: Markdown, with the links of a page in ``strategies/`` or ``wrappers/``.

    Raises:
        ValueError: if there is no such name.
    """
    folder = folder_of(name)
    factory = KINDS[folder].factory(name)
    summary, idea, _ = docstring(factory)
    parts = [f"# {name}", paper(factory), prose(summary, name), prose(idea, name), picture(name)]
    parts += ["## Options", options(name, factory)]
    if measured := measured_rows(name):
        parts += ["## Measured", measured]
    if use := inspect.cleandoc(getattr(factory, "use", "")):
        parts += ["## When to use it", prose(use, name)]
    parts += ["## Chunks", chunks(factory)]
    if differs := inspect.cleandoc(getattr(factory, "differs", "")):
        parts += ["## How it differs from the released code", prose(differs, name)]
    parts += ["## Class", reference(factory)]
    return "\n\n".join(part for part in parts if part) + "\n"


def folder_of(name: str) -> str:
    """Where the page of a name lies: ``strategies`` or ``wrappers``."""
    for folder, kind in KINDS.items():
        if name in kind:
            return folder
    raise ValueError(f"There is no strategy and no wrapper {name!r}.")


# Docstrings


def docstring(factory: Callable) -> tuple[str, str, dict[str, str]]:
    """Summary, what follows it, and the sections by heading, of a Google-style docstring."""
    text = inspect.cleandoc(factory.__doc__ or "")
    if is_dataclass(factory) and text.startswith(f"{factory.__name__}("):  # made by dataclass() where there is none
        text = ""
    description, *sections = SECTION.split(text)
    summary, _, idea = description.strip().partition("\n\n")
    bodies = [textwrap.dedent(body.strip("\n")) for body in sections[1::2]]
    return summary, idea.strip(), dict(zip(sections[::2], bodies, strict=True))


def arguments(factory: Callable) -> dict[str, str]:
    """What the Args of a docstring say, by name."""
    found = {}
    for entry in re.split(r"^(?=\S)", docstring(factory)[2].get("Args", ""), flags=re.MULTILINE):
        match = re.match(r"([*\w]+) ?(?:\((?:[^()]|\([^()]*\))*\))?:\s*(.*)", entry, re.DOTALL)
        if match:
            found[match[1].lstrip("*")] = " ".join(match[2].split())
    return found


def prose(text: str, own: str = "") -> str:
    """Docstring text as Markdown: links for roles, and for the names of other strategies."""
    text = _markdown(text)
    known = {name: folder for folder, kind in KINDS.items() for name in ours(kind)}

    def page_of(match: re.Match) -> str:
        name = match[1]
        if name not in known or name in (own, *GUARDS):  # a guard is named more often than the strategy of its name
            return match[0]
        return f"[`{name}`](../{known[name]}/{name}.md)"

    return re.sub(r"(?<![\[`\w])`(\w+)`(?![\]`\w])", page_of, text)


def _markdown(text: str) -> str:
    return re.sub(r"(?<!`)``(?!`)", "`", ROLE.sub(link, text))  # fences of three stay


def link(role: re.Match) -> str:
    """A Sphinx role as a link of mkdocstrings, if it names something of ours."""
    path = role[1]
    name = path.rpartition(".")[2]
    return f"[`{name}`][{path}]" if path.startswith("sparse_prefill.") else f"`{name}`"


def paper(factory: Callable) -> str:
    text = getattr(factory, "paper", "")
    return re.sub(r"arXiv[: ](\d{4}\.\d{4,5})", r"[arXiv \1](https://arxiv.org/abs/\1)", text)


def picture(name: str) -> str:
    if not (DOCS / "assets" / "strategies" / f"{name}.png").exists():
        return ""
    return (
        f"![True attention of two heads, and the blocks that {name} keeps](../assets/strategies/{name}.png)\n\n"
        "*Two heads of SmolLM2-135M on 8,000 tokens at the defaults: where the attention truly is, and the blocks that "
        "are kept (grey is not computed). Drawn by `docs/pictures.py`.*"
    )


def chunks(factory: Callable) -> str:
    if getattr(factory, "chunk_invariant", False):
        return (
            "A prompt that is prefilled in chunks of whole blocks selects the same blocks as in one piece, but for the "
            "guard `last`, which counts in each chunk unless `Prompt(total_len=...)` says how long the prompt becomes."
        )
    if isinstance(factory, type) and issubclass(factory, Wrapper):
        return "At most as independent of chunks as what it wraps."
    return "A prompt that is prefilled in chunks may select other blocks than in one piece."


def reference(factory: Callable) -> str:
    """What mkdocstrings adds: the errors and, as far as it gets that right, the signature with its types."""
    wrapper = isinstance(factory, type) and issubclass(factory, Wrapper)  # whose guards aren't options
    lines = {
        "merge_init_into_class": "false" if wrapper else "true",
        "show_docstring_description": "false",
        "show_docstring_parameters": "false",
    }
    wanted = "".join(f"\n      {key}: {value}" for key, value in lines.items())
    return f"::: {factory.__module__}.{factory.__qualname__}\n    options:{wanted}"


# Options


def defaults(factory: Callable) -> dict[str, Any]:
    """Options with their defaults, MISSING where there is none; those of the method itself come first."""
    if is_dataclass(factory):
        own = [f for f in fields(factory) if f.init]
        found = {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in own}
    else:
        parameters = inspect.signature(factory).parameters.values()
        found = {p.name: MISSING if p.default is p.empty else p.default for p in parameters}
    order = [name for name in found if name not in GUARDS] + [name for name in GUARDS if name in found]
    return {name: found[name] for name in order}


def options(name: str, factory: Callable) -> str:
    """The table of all options: name, default, meaning."""
    own = arguments(factory)
    inherited: dict[str, str] = {}
    for base in reversed(inspect.getmro(factory)[1:]) if isinstance(factory, type) else [Strategy]:
        inherited |= arguments(base) if issubclass(base, Strategy) else {}
    rows = [["option", "default", "meaning"]]
    for option, default in defaults(factory).items():
        text, said, value = own.get(option, inherited.get(option, "")).rpartition("Default: ")
        value = value.rstrip(".")
        # The column beside it says the same; an inherited default may be another one.
        known = value.strip("`\"'") == str(default) or (option not in own and default is not None)
        meaning = (text if said and known else f"{text}{said}{value}").strip().rstrip(".")
        shown = "required" if default is MISSING else f"`{default!r}`"
        rows.append([f"`{option}`", *(cell.replace("|", "\\|") for cell in (shown, prose(meaning, name)))])
    # What a method adds about the guards stands behind "see Strategy".
    more = re.sub(r"^see :class:`[^`]+`[.;:,]?\s*", "", own.get("guards", ""))
    return markdown(rows) + (f"\n\nGuards: {prose(more[0].lower() + more[1:], name)}" if more else "")


# What was measured


def evaluations() -> list[dict]:
    """The committed measurements, that of most strategies first."""
    files = sorted((ROOT / "benchmarks/results").glob("evaluation_*.json"))
    return sorted((json.loads(path.read_text()) for path in files), key=lambda one: -len(one["rows"]))


def label(name: str, given: Mapping[str, Any]) -> str:
    """A strategy and the options that differ from its defaults: "delta(a_shape)", "oracle(share=0.9)"."""
    kind = next((kind for kind in KINDS.values() if name in kind), None)
    default = defaults(kind.factory(name)) if kind else {}
    items = []
    for key, value in given.items():
        if isinstance(value, Mapping) and "name" in value:  # a strategy: by its own label
            value = label(value["name"], {k: v for k, v in value.items() if k not in ("name", "block_size")})
        if key == "of":
            items.append(value)
        elif key == "last" and value == 0:
            continue  # no strategy is granted dense last rows, as the legend says
        elif isinstance(value, str) and "/" in value:
            continue  # a file of the machine that measured
        elif json.dumps(default.get(key), default=str) != json.dumps(value, default=str):  # lists were tuples
            items.append(f"{key}={value}")
    return name + (f"({', '.join(items)})" if items else "")


def strategy_of(row: dict) -> str:
    """The registered name: rows of wrappers hold a label such as "delta(a_shape)"."""
    return row["strategy"].partition("(")[0]


def table(evaluation: dict, rows: Iterable[dict] | None = None, columns: Iterable[str] | None = None) -> str:
    """Measured rows as a Markdown table, with what they were measured on below it.

    Args:
        evaluation (dict): content of a ``benchmarks/results/evaluation_*.json``.
        rows (Iterable[dict] | None): some of its rows. Default: all.
        columns (Iterable[str] | None): some keys of a row. Default: all. Keys that no row has are left out.
    """
    rows = list(evaluation.get("rows", []) if rows is None else rows)
    wanted = [c for c in COLUMNS if columns is None or c[0] in columns]
    shown = [c for c in wanted if any(row.get(c[0]) is not None for row in rows)]
    lines = [["strategy", *(heading for _, heading, _ in shown)]]
    for row in rows:
        name = label(strategy_of(row), row.get("options") or {})
        lines.append([f"`{name}`", *(_cell(row, key, form) for key, _, form in shown)])
    return f"{markdown(lines)}\n\n{caption(evaluation)}"


def _cell(row: dict, key: str, form: str | None) -> str:
    value = row.get(key)
    if value is None:
        return ""
    if form is not None:
        return form.format(value)
    count = row.get("needles", 1)
    return f"{round(value * count)} of {count}"


def measured_rows(name: str) -> str:
    """The rows of one strategy, beside those of ``dense`` and, for a wrapper, of what it wraps."""
    tables = []
    for evaluation in evaluations():
        rows = evaluation.get("rows", [])
        own = [row for row in rows if strategy_of(row) == name]
        wrapped = [row["options"]["of"] for row in own if (row.get("options") or {}).get("of")]
        beside = {"dense", *(one if isinstance(one, str) else one["name"] for one in wrapped)} - {name}
        if own:
            tables.append(table(evaluation, [row for row in rows if strategy_of(row) in beside] + own))
    return "\n\n".join([*tables, "[Results](../results.md) says what the columns mean."]) if tables else ""


LEGEND = """
Facts are hidden in the first half of each text and asked for at its end, with the answers inside the prefill: they find
the facts through the kept blocks or not at all. No strategy is granted dense last rows.

* *density*: share of the visible blocks that is computed, over all layers, heads and texts
* *recall*: share of the true attention that the kept blocks hold, over some query blocks of each head
* *worst 1 %*: mean recall of the worst of all these query blocks
* *oracle gap*: density over the least at which any table of blocks holds as much, in the same query blocks
* *overlap*: share of the kept blocks that the best table of the same size keeps, too
* *output error*: norm of the difference to dense attention, over the norm of dense attention, layer by layer
* *KL*: Kullback-Leibler divergence from the dense model's distribution of the answers' first tokens
* *needle NLL*: negative log-likelihood of the answers, per token
* *answers right*: answers that the model would have given, token by token
* *perplexity*: that of the second half of the texts, over the dense model's; *last quarter*: likewise
* *estimate*, *select*, *table*, *kernel*, *attention*: milliseconds a layer; *against SDPA*: how many times faster than
  dense attention
""".strip()


def evaluation_section(path: Path) -> str:
    """All that was measured for the results, and some rows of the first model for other pages."""
    found = evaluations()
    if path.name == "results.md":
        return "\n\n".join(["## All strategies", LEGEND, *map(table, found)])
    rows = [row for name in HIGHLIGHTS for row in found[0]["rows"] if row["name"] == name]
    return table(found[0], rows, SHORT)


# Marked regions


def crossovers(path: Path) -> str:
    """How much faster each strategy was at each length, and from which on it is the default."""
    report = json.loads((ROOT / "benchmarks/results/crossover_cpu_smollm2.json").read_text())
    rows = [["strategy", *(f"{tokens:,} tokens" for tokens in report["lengths"]), "`min_length`"]]
    for name, row in report["strategies"].items():
        rows.append([f"`{name}`", *(f"{x:.2f}x" for x in row["speedup"]), f"{least(name):,}"])
    return f"{markdown(rows)}\n\n{caption(report)}"


def frontiers(path: Path) -> str:
    """What each strategy computes for some recall on each model and length, with the pictures."""
    files = sorted((ROOT / "benchmarks/results").glob("frontier_*.json"))
    reports = {file.stem: json.loads(file.read_text()) for file in files}
    by_length = sorted(reports.items(), key=lambda item: (item[1]["model"], item[1]["tokens"]))
    return frontier_tables(dict(by_length)) if reports else ""


def frontier_tables(reports: Mapping[str, dict]) -> str:
    """A table for each recall, pictures, and what was measured; reports by name of their files."""
    titles = {stem: f"{report['model']}, {report['tokens']:,} tokens" for stem, report in reports.items()}
    own = {
        stem: {row["name"]: {one["target"]: one for one in row["needed"]} for row in report["rows"] if "needed" in row}
        for stem, report in reports.items()
    }
    names = dict.fromkeys(name for needs in own.values() for name in needs)
    parts = []
    for target in sorted({target for needs in own.values() for need in needs.values() for target in need}):
        limits = [dict(zip(r["oracle"]["recall"], r["oracle"]["density"], strict=True)) for r in reports.values()]
        rows = [["strategy", *titles.values()], ["the least possible", *(f"{limit[target]:.2f}" for limit in limits)]]
        for name in names:
            cells = (_need(needs[name].get(target)) if name in needs else "" for needs in own.values())
            rows.append([f"`{name}`", *cells])
        parts += [f"Density and oracle gap for a recall of {target}:", markdown(rows)]
    for stem, title in titles.items():
        picture = f"assets/results/{stem}_frontier.png"
        if (DOCS / picture).exists():
            parts.append(f"![Recall over density of all strategies at many settings: {title}]({picture})")
    return "\n\n".join([*parts, *map(caption, reports.values())])


def _need(found: dict | None) -> str:
    if found is None:
        return "-"
    more = "≤ " if found["recall"] > found["target"] else ""
    return f"{more}{found['density']:.2f}, {found['oracle_gap']:.2f}x"


def least(name: str) -> int:
    """Tokens from which on a strategy runs sparse by default."""
    return registry.strategies.factory(name).crossover


def needles(path: Path) -> str:
    """How many needles each strategy finds inside the prefill, and how likely the right answers are, by length."""
    found = sorted((ROOT / "benchmarks/results").glob("needles_*.json"))
    return "\n\n".join(_needle_table(json.loads(file.read_text())) for file in found)


def _needle_table(report: dict) -> str:
    cells: dict[str, dict[int, list[dict]]] = {}
    for one in report["tasks"]["results"]:
        cells.setdefault(one["strategy"], {}).setdefault(one["length"], []).append(one)
    lengths = sorted({length for of in cells.values() for length in of})
    rows = [["strategy", *(f"{n:,} tokens: {what}" for n in lengths for what in ("density", "found", "NLL"))]]
    for name, of in cells.items():
        row = [f"`{name}`"]
        for length in lengths:
            several = of[length]
            density, nll = (sum(one[key] for one in several) / len(several) for key in ("density", "nll"))
            row += [f"{density:.2f}", f"{sum(one['exact'] for one in several):.0f} of {len(several)}", f"{nll:.2f}"]
        rows.append(row)
    return f"{markdown(rows)}\n\n{caption(report)}"


def claims(path: Path) -> str:
    """What papers say beside the row of the method on SmolLM2."""
    found = json.loads((ROOT / "benchmarks/results/evaluation_smollm2_8k.json").read_text())
    rows = [["method", "its paper says", "here, at 8,000 tokens"]]
    for name, (said, paper) in CLAIMS.items():
        row = next(row for row in found["rows"] if strategy_of(row) == name)
        here = [f"density {row['density']:.2f}, recall {row['recall']:.3f}"]
        here += [f"attention {row['speedup_attention']:.2f}x as fast"] if row.get("speedup_attention") else []
        said = f"{said} ([arXiv {paper}](https://arxiv.org/abs/{paper}))"
        rows.append([f"`{label(name, row.get('options') or {})}`", said, ", ".join(here)])
    return markdown(rows)


def list_of(folder: str, path: Path) -> str:
    """The names of one kind with their one-line summaries, for a page or for the README."""
    rows = [["name", "what it does"]]
    for name in ours(KINDS[folder]):
        factory = KINDS[folder].factory(name)
        summary = " ".join(docstring(factory)[0].split())
        summary = re.sub(r"\[(`\w+`)\]\[[\w.]+\]", r"\1", _markdown(summary))  # the README knows no such links
        # The README has no site around it, so its links lead to the sources.
        module = factory.__module__.replace(".", "/")
        where = f"src/{module}.py" if path.name == "README.md" else f"{folder}/{name}.md"
        rows.append([f"[`{name}`]({where})", summary.replace("|", "\\|")])
    return markdown(rows)


def parts_of(package: ModuleType) -> str:
    """What a package of parts exports, for mkdocstrings."""
    return "\n".join(f"::: {package.__name__}.{name}" for name in package.__all__)


def traits() -> str:
    """What each strategy's class says of chunks."""
    rows = [["strategy", "chunks of whole blocks select as the whole prompt"]]
    for name in ours(registry.strategies):
        invariant = "yes" if registry.strategies.factory(name).chunk_invariant else ""
        rows.append([f"[`{name}`](strategies/{name}.md)", invariant])
    return markdown(rows)


REGIONS: dict[str, Callable[[Path], str]] = {
    "evaluation": evaluation_section,
    "crossovers": crossovers,
    "frontiers": frontiers,
    "profiles": speed.profiles,
    "goals": speed.goals,
    "growth": speed.growth,
    "long": speed.long_prompts,
    "peers": speed.peers,
    "gpu": speed_gpu.gpu,
    "made_heads": speed_gpu.made_heads,
    "needles": needles,
    "claims": claims,
    "demo": measured.demo,
    "demo_long": measured.demo_long,
    "tasks": measured.tasks,
    "calibration": measured.calibration,
    "batch": measured.batch,
    "chunks": measured.chunks,
    "strategies": lambda path: list_of("strategies", path),
    "wrappers": lambda path: list_of("wrappers", path),
    "estimators": lambda path: parts_of(estimators),
    "selectors": lambda path: parts_of(selectors),
    "traits": lambda path: traits(),
}
REGION = re.compile(r"(<!-- (\w+):begin -->\n).*?(<!-- \2:end -->)", re.DOTALL)


def refreshed(text: str, path: Path) -> str:
    """The text of a file with its marked regions written anew."""

    def filled(match: re.Match) -> str:
        if match[2] not in REGIONS:
            raise ValueError(f"{path.name} marks a region {match[2]!r}; there are: {', '.join(REGIONS)}.")
        content = REGIONS[match[2]](path)
        return match[1] + (f"\n{content}\n\n" if content else "") + match[3]

    return REGION.sub(filled, text)


def pages_with_regions() -> list[Path]:
    return [path for path in (ROOT / "README.md", *sorted(DOCS.glob("*.md"))) if REGION.search(path.read_text())]


if __name__ == "__main__":
    for path in pages_with_regions():
        path.write_text(refreshed(path.read_text(), path))
        print(f"{path.relative_to(ROOT)} is up to date")
