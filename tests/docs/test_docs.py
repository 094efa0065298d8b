"""The documentation: its examples run and print what they say, and it knows every strategy and every option."""

from __future__ import annotations

import importlib.util
import io
import re
from contextlib import redirect_stdout
from dataclasses import fields
from pathlib import Path

import pytest

from sparse_prefill import registry

DOCS = Path(__file__).parents[2] / "docs"
# A Python block, and the text block right behind it if there is one.
EXAMPLE = re.compile(r"^```python\n(.*?)^```\n(?:```text\n(.*?)^```\n)?", re.MULTILINE | re.DOTALL)
PAGES = sorted(page for page in DOCS.rglob("*.md") if "```python" in page.read_text())


def ours(kind: registry.Registry) -> list[str]:
    """Names that this package registers, without those of installed packages and of other tests."""
    return [name for name in kind.names() if kind.factory(name).__module__.startswith("sparse_prefill.")]


@pytest.fixture
def registered():
    """What a page registers is gone after it."""
    kinds = registry.strategies, registry.estimators, registry.selectors
    before = [dict(kind._factories) for kind in kinds]
    yield
    for kind, factories in zip(kinds, before, strict=True):
        kind._factories = factories


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_examples_of_a_page_run_in_order_and_print_what_it_says(page: Path, registered) -> None:
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


@pytest.mark.parametrize("name", ours(registry.strategies))
def test_every_strategy_has_a_page_with_all_its_options_and_defaults(name: str) -> None:
    assert f" strategies/{name}.md\n" in (DOCS.parent / "mkdocs.yml").read_text()
    page = (DOCS / "strategies" / f"{name}.md").read_text()
    for option in fields(registry.strategies.factory(name)):
        assert f"| `{option.name}` | `{option.default}` |" in page


def test_every_part_is_named_in_the_concepts() -> None:
    page = (DOCS / "concepts.md").read_text()
    for kind in (registry.estimators, registry.selectors):
        for name in ours(kind):
            assert f"| `{name}` |" in page


def test_the_script_draws_all_pictures_of_the_pages(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("pictures", DOCS / "pictures.py")
    pictures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pictures)
    pictures.main(tmp_path)
    drawn = {picture.name for picture in tmp_path.iterdir()}
    shown = {picture.name for picture in (DOCS / "assets").iterdir()}
    assert drawn == {name for name in shown if not name.startswith("demo_")}, "all others are drawn by make demo"
