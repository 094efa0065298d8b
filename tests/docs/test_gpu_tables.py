"""The tables of GPU measurements say what the files hold, and what misses its goal."""

from __future__ import annotations

import json
import sys
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"
sys.path.insert(0, str(DOCS))
import speed_gpu  # noqa: E402
from speed_gpu import STAGES  # noqa: E402


def row(name, **changed):
    times = {"estimate": 0.001, "select": 0.001, "table": 0.001, "kernel": 0.01, "host": 0.002}
    shares = {"density": 0.05, "recall": 0.96, "oracle density": 0.04, "graph against best dense": 12.5}
    seconds = {"seconds": 0.014, "graph": 0.012, "short": 0.26, "against best dense": 10.7}
    return {"name": name, **times, **shares, **seconds, "peak_gib": 3.0, **changed}


def report(*cases, **more):
    about = {"device": "a GPU", "dtype": "bf16", "torch": "2.11", "date": "2026-11-27T00:00", "command": "python x.py"}
    return {**about, "ceilings": {"copy gb/s": 2890.6}, "results": list(cases), **more}


def case(tokens, *rows, **more):
    dense = {"default": 0.15, "flash_attention": 0.3, "dense flex": 0.2, "default, in a row": 0.25}
    name = f"Llama-3.1-8B, {tokens} tokens"
    return {
        "case": name,
        "tokens": tokens,
        "dense": dense,
        "best dense": 0.15,
        "tensors_gib": 2.5,
        "strategies": list(rows),
        **more,
    }


def section(tmp_path, monkeypatch, *cases):
    """What is shown of one measurement, or of one for each list of cases."""
    monkeypatch.setattr(speed_gpu, "RESULTS", tmp_path)
    for i, one in enumerate(cases if isinstance(cases[0], list) else [cases]):
        (tmp_path / f"gpu_{i}.json").write_text(json.dumps(report(*one, date=f"2026-11-2{i}T00:00")))
    return speed_gpu.gpu(DOCS / "performance.md")


def test_goals_of_each_length(tmp_path, monkeypatch):
    fast, slow = row("flex_prefill"), row("xattention", recall=0.8, estimate=0.02, graph=0.001)
    found = section(tmp_path, monkeypatch, case(4096, fast), case(32768, fast), case(131072, fast, slow))
    assert "in a row: not slower than SDPA | 260.00 to 260.00 ms, median 260.00 ms, SDPA 250.00 ms | met |" in found
    assert (
        "32,768 tokens, recall `0.95` or more: `5x` as fast as the flash kernel of SDPA | `flex_prefill` `25.00x`"
        in found
    )
    assert "`20x` as fast as the flash kernel of SDPA | `flex_prefill` `25.00x`, recall 0.960 | met |" in found
    assert "`10x` as fast as the best dense kernel | `flex_prefill` `12.50x`, recall 0.960 | met |" in found
    assert "at most `0.03` of the best dense kernel | `flex_prefill` `0.020`, `xattention` `0.147` | missed |" in found
    assert "at least `0.85` of the kernel's time | `1.00` (`flex_prefill`) to `1.00` | met |" in found
    assert "*a GPU, bf16, torch 2.11, 2026-11-20; at best: copy 2,891 gb/s; `python x.py`*" in found


def test_what_comes_before_the_kernel_is_told_as_a_graph_where_it_was_replayed(tmp_path, monkeypatch):
    rows = row("flex_prefill", **{"search graph": 0.006}), row("prism", **{"search graph": 0.003}), row("a_shape")
    found = section(tmp_path, monkeypatch, case(131072, *rows))
    assert "dense kernel, as a CUDA graph | `flex_prefill` `0.040`, `prism` `0.020` | missed |" in found
    assert "| CUDA graph | against SDPA |" in found
    assert "graph before the kernel | CUDA graph |" in found
    assert "as a CUDA graph" not in section(tmp_path, monkeypatch, case(131072, row("prism")))


