"""Every measured number in the pages comes from a result file and names its file and key."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "docs"))
import pages  # noqa: E402
import tables  # noqa: E402

PAGES = (
    "index",
    "quickstart",
    "choosing",
    "concepts",
    "design",
    "cli",
    "batches",
    "kernel",
    "evaluation",
    "calibration",
    "tasks",
    "results",
    "performance",
    "peers",
)
BOUND = [ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in PAGES)]
# Measured numbers have a decimal point or a unit. Code and names don't count, nor quotes in <q>.
MEASURED = re.compile(r"(?<![\w.,-])(\d[\d,]*\.\d+|\d[\d,]*(?= ?x\b| (?:%|ms|s|µs|GiB|times)(?!\w)))")
OTHER = re.compile(
    r"```.*?```|`[^`]*`|<q>.*?</q>|\]\([^)]*\)|<!-- (\w+):begin -->.*?<!-- \w+:end -->|"
    r"(torch|Torch|version|Python|arXiv) \d[\d.]*",
    re.DOTALL,
)
SETTINGS = ("worst 1 %", "more than 1 % faster", "at 30 % of its", "95 % of the attention")


def unbound(text: str) -> list[str]:
    """Measured numbers without a file and a key."""
    text = " ".join(OTHER.sub(" ", tables.VERDICT.sub(" ", tables.NUMBER.sub(" ", text))).split())
    for setting in SETTINGS:
        text = text.replace(setting, " ")
    return [found[0] for found in MEASURED.finditer(text)]


@pytest.mark.parametrize("page", BOUND, ids=lambda page: page.stem)
def test_numbers_of_a_page_name_their_file_and_key(page):
    found = unbound(page.read_text())
    assert not found, f"{page.name} shows {', '.join(found)}: add the file and the key, see docs/tables.py."


@pytest.mark.parametrize("page", pages.written_pages(), ids=lambda page: page.stem)
def test_numbers_and_tables_of_a_page_equal_those_of_the_files(page):
    text = page.read_text()
    fresh = pages.refreshed(text, page)
    for name in ("estimators", "selectors"):  # lists of classes, which are generated when the site is built
        text, fresh = (
            re.sub(rf"<!-- {name}:begin -->.*?<!-- {name}:end -->", "", one, flags=re.DOTALL) for one in (text, fresh)
        )
    assert text == fresh, f"run python docs/pages.py to bring {page.name} up to date"


@pytest.mark.parametrize(
    "page", [page for page in BOUND if tables.NUMBER.search(page.read_text())], ids=lambda p: p.stem
)
def test_a_changed_digit_in_a_sentence_is_found(page):
    text = page.read_text()
    for number in tables.NUMBER.finditer(text):
        at = number.end("shown") - 1
        changed = text[:at] + str((int(text[at]) + 1) % 10) + text[at + 1 :]
        assert tables.with_numbers(changed) == text
        assert unbound(text[: number.end("shown")] + text[number.end() :]), number[0]


def test_a_changed_digit_in_a_file_is_found(tmp_path, monkeypatch):
    path = shutil.copy(tables.RESULTS / "demo_smollm2_8k.json", tmp_path)
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    text = "6.72<!--demo_smollm2_8k:speedup/attention--> times"
    assert tables.with_numbers(text) == text
    report = json.loads(Path(path).read_text())
    report["speedup"]["attention"] += 0.01
    Path(path).write_text(json.dumps(report))
    assert tables.with_numbers(text) == text.replace("6.72", "6.73")


def test_verdicts_follow_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    (tmp_path / "tiny.json").write_text(json.dumps({"power": 1.5}))
    for goal, verdict in (("at most 1.5", "met"), ("at most 1.4", "missed"), ("at least 1.6", "missed")):
        comment = f"<!--tiny:power {goal}-->"
        assert tables.with_numbers(f"met{comment} missed{comment}") == f"{verdict}{comment} {verdict}{comment}"


@pytest.mark.parametrize("text", ["It is 6.72 times as fast", "in 31 % of the blocks", "takes 12 ms", "a gain of 3x"])
def test_numbers_without_a_file_are_found(text):
    assert len(unbound(text)) == 1


def test_settings_and_names_do_not_count_as_measurements():
    assert not unbound(
        "Qwen2.5-Coder-0.5B on 16,000 tokens, torch 2.13.0, at `gamma=0.95`, <q>up to 10x</q>, worst 1 %"
    )
