"""benchmarks/gpu.py on a CPU: the patterns of its synthetic heads, and the contents of its report."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

import sparse_prefill as sp
from sparse_prefill.kernel import block_sparse

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import gpu
import kernel_variants
import known_heads


def test_synthetic_heads_have_the_named_patterns():
    tokens = 2048
    q, k, _ = known_heads.structured(tokens, 5, 1, 128, dtype=torch.float32, device="cpu")
    logits = q[0, :, -1] @ k[0, 0].T / 128**0.5  # last query: [5, tokens]
    attention = dict(zip(known_heads.KINDS, logits.softmax(-1), strict=True))
    assert attention["sink"][:16].sum() > 0.9
    assert attention["local"][-128:].sum() > 0.6
    assert attention["vertical"][16:-128].sum() > attention["local"][16:-128].sum()
    assert abs(int(attention["slash"].argmax()) - (tokens - 1 - (100 + 331 * 3))) < 64
    same = (k[0, 0, :-128, 48:80] - k[0, 0, -1, 48:80]).norm(dim=-1) < 1e-6  # far keys with the topic of the last one
    assert attention["block"][:-128][same].sum() > 2 * attention["local"][:-128][same].sum()


def test_a_run_reports_each_prompt(tmp_path):
    path = tmp_path / "gpu.json"
    options = "--device cpu --dtype fp32 --repeats 1 --shapes Qwen2.5-7B --lengths 700 --strategies a_shape:local=128"
    options += " --options-at 700"
    gpu.main([*options.split(), "--json", str(path)])
    (found,) = json.loads(path.read_text())["results"]
    (row,) = found["strategies"]
    assert found["tokens"] == 700
    assert {"seconds", "estimate", "kernel", "density", "recall", "oracle density", "against best dense"} <= row.keys()
    assert 0 < row["density"] < 1
    assert {"default", "dense flex"} <= found["dense"].keys()
    assert [row["order"] for row in found["order of rows"] if row["seconds"] > 0] == ["as they stand", "heavy first"]
    *tried, flash = found["kernel options"]
    assert all(row["seconds"] > 0 for row in tried)
    assert "is for CUDA devices" in flash["error"] or "needs torch 2.14" in flash["error"]


def test_the_order_of_rows_does_not_change_the_output(monkeypatch):
    q, k, v = known_heads.structured(700, 4, 2, 128, dtype=torch.float32, device="cpu")
    prompt = sp.Prompt(700, block_size=32)
    keep = sp.get_strategy("xattention", block_size=32, threshold=0.98, min_length=0).keep(q, k, prompt)
    tables = gpu.block_tables(keep, prompt)
    read = (tables.partial_counts + tables.full_counts)[0]
    assert (read.diff(dim=-1) > 0).any(), "rows are already sorted by work"
    seen, attend = [], kernel_variants.attend_in_order

    def watched(q, k, v, tables, *others):
        seen.append(tables.partial_counts + tables.full_counts)
        return attend(q, k, v, tables, *others)

    monkeypatch.setattr(kernel_variants, "attend_in_order", watched)
    with torch.inference_mode():
        found = kernel_variants.attend_heavy_first(q, k, v, tables, 32)
        want = sp.block_sparse_attention(q, k, v, keep, prompt=prompt)
    torch.testing.assert_close(found, want, rtol=0, atol=1e-4)
    assert (seen[0].diff(dim=-1) <= 0).all()


def test_captured_prompts_come_first_and_name_their_model_and_text(tmp_path):
    path = tmp_path / "tiny.pt"
    qkv = known_heads.structured(300, 4, 2, 128, dtype=torch.float32, device="cpu")
    torch.save({"layers": {"6": qkv}, "model": "tiny", "text": "prose", "seed": 3}, path)
    options = ["--device", "cpu", "--dtype", "fp32", "--lengths", "700", "--shapes", "Qwen2.5-7B", "--qkv", str(path)]
    (name, source, make), synthetic = gpu.cases(gpu.parse(options))
    assert (name, source) == ("tiny, layer 6", {"model": "tiny", "text": "prose", "seed": 3})
    assert all(torch.equal(x, y) for x, y in zip(make(), qkv, strict=True))
    assert synthetic[:2] == ("Qwen2.5-7B, 700 tokens", {"model": "Qwen2.5-7B"})


def test_stages_and_density_cover_all_parts_of_a_call(monkeypatch):
    q, k, v = known_heads.structured(2048, 4, 2, 128, dtype=torch.float32, device="cpu")
    args = gpu.parse(["--device", "cpu", "--repeats", "1", "--strategies", "a_shape:local=256"])
    (whole,) = gpu.measure(q, k, v, args)["strategies"]
    monkeypatch.setattr(gpu, "RECALL_UP_TO", 0)
    monkeypatch.setattr(block_sparse, "MAX_TABLE_ENTRIES", 4 * 16 * 5)  # five rows of blocks at a time
    (in_parts,) = gpu.measure(q, k, v, args)["strategies"]
    assert whole["parts"] == 1 < in_parts["parts"]
    assert in_parts["density"] == pytest.approx(whole["density"])


def test_a_failed_strategy_is_reported_with_its_error(monkeypatch):
    def fail(*_args, **_kwargs):
        raise RuntimeError("out of memory\nand more")

    monkeypatch.setattr(sp, "sparse_attention", fail)
    q, k, v = known_heads.structured(300, 4, 2, 128, dtype=torch.float32, device="cpu")
    monkeypatch.setattr(gpu, "DENSE_UP_TO", 0)
    args = gpu.parse(["--device", "cpu", "--repeats", "1", "--strategies", "a_shape"])
    assert gpu.measure(q, k, v, args)["strategies"] == [{"name": "a_shape", "error": "out of memory"}]


def test_a_missing_device_is_refused(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit):
        gpu.parse([])
    assert "no CUDA device" in capsys.readouterr().err
