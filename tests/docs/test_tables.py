"""Tables of the pages have the values of the result files, as tables.yaml declares them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "docs"))
import tables


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    return lambda name, **report: (tmp_path / f"{name}.json").write_text(json.dumps(report))


ROWS = [{"name": "dense", "recall": 1.0}, {"name": "prism", "recall": 0.94, "seconds": 0.0123}, {"name": "moba"}]


def test_a_table_leaves_out_columns_and_records_without_values(write):
    write("tiny_4k", rows=ROWS, model="m", tokens=4096, threads=1)
    columns = {"strategy": "`{name}`", "recall": "{recall:.3f}", "ms": "{seconds:ms.1f}", "KL": "{kl}"}
    assert tables.table({"files": "tiny_*", "rows": "rows", "columns": columns}) == (
        "| strategy | recall | ms |\n|---|---|---|\n| `dense` | 1.000 |  |\n| `prism` | 0.940 | 12.3 |\n\n"
        "*m, 4,096 tokens, 1 thread; `benchmarks/results/tiny_4k.json`*"
    )


def test_records_are_chosen_by_value_name_and_function(write):
    write("tiny", results=[{"tokens": n, "rows": ROWS} for n in (1, 2)])
    spec = {"files": "tiny", "rows": "results/rows", "columns": {"n": "{tokens}", "who": "{name}{label}"}}
    shown = tables.table({**spec, "where": {"tokens": 2}, "only": ["moba", "dense"]}, label=lambda row: "!")
    assert shown.splitlines()[2:4] == ["| 2 | moba! |", "| 2 | dense! |"]
    assert "dense" not in tables.table(spec, keep=lambda row: row["name"] != "dense")


def test_the_option_across_puts_records_side_by_side(write):
    runs = {"fast": {"s": 1.0, "ok": True}, "slow": {"s": None, "ok": False}}
    write("a", model="A", runs=runs)
    write("b", model="B", runs={"fast": {"s": 2.0}})
    columns = {"run": "{name}", "s": "{s}"}
    spec = {"files": "[ab]", "rows": "runs/*", "across": "{model}", "columns": columns, "before": "Seconds:"}
    shown = tables.table(spec).splitlines()
    assert shown[:6] == ["Seconds:", "", "| run | A | B |", "|---|---|---|", "| fast | 1.0 | 2.0 |", "| slow | - |  |"]
    more = tables.table({**spec, "columns": columns | {"ok": "{ok:?yes}"}}).splitlines()
    assert more[2] == "| run | A: s | A: ok | B: s | B: ok |"
    assert more[4] == "| fast | 1.0 | yes | 2.0 |  |"


def test_numbers_are_looked_up_by_key_name_value_and_index(write):
    write("tiny", rows=ROWS, of=[{"tokens": 8, "a / b": [1, 2.345]}], big=1234.5)
    assert tables.found("tiny", "rows/prism/recall") == 0.94
    assert tables.found("tiny", "of/tokens=8/a / b/1") == 2.345
    text = "94<!--tiny:rows/prism/recall * 100--> % 1<!--tiny:big--> 0.0<!--tiny:of/0/a / b/1-->"
    assert tables.with_numbers(text) == text.replace("1<!--tiny:big", "1,234<!--tiny:big").replace("0.0<", "2.3<")


@pytest.mark.parametrize("key", ["rows/nobody/recall", "rows/prism/density", "rows/7", "other"])
def test_a_missing_key_raises_an_error_that_names_it(write, key):
    write("tiny", rows=ROWS)
    with pytest.raises(ValueError, match=r"tiny\.json has no"):
        tables.found("tiny", key)


def test_a_missing_file_raises_an_error_that_names_it(write):
    with pytest.raises(ValueError, match=r"no result file lost\.json"):
        tables.with_numbers("1<!--lost:a-->")


@pytest.mark.parametrize("name", tables.TABLES)
def test_every_declared_table_has_records(name):
    for spec in tables.TABLES[name] if isinstance(tables.TABLES[name], list) else [tables.TABLES[name]]:
        lines = tables.table(spec).splitlines()
        assert sum(line.startswith("| ") for line in lines) > 1
        assert lines[-1].startswith("*")