def test_goals_are_held_against_all_measurements(tmp_path, monkeypatch):
    """The fastest counts, by the dense kernels of its own run, and of a strategy's overhead the last."""
    slow_dense = {"default": 0.3, "flash_attention": 0.6, "dense flex": 0.4}
    first = [case(131072, row("prism", graph=0.02), row("flex_prefill", estimate=0.02, graph=0.05))]
    later = [case(131072, row("prism", graph=0.03), dense=slow_dense, **{"best dense": 0.3}), case(32768, row("prism"))]
    found = section(tmp_path, monkeypatch, first, later)
    assert "SDPA | `prism` `20.00x`, recall 0.960 | met |" in found
    assert "dense kernel | `prism` `10.00x`" in found
    assert "131,072 tokens: estimate, select and table at most `0.03` of the best dense kernel" in found
    assert "| `prism` `0.010`, `flex_prefill` `0.147` | missed |" in found
    assert found.count("| goal |") == 1


def test_a_million_tokens_are_held_against_their_memory(tmp_path, monkeypatch):
    parts = {key: value for key, value in row("a_shape").items() if key not in ("density", "recall", "graph", *STAGES)}
    del parts["graph against best dense"]
    found = section(tmp_path, monkeypatch, case(1 << 20, row("prism"), parts))
    assert "queries, keys, values and output | `prism` `1.200`, `a_shape` `1.200` | met |" in found
    assert "| `a_shape` |  |  | 0.040 |  |  |  |  | 2.00 | 14.00 |  | 10.70x |" in found


def test_times_of_a_prompt_and_of_options(tmp_path, monkeypatch):
    tried = {
        "kernel options": [{"options": {}, "seconds": 0.002}, {"options": {"BACKEND": "FLASH"}, "error": "no"}],
        "order of rows": [{"order": "heavy first", "seconds": 0.003}],
    }
    captured = {**case(16000, row("prism")), "case": "x, layer 12", "model": "Qwen"}
    found = section(tmp_path, monkeypatch, case(32768, row("a_shape"), **tried), captured)
    assert "### Llama-3.1-8B, 32768 tokens\n\nSDPA 150.00 ms, its flash kernel 300.00 ms" in found
    assert "| `a_shape` | 0.050 | 0.960 | 0.040 | 1.00 | 1.00 | 1.00 | 10.00 | 2.00 | 14.00 | 12.00 | 12.50x |" in found
    assert "### Qwen, 16,000 tokens, captured" in found
    for line in ("those of the library | 2.00 |", "`BACKEND=FLASH` | not there |", "rows heavy first | 3.00 |"):
        assert line in found


def test_nothing_measured_is_nothing_shown(tmp_path, monkeypatch):
    monkeypatch.setattr(speed_gpu, "RESULTS", tmp_path)
    assert speed_gpu.gpu(DOCS / "performance.md") == ""


def test_blocks_for_a_recall_on_made_heads(tmp_path, monkeypatch):
    monkeypatch.setattr(speed_gpu, "RESULTS", tmp_path)
    assert speed_gpu.made_heads(DOCS / "performance.md") == ""
    usual = {"density": 0.1, "recall": 0.97}
    at = {"options": {"threshold": 0.00123456}, "density": 0.06, "oracle density": 0.05}
    rows = [{"name": "prism", "as it stands": usual, "at the recall": at}, {"name": "moba", "as it stands": usual}]
    of_lengths = [{"tokens": tokens, "rows": rows} for tokens in (32768, 131072)]
    content = report(recall=0.95, model="10 heads of 128", results=of_lengths)
    (tmp_path / "made_heads.json").write_text(json.dumps(content))
    found = speed_gpu.made_heads(DOCS / "performance.md")
    assert "| 32,768 tokens: at | 32,768 tokens: density | 32,768 tokens: by default | 131,072 tokens: at |" in found
    cells = "`threshold=0.00123` | 0.060, `1.20x` | 0.100, recall 0.970 |"
    assert (
        f"| `prism` | {cells} {cells}\n| `moba` | - | - | 0.100, recall 0.970 | - | - | 0.100, recall 0.970 |" in found
    )
    assert "*Recall 0.95, 10 heads of 128, a GPU, torch 2.11, 2026-11-27; `python x.py`*" in found
