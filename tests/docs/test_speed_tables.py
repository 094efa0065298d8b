"""The tables of the pages about speed say what the measurements hold, and what misses its goal."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
sys.path.insert(0, str(DOCS))
import speed  # noqa: E402

ABOUT = {
    "device": "a CPU",
    "threads": 1,
    "torch": "2.13",
    "date": "2026-11-21T00:00:00",
    "command": "python x.py",
    "model": "SmolLM2-135M-Instruct",
}


def row(name, **changed):
    work = {"gflop": 2.0, "mb": 3.0, "gflop/s": 20.0, "gb/s": None, "peak mib": 1.0}
    found = {
        **dict.fromkeys(("estimate", "select", "table"), 0.001),
        "kernel": 0.1,
        "rest": 0.0,
        "total": 0.103,
        "density": 0.2,
        "recall": 0.96,
        "speed-up over sdpa": 2.6,
        "overhead / sdpa": 0.03,
        "kernel / (density x dense flex)": 1.1,
        "limit over sdpa": 3.5,
        "work": dict.fromkeys(("estimate", "select", "table", "kernel"), work),
    }
    return {"name": name, **found, **changed}


def case(name, tokens, *rows):
    rates = {"sdpa": 0.3, "dense flex": 0.5, "sdpa gflop/s": 40.0, "dense flex gflop/s": 24.0}
    about = {"case": name, "tokens": tokens, "dtype": "float32", "layers": 2, "oracle density at 0.95": 0.2}
    return {**about, **rates, "strategies": list(rows)}


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "RESULTS", tmp_path)

    def write(name, *cases, **more):
        ceilings = {"copy gb/s": 4.0, "float32 gflop/s": 50.0}
        content = {**ABOUT, "ceilings": ceilings, "results": list(cases), **more}
        (tmp_path / f"{name}.json").write_text(json.dumps(content))

    return write


def rows_of(table):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def test_goals_are_met_or_missed_by_what_was_measured(results):
    slow = row("xattention", **{"overhead / sdpa": 0.09, "total": 0.2, "speed-up over sdpa": 1.5})
    results("profile_cpu", case("smollm2_8k", 8000, row("flex_prefill"), slow))
    kernel, overhead, best = rows_of(speed.goals(DOCS / "performance.md"))
    assert kernel[1:] == ["SmolLM2-135M, 8,000 tokens, fp32", "1.10 to 1.10 (`flex_prefill`)", "met"]
    assert overhead[2:] == ["`flex_prefill` 0.030, `xattention` 0.090", "missed"]
    assert "`0.08`" in overhead[0]
    assert best[2:] == ["`flex_prefill` 2.60x, recall 0.960; its limit is 3.50x", "met"]


def test_long_prompts_have_goals_of_their_own(results):
    short = case("qwen_16k 4000", 4000, row("prism", recall=0.9), row("a_shape", total=0.2), row("moba", total=0.3))
    long = case("qwen_16k 16000", 16000, row("prism", **{"overhead / sdpa": 0.06, "total": 0.8}))
    long |= {"dense flex": 4.0, "oracle density at 0.95": 0.1}
    results("profile_cpu", short, long, model="Qwen2.5-Coder-0.5B-Instruct")
    _, overhead, best, growth = rows_of(speed.goals(DOCS / "performance.md"))
    assert overhead[1:] == ["Qwen2.5-Coder-0.5B, 16,000 tokens, fp32", "`prism` 0.060", "missed"]
    assert "`3x`" in best[0]
    assert best[3] == "missed"
    assert growth[2:] == ["1.00, from `a_shape` to `prism`; that of an oracle's blocks alone is 1.00", "met"]


def test_growth_is_that_of_a_sweep_where_there_is_one(results):
    short, long = case("qwen_16k 4000", 4000, row("prism")), case("qwen_16k 16000", 16000, row("prism"))
    long |= {"dense flex": 4.0, "oracle density at 0.95": 0.1}
    results("profile_cpu", short, long, model="Qwen2.5-Coder-0.5B-Instruct")
    at = {"recall": 0.95, "fastest": ["prism", "moba"], "power": 1.37, "oracle power": 1.45}
    other = {**at, "recall": 0.9, "power": 1.1}
    results("growth_cpu", short, long, model="Qwen2.5-Coder-0.5B-Instruct", growth=[other, at])
    growth = rows_of(speed.goals(DOCS / "performance.md"))[-1]
    assert growth[2:] == ["1.37, from `prism` to `moba`; that of an oracle's blocks alone is 1.45", "met"]
    results("growth_cpu", short, long, model="another", growth=[at])
    assert "1.37" not in speed.goals(DOCS / "performance.md")


def test_whole_prefills_and_crossovers_are_among_the_goals(results):
    run = {"tokens": 16000, "density": 0.2, "speedup": 1.6}
    about = {"model": "Qwen-Instruct", "dtype": "bf16", "strategy": "prism"}
    results("prompts_chunks_qwen_16k", runs={"sparse in one piece": run}, **about)
    strategies = {"a_shape": {"crossover": 3072}, "flex_prefill": {"crossover": 2048}, "oracle": {"crossover": None}}
    results("crossover_cpu", strategies=strategies)
    prefill, crossover = rows_of(speed.goals(DOCS / "performance.md"))
    assert crossover[1] == "SmolLM2-135M"
    assert prefill[1:] == ["Qwen, 16,000 tokens, bf16", "`prism` 1.60x, density 0.20", "missed"]
    assert crossover[2:] == ["1 of 3 strategies, among them `flex_prefill`", "met"]


def test_whole_models_have_their_recall_beside_their_speed(results):
    found = {"strategy": "MeanSlash(threshold=None)", "tokens": 16000, "dtype": "bf16", "density": 0.3}
    speedup = {"attention": 4.0, "prefill": 1.6}
    results("demo_qwen_16k", model="Qwen-Instruct", recall=0.96, speedup=speedup, **found)
    attention, prefill = rows_of(speed.goals(DOCS / "performance.md"))
    assert attention[1:] == [
        "Qwen, 16,000 tokens, bf16, all layers",
        "`MeanSlash` 4.00x, density 0.30, recall 0.960",
        "met",
    ]
    assert prefill[2:] == ["`MeanSlash` 1.60x, density 0.30, recall 0.960", "missed"]
    results("demo_qwen_16k", model="Qwen-Instruct", recall=0.94, speedup=speedup, **found)
    assert [row[3] for row in rows_of(speed.goals(DOCS / "performance.md"))] == ["missed", "missed"]


def test_a_recall_that_nobody_reaches_is_a_goal_missed(results):
    results("profile_cpu", case("smollm2_8k", 8000, row("a_shape", recall=0.8)))
    assert rows_of(speed.goals(DOCS / "performance.md"))[-1][2:] == ["none of that recall", "missed"]


def test_profiles_have_their_tables_rates_and_command(results):
    results("profile_cpu", case("smollm2_8k", 8000, row("flex_prefill")))
    text = speed.profiles(DOCS / "performance.md")
    assert text.startswith("### SmolLM2-135M, 8,000 tokens, fp32\n\nSDPA 300.0 ms a layer, 40.0 GFLOP/s, dense Flex")
    assert "At best: copy 4.0 gb/s, float32 50.0 gflop/s." in text
    assert "| `flex_prefill` | kernel | 2.00 | 20.0 | 3.0 |  | 1.0 |" in text
    assert text.endswith("2 layers, a CPU, 1 thread, torch 2.13, 2026-11-21; `python x.py`*")


def test_growth_is_shown_for_each_recall_and_method(results):
    of_recall = {"recall": 0.9, "fastest": ["prism", "moba"], "seconds": [0.11, 0.44], "power": 1.0}
    of_recall |= {"oracle power": 1.2, "powers": {"prism": 1.25, "moba": None}}
    results("growth_cpu", case("qwen 4096", 4096, row("moba")), case("qwen 16384", 16384), growth=[of_recall])
    text = speed.growth(DOCS / "performance.md")
    assert "| recall | 4,096 tokens, ms | 16,384 tokens, ms | power | an oracle's blocks | `prism` | `moba` |" in text
    assert "| `0.9` | 110.0 (`prism`) | 440.0 (`moba`) | 1.00 | 1.20 | 1.25 | - |" in text


def test_long_prompts_are_held_against_their_tensors(tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "RESULTS", tmp_path)
    sizes = {"lists_gib": 0.03, "tensors_gib": 10.0, "peak_gib": 14.0}
    row = {"name": "a_shape", "seconds": 69.3, "density": 0.00244, "parts": 16, **sizes}
    about = {**ABOUT, "tokens": 1048576, "heads": [32, 8, 64], "dtype": "bf16", "text": "made heads"}
    (tmp_path / "long_cpu.json").write_text(json.dumps({**about, "rows": [row]}))
    text = speed.long_prompts(DOCS / "performance.md")
    assert "| `a_shape` | 0.0024 | 16 | 0.03 | 10.00 | 14.00 | 1.40 | 69 |" in text
    assert "*1,048,576 tokens, 32 query heads and 8 key heads of 64, bf16, made heads, a CPU, 1 threads" in text


def test_peers_are_shown_with_what_was_not_installed(results):
    rows = [
        {"name": "SDPA, default", "seconds": 0.3, "relative error": 0.0, "against SDPA": 1.0},
        {"name": "FlexPrefill", "error": "RuntimeError: a | b"},
    ]
    results("peers_cpu", {**case("smollm2_8k", 8000), "rows": rows}, **{"not installed": ["XAttention"]})
    text = speed.peers(DOCS / "peers.md")
    assert "| SDPA, default | 300.0 | 1.00x | 0.000 |\n| FlexPrefill | RuntimeError: a / b | | |" in text
    assert "Not installed there: XAttention." in text


def test_without_measurements_there_are_no_tables(results):
    assert (
        speed.goals(DOCS)
        == speed.profiles(DOCS)
        == speed.growth(DOCS)
        == speed.long_prompts(DOCS)
        == speed.peers(DOCS)
        == ""
    )
