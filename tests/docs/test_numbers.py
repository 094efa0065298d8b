"""Every measured number of the pages stands in a committed measurement."""

from __future__ import annotations

import bisect
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# A measured number has a decimal point. Code, links, versions and papers have points of their own, and <q> marks those
# that are quoted.
NUMBER = re.compile(r"(?<![\w.,-])\d+\.\d+")
OTHER = re.compile(
    r"```.*?```|`[^`]*`|<q>.*?</q>|\]\([^)]*\)|(torch|transformers|Python|Llama|Qwen|Gemma)[ a-z]*\d[\d.]*|"
    r"Apache-2\.0|arXiv \d+\.\d+",
    re.DOTALL,
)
UNITS = (1, 1e3, 1e-3)  # seconds are shown for milliseconds, and the other way round


@cache
def measured() -> list[float]:
    files = (ROOT / "benchmarks/results").glob("*.json")
    return sorted({x for file in files for x in numbers_in(json.loads(file.read_text()))})


def numbers_in(content: Any) -> Iterator[float]:
    if isinstance(content, dict | list):
        for part in content.values() if isinstance(content, dict) else content:
            yield from numbers_in(part)
    elif isinstance(content, int | float) and not isinstance(content, bool):
        yield float(content)


def is_measured(shown: str) -> bool:
    """Whether a measured number rounds to what is shown, in one unit or another."""
    half = 0.5001 * 10.0 ** -len(shown.partition(".")[2])
    for unit in UNITS:
        place = bisect.bisect_left(measured(), (float(shown) - half) * unit)
        if place < len(measured()) and measured()[place] <= (float(shown) + half) * unit:
            return True
    return False


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_numbers_of_a_page_were_measured(page):
    text = OTHER.sub(" ", page.read_text())
    invented = [number[0] for number in NUMBER.finditer(text) if not is_measured(number[0])]
    assert not invented, f"{page.name} shows {', '.join(invented)}, which no file in benchmarks/results holds."


def test_numbers_of_no_measurement_are_found_out():
    assert is_measured(f"{json.loads((ROOT / 'benchmarks/results/demo_smollm2_8k.json').read_text())['tokens']}.0")
    assert not is_measured("123456.789")
