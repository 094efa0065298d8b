"""The documentation: examples print the shown output, and all strategies and options are described."""

from __future__ import annotations

import io
import json
import pkgutil
import re
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor

import sparse_prefill as sp
from sparse_prefill import registry
from sparse_prefill.tasks.prompt_template import registry as tasks

DOCS = Path(__file__).parents[2] / "docs"
sys.path.insert(0, str(DOCS))
import pages  # noqa: E402
import pictures  # noqa: E402

# A Python block, and the text block right after it if there is one.
EXAMPLE = re.compile(r"^```python\n(.*?)^```\n(?:```text\n(.*?)^```\n)?", re.MULTILINE | re.DOTALL)
PAGES = sorted(page for page in DOCS.rglob("*.md") if "```python" in page.read_text())
KINDS = (registry.strategies, registry.wrappers, registry.estimators, registry.selectors)
METHODS = [(kind, name) for kind in KINDS[:2] for name in pages.ours(kind)]


@pytest.fixture
def registered():
    """Remove a test's registered names after it."""
    kinds = (*KINDS, tasks)
    before = [dict(kind._factories) for kind in kinds]
    yield
    for kind, factories in zip(kinds, before, strict=True):
        kind._factories = factories


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_examples_of_a_page_run_and_print_the_shown_output(page: Path, registered, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict = {"__name__": "__main__"}
    text = page.read_text()
    for example in EXAMPLE.finditer(text):
        code, expected = example.groups()
        printed = io.StringIO()
        line = text.count("\n", 0, example.start()) + 1
        with redirect_stdout(printed):
            exec(compile("\n" * line + code, str(page), "exec", dont_inherit=True), names)
        if expected is not None:
            assert printed.getvalue() == expected, f"{page.name}, line {line}"


def test_pages_with_examples_are_found() -> None:
    assert {"index", "quickstart", "concepts", "adding_a_strategy"} <= {page.stem for page in PAGES}


def test_the_concepts_page_names_every_estimator_and_selector() -> None:
    page = (DOCS / "concepts.md").read_text()
    for kind in (registry.estimators, registry.selectors):
        for name in pages.ours(kind):
            assert f"| `{name}` |" in page


@pytest.mark.parametrize("path", sorted((DOCS.parent / "src").rglob("*.py")), ids=lambda path: path.stem)
def test_docstrings_refer_to_existing_names(path: Path) -> None:
    for name in re.findall(r":(?:attr|class|func|meth|mod):`~?(sparse_prefill\.[\w.]+)`", path.read_text()):
        assert pkgutil.resolve_name(name) is not None


# Pages of strategies and wrappers


@pytest.mark.parametrize(("kind", "name"), METHODS, ids=lambda value: value if isinstance(value, str) else "")
def test_the_page_of_a_method_explains_each_option(kind: registry.Registry, name: str) -> None:
    factory, page = kind.factory(name), pages.page(name)
    assert page.startswith(f"# {name}\n\n")
    section = page.partition("## Options")[2].partition("##")[0]
    table = {row[0]: row[1:] for row in re.findall(r"^\| `(\w+)` \| (.+?) \| (.*) \|$", section, re.MULTILINE)}
    for option in fields(factory):
        if option.init:
            default, meaning = table.pop(option.name)
            assert meaning, f"{option.name} is missing under Args"
            if isinstance(option.default, (int, float, str, type(None))):
                assert default == f"`{option.default!r}`".replace("|", "\\|")
    assert not table
    assert f"\n::: {factory.__module__}.{factory.__qualname__}\n" in page


@pytest.mark.parametrize(("kind", "name"), METHODS, ids=lambda value: value if isinstance(value, str) else "")
def test_the_page_of_a_method_shows_the_texts_of_its_class(kind: registry.Registry, name: str) -> None:
    factory, page = kind.factory(name), pages.page(name)
    assert ("## When to use it" in page) == bool(factory.use)
    assert ("## How it differs from the released code" in page) == bool(factory.differs)
    chunks = page.partition("## Chunks")[2].partition("\n## ")[0]
    assert ("selects the same blocks as in one piece" in chunks) == (factory.chunk_invariant is True)
    for number in re.findall(r"arXiv (\d{4}\.\d{5})", factory.paper):
        assert f"https://arxiv.org/abs/{number}" in page
    for repository in re.findall(r"(?:^|; )([\w-]+/[\w-]+)", factory.reference):
        assert f"https://github.com/{repository}" in page


@dataclass(frozen=True, kw_only=True)
class Halves(sp.Strategy):
    """Keep a half.

    The other half goes, see :class:`~sparse_prefill.Prompt` and ``oracle``.

    Args:
        which (str): "first" or
            "second" | none. Default: "first".
        budget (int | None): blocks to keep. Default: half of what :meth:`keep` may.
        **guards: see :class:`~sparse_prefill.Strategy`; ``sink`` is a whole block.

    Raises:
        ValueError: never.
    """

    paper = "Halves, 2026 (arXiv 2601.00001)"
    use = "Take it\n    for tests, not for `local` ones.\n\n    ```yaml\n    name: halves\n    ```\n"
    differs = "There is no released code."
    chunk_invariant = True

    which: str = "first"
    budget: int | None = None
    sink: int = 128


def test_a_registered_class_gets_a_page(registered) -> None:
    sp.register_strategy("halves")(Halves)
    page = pages.page("halves")
    assert "Halves, 2026 ([arXiv 2601.00001](https://arxiv.org/abs/2601.00001))" in page
    assert (
        "Keep a half.\n\nThe other half goes, see [`Prompt`][sparse_prefill.Prompt] and "
        "[`oracle`](../strategies/oracle.md).\n" in page
    )
    for row in (
        '| `which` | `\'first\'` | "first" or "second" \\| none |',
        "| `budget` | `None` | blocks to keep. Default: half of what `keep` may |",
        "| `sink` | `128` | every query keeps the key blocks of this many first tokens of the prompt |",
    ):
        assert f"\n{row}\n" in page
    assert "\n\nGuards: `sink` is a whole block.\n" in page
    assert "## When to use it\n\nTake it\nfor tests, not for `local` ones.\n\n```yaml\nname: halves\n```\n" in page
    assert "## How it differs from the released code\n\nThere is no released code.\n" in page
    assert "selects the same blocks as in one piece" in page
    assert "ValueError" not in page, "mkdocstrings adds the errors"


def test_a_registered_function_gets_a_page(registered) -> None:
    @sp.register_strategy("few")
    def few(k: int = 4, *, sink: int = 1) -> sp.Strategy:
        """The highest blocks.

        Args:
            k (int): how many. Default: 4.
        """
        raise NotImplementedError

    page = pages.page("few")
    assert "\n| `k` | `4` | how many |\n| `sink` | `1` | every query keeps the key blocks" in page


def test_an_unknown_name_has_no_page() -> None:
    with pytest.raises(ValueError, match="no strategy and no wrapper 'nothing'"):
        pages.page("nothing")


# Tables of measurements

ROWS = [
    {"name": "dense", "strategy": "dense", "options": {}, "density": 1.0, "recall": 1.0},
    {
        "name": "windows",
        "strategy": "a_shape",
        "options": {"sink": 128, "local": 512},
        "density": 0.1,
        "recall": None,
    },
    {
        "name": "by_head(a_shape)",
        "strategy": "by_head(a_shape)",
        "options": {"of": {"name": "a_shape", "local": 1024}, "heads": {}},
        "density": 0.25,
    },
]


def test_a_page_shows_its_rows_beside_dense_and_the_wrapped_strategy(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(pages.tables, "RESULTS", tmp_path)
    for name, rows in (("tiny", ROWS), ("empty", [])):
        (tmp_path / f"evaluation_{name}.json").write_text(json.dumps({"model": "SmolLM2", "rows": rows}))
    assert "\n| `dense` | 1.00 | 1.000 |\n| `a_shape(local=512)` | 0.10 | - |\n\n*SmolLM2" in pages.page("a_shape")
    by_head = pages.page("by_head")
    assert all(f"\n| `{row}` | " in by_head for row in ("dense", "a_shape(local=512)", "by_head(a_shape)"))
    assert "## Measured" not in pages.page("oracle")


def test_results_explain_the_columns() -> None:
    results = (DOCS / "results.md").read_text()
    for heading in list(pages.tables.TABLES["evaluation"]["columns"])[1:]:
        assert f"*{heading.split(',')[0]}*" in results


def test_regions_of_a_page_list_registered_methods(registered) -> None:
    sp.register_strategy("halves")(Halves)
    Halves.__module__, before = "sparse_prefill.halves", Halves.__module__
    try:
        text = pages.refreshed(
            "a\n<!-- strategies:begin -->\noutdated\n<!-- strategies:end -->\nb\n", DOCS / "index.md"
        )
        readme = pages.refreshed("<!-- strategies:begin -->\n<!-- strategies:end -->\n", DOCS.parent / "README.md")
    finally:
        Halves.__module__ = before
    assert text.startswith("a\n<!-- strategies:begin -->\n\n| name | what it does |\n|---|---|\n| [`a_shape`](")
    assert "\n| [`halves`](strategies/halves.md) | Keep a half. |\n" in text
    assert text.endswith("|\n\n<!-- strategies:end -->\nb\n")
    assert "outdated" not in text
    assert "\n| [`halves`](src/sparse_prefill/halves.py) | Keep a half. |\n" in readme


def test_an_unknown_region_raises_an_error_that_names_it() -> None:
    with pytest.raises(ValueError, match=r"page\.md marks a region 'weather'"):
        pages.refreshed("<!-- weather:begin -->\n<!-- weather:end -->\n", DOCS / "page.md")


def test_links_of_the_readme_point_to_existing_files() -> None:
    readme = DOCS.parent / "README.md"
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", readme.read_text()):
        assert (readme.parent / target).exists(), target


# Pictures


def test_pictures_of_synthetic_heads_are_drawn(tmp_path: Path) -> None:
    pictures.save(pictures.walk(), tmp_path / "walk.png")
    assert (tmp_path / "walk.png").stat().st_size > 1000


def test_pictures_of_real_heads_are_drawn_from_a_capture(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)

    def tensor(heads: int) -> Tensor:
        return torch.randn(1, heads, 1000, 64, generator=generator, dtype=torch.bfloat16)

    layers = {str(layer): (tensor(4), tensor(2), tensor(2)) for layer in (0, 3)}
    torch.save({"layers": layers}, tmp_path / "heads.pt")
    heads = pictures.heads_of(tmp_path / "heads.pt", [(0, 1), (3, 3)])
    assert heads[0].mass().sum(-1).allclose(torch.ones(8))
    assert heads[1].show(Figure().subplots(), "dense") == "density 1.00, recall 1.00"
    assert heads[1].show(Figure().subplots(), "a_shape") == "density 1.00, recall 1.00"
    pictures.draw(tmp_path, heads, ["dense", "a_shape", "mean_pool"])
    drawn = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.png"))
    assert drawn == ["strategies.png", "strategies/a_shape.png", "strategies/dense.png", "strategies/mean_pool.png"]


def test_pictures_of_the_pages_show_registered_strategies() -> None:
    shown = {picture.stem for picture in (DOCS / "assets" / "strategies").glob("*.png")}
    assert shown <= set(pages.ours(registry.strategies))


def test_pictures_of_results_are_drawn(tmp_path: Path) -> None:
    by_head = {"by_head": {"density": [[0.1, 0.2]], "recall": [[0.9, 0.8]]}}
    rows = [{"name": name, "density": 0.2, "recall": 0.9, **by_head} for name in ("flex_prefill", "a_shape")]
    (tmp_path / "evaluation_tiny.json").write_text(json.dumps({"rows": rows}))
    (tmp_path / "crossover_tiny.json").write_text(
        json.dumps({"lengths": [1, 2], "strategies": {"a": {"speedup": [1, 2]}}})
    )
    pictures.draw_results(tmp_path, sorted(tmp_path.glob("*.json")))
    assert sorted(path.name for path in (tmp_path / "results").iterdir()) == [
        "crossover_tiny_speedup.png",
        "evaluation_tiny_density_flex_prefill.png",
        "evaluation_tiny_frontier.png",
        "evaluation_tiny_recall_flex_prefill.png",
    ]
