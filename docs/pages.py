"""Pages made from the code, one for each strategy and wrapper, and the marked regions of other pages.

    python docs/pages.py

writes the marked regions and the numbers of README.md and of the hand-written pages again. The site's build (hooks.py)
makes the pages of methods and does the same for the site.
"""

from __future__ import annotations

import inspect
import json
import re
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import tables
from tables import markdown

from sparse_prefill import Strategy, estimators, registry, selectors
from sparse_prefill.wrappers.base import Wrapper

DOCS = Path(__file__).parent
ROOT = DOCS.parent
KINDS = {"strategies": registry.strategies, "wrappers": registry.wrappers}
GUARDS = (
    "sink",
    "local",
    "last",
    "block_size",
    "min_length",
    "max_decode_queries",
)  # fields of every strategy, last in each table

ROLE = re.compile(r":(?:attr|class|func|meth):`~?([\w.]+)`")
SECTION = re.compile(r"^(Args|Attributes|Raises|Returns|Examples?|Notes?|References):$", re.MULTILINE)


def ours(kind: registry.Registry) -> list[str]:
    """Names that this package registers itself."""
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
    parts = [
        f"# {name}",
        paper(factory),
        released_code(factory),
        prose(summary, name),
        prose(idea, name),
        picture(name),
    ]
    parts += ["## Options", options(name, factory)]
    if rows := measured_rows(name):
        parts += ["## Measured", rows]
    if use := inspect.cleandoc(getattr(factory, "use", "")):
        parts += ["## When to use it", prose(use, name)]
    parts += ["## Chunks", chunks(factory)]
    if differs := inspect.cleandoc(getattr(factory, "differs", "")):
        parts += ["## How it differs from the released code", prose(differs, name)]
    parts += ["## Class", reference(factory)]
    return "\n\n".join(part for part in parts if part) + "\n"


def folder_of(name: str) -> str:
    """Folder of a name's page: ``strategies`` or ``wrappers``."""
    for folder, kind in KINDS.items():
        if name in kind:
            return folder
    raise ValueError(f"There is no strategy and no wrapper {name!r}.")


# Docstrings


def docstring(factory: Callable) -> tuple[str, str, dict[str, str]]:
    """Summary, further description, and sections by heading of a Google-style docstring."""
    text = inspect.cleandoc(factory.__doc__ or "")
    if is_dataclass(factory) and text.startswith(f"{factory.__name__}("):  # dataclass() makes one if there is none
        text = ""
    description, *sections = SECTION.split(text)
    summary, _, idea = description.strip().partition("\n\n")
    bodies = [textwrap.dedent(body.strip("\n")) for body in sections[1::2]]
    return summary, idea.strip(), dict(zip(sections[::2], bodies, strict=True))


def arguments(factory: Callable) -> dict[str, str]:
    """Texts under Args of a docstring, by name."""
    found = {}
    for entry in re.split(r"^(?=\S)", docstring(factory)[2].get("Args", ""), flags=re.MULTILINE):
        match = re.match(r"([*\w]+) ?(?:\((?:[^()]|\([^()]*\))*\))?:\s*(.*)", entry, re.DOTALL)
        if match:
            found[match[1].lstrip("*")] = " ".join(match[2].split())
    return found


def prose(text: str, own: str = "") -> str:
    """Docstring text as Markdown, with links for roles and for names of other strategies."""
    text = _markdown(text)
    known = {name: folder for folder, kind in KINDS.items() for name in ours(kind)}

    def page_of(match: re.Match) -> str:
        name = match[1]
        if name not in known or name in (own, *GUARDS):  # a guard has the name of a strategy
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


def released_code(factory: Callable) -> str:
    """The released code that a method was compared with, with links to it; empty if there is none."""
    links = []
    for entry in filter(None, getattr(factory, "reference", "").split("; ")):
        where, _, what = entry.partition(": ")
        repository, _, commit = where.partition("@")
        links.append(f"[{where}](https://github.com/{repository}{f'/tree/{commit}' if commit else ''}), {what}")
    return f"Released code: {'; '.join(links)}" if links else ""


def picture(name: str) -> str:
    if not (DOCS / "assets" / "strategies" / f"{name}.png").exists():
        return ""
    return (
        f"![True attention of two heads, and the blocks that {name} keeps](../assets/strategies/{name}.png)\n\n"
        "*Two heads of SmolLM2-135M on 8,000 tokens at the defaults: true attention, and the kept blocks (grey: not "
        "computed). Drawn by `docs/pictures.py`.*"
    )


def chunks(factory: Callable) -> str:
    if getattr(factory, "chunk_invariant", False):
        return (
            "A prompt that is prefilled in chunks of whole blocks selects the same blocks as in one piece. The guard "
            "`last` counts in each chunk, unless `Prompt(total_len=...)` gives the length of the whole prompt."
        )
    if isinstance(factory, type) and issubclass(factory, Wrapper):
        return "Depends on chunks at least as much as the wrapped strategy."
    return "A prompt that is prefilled in chunks may select other blocks than in one piece."


def reference(factory: Callable) -> str:
    """Directive of mkdocstrings: the errors and, if it gets that right, the signature with its types."""
    wrapper = isinstance(factory, type) and issubclass(factory, Wrapper)  # its guards aren't options
    lines = {
        "merge_init_into_class": "false" if wrapper else "true",
        "show_docstring_description": "false",
        "show_docstring_parameters": "false",
    }
    wanted = "".join(f"\n      {key}: {value}" for key, value in lines.items())
    return f"::: {factory.__module__}.{factory.__qualname__}\n    options:{wanted}"


# Options


def defaults(factory: Callable) -> dict[str, Any]:
    """Options with their defaults, MISSING if there is none; the method's own options come first."""
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
        # The column beside it shows the same default, unless the class changes an inherited one.
        known = value.strip("`\"'") == str(default) or (option not in own and default is not None)
        meaning = (text if said and known else f"{text}{said}{value}").strip().rstrip(".")
        shown = "required" if default is MISSING else f"`{default!r}`"
        rows.append([f"`{option}`", *(cell.replace("|", "\\|") for cell in (shown, prose(meaning, name)))])
    # A method's remarks about the guards follow "see Strategy".
    more = re.sub(r"^see :class:`[^`]+`[.;:,]?\s*", "", own.get("guards", ""))
    return markdown(rows) + (f"\n\nGuards: {prose(more[0].lower() + more[1:], name)}" if more else "")


# Measurements


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
            continue  # as in all measurements: no dense last rows
        elif isinstance(value, str) and "/" in value:
            continue  # a file of the machine that measured
        elif json.dumps(default.get(key), default=str) != json.dumps(value, default=str):  # lists were tuples
            items.append(f"{key}={value}")
    return name + (f"({', '.join(items)})" if items else "")


def strategy_of(row: dict) -> str:
    """The registered name of a row; rows of wrappers hold a label such as "delta(a_shape)"."""
    return row["strategy"].partition("(")[0]


def measured_rows(name: str) -> str:
    """The rows of one strategy, beside ``dense`` and, for a wrapper, the wrapped strategy."""
    spec, parts = tables.TABLES["measured"], []
    for file in sorted(tables.RESULTS.glob(f"{spec['files']}.json")):
        own = [row for row in json.loads(file.read_text()).get("rows", []) if strategy_of(row) == name]
        wrapped = [row["options"]["of"] for row in own if (row.get("options") or {}).get("of")]
        beside = {"dense", *(one if isinstance(one, str) else one["name"] for one in wrapped), name}
        if own:
            parts.append(measured_table(spec | {"files": file.stem}, lambda row, b=beside: strategy_of(row) in b))
    return "\n\n".join([*parts, "[Results](../results.md) explains the columns."]) if parts else ""


def measured_table(spec: Mapping[str, Any], keep: Callable[[dict], bool] = lambda row: True) -> str:
    """A declared table, with strategies labelled by their options other than defaults."""
    return tables.table(spec, keep, lambda row: label(strategy_of(row), row["options"]) if "options" in row else "")


# Marked regions


def list_of(folder: str, path: Path) -> str:
    """The names of one kind with their one-line summaries, for a page or for the README."""
    rows = [["name", "what it does"]]
    for name in ours(KINDS[folder]):
        factory = KINDS[folder].factory(name)
        summary = " ".join(docstring(factory)[0].split())
        summary = re.sub(r"\[(`\w+`)\]\[[\w.]+\]", r"\1", _markdown(summary))  # not links in the README
        # In the README, links lead to the sources.
        module = factory.__module__.replace(".", "/")
        where = f"src/{module}.py" if path.name == "README.md" else f"{folder}/{name}.md"
        rows.append([f"[`{name}`]({where})", summary.replace("|", "\\|")])
    return markdown(rows)


def parts_of(package: ModuleType) -> str:
    """Exports of a package of parts, as directives of mkdocstrings."""
    return "\n".join(f"::: {package.__name__}.{name}" for name in package.__all__)


def traits() -> str:
    """Table of the strategies that select in chunks as in one piece."""
    rows = [["strategy", "chunks of whole blocks select as the whole prompt"]]
    for name in ours(registry.strategies):
        invariant = "yes" if registry.strategies.factory(name).chunk_invariant else ""
        rows.append([f"[`{name}`](strategies/{name}.md)", invariant])
    return markdown(rows)


def declared(name: str) -> str:
    """The tables of an entry of tables.yaml."""
    specs = tables.TABLES[name]
    return "\n\n".join(map(measured_table, specs if isinstance(specs, list) else [specs]))


REGIONS: dict[str, Callable[[Path], str]] = {
    **{name: lambda path, name=name: declared(name) for name in tables.TABLES},
    "strategies": lambda path: list_of("strategies", path),
    "wrappers": lambda path: list_of("wrappers", path),
    "estimators": lambda path: parts_of(estimators),
    "selectors": lambda path: parts_of(selectors),
    "traits": lambda path: traits(),
}
REGION = re.compile(r"(<!-- (\w+):begin -->\n).*?(<!-- \2:end -->)", re.DOTALL)


def refreshed(text: str, path: Path) -> str:
    """The text of a file, with its marked regions and its numbers written again."""

    def filled(match: re.Match) -> str:
        if match[2] not in REGIONS:
            raise ValueError(f"{path.name} marks a region {match[2]!r}; there are: {', '.join(REGIONS)}.")
        content = REGIONS[match[2]](path)
        return match[1] + (f"\n{content}\n\n" if content else "") + match[3]

    return tables.with_numbers(REGION.sub(filled, text))


def written_pages() -> list[Path]:
    """README.md and the pages that are written by hand."""
    return [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]


if __name__ == "__main__":
    for path in written_pages():
        former = path.read_text()
        current = refreshed(former, path)
        path.write_text(current)
        print(f"{path.relative_to(ROOT)}: {'unchanged' if current == former else 'written'}")
