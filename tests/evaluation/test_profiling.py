"""Profiles: the work of each stage equals a count by hand, and times of stages add up to the total."""

from __future__ import annotations

from functools import cache

import pytest
import reference
import torch
import torch.nn.functional as F

import sparse_prefill as sp
from sparse_prefill.evaluation import profiling
from sparse_prefill.evaluation.profiling import ceilings, growth, peak_bytes, profile_attention, tables
from sparse_prefill.evaluation.roofline import Work, kernel_work, least_work
from sparse_prefill.evaluation.steps import sparse_at_any_length
from sparse_prefill.evaluation.timing import STAGES

DIM, BYTES = 16, 4  # of the heads, of an fp32 element


def inputs(q_len=70, kv_len=None):
    return reference.random_qkv(heads=6, kv_heads=2, q_len=q_len, kv_len=kv_len)


# Floors


def test_work_of_the_kernel_counts_the_token_pairs_in_the_kept_blocks():
    q, k, v = inputs()
    prompt = sp.Prompt(70, block_size=32)  # blocks of 32, 32 and 6 tokens
    keep = torch.tensor([[1, 0, 0], [0, 1, 0], [1, 0, 1]], dtype=torch.bool).expand(1, 6, 3, 3)
    work = kernel_work(q, k, v, keep, prompt)
    pairs = 32 * 32 + 32 * 32 + 6 * (32 + 6)
    assert work.flops == 6 * pairs * (2 * DIM + 2 * DIM)
    assert work.least_bytes == (6 + 6 + 2 + 2) * 70 * DIM * BYTES  # q, out, k, v
    assert work.most_bytes == 6 * (2 * 70 + 2 * (32 + 32 + 32 + 6)) * DIM * BYTES
    assert kernel_work(q, k, v, keep[:, :1], prompt) == work, "one table for all heads"


def test_work_of_a_chunk_counts_its_own_rows():
    q, k, v = inputs(q_len=40, kv_len=70)
    prompt = sp.Prompt(40, 70, block_size=32)  # rows of 32 and 8 tokens
    everything = prompt.visible().expand(1, 6, -1, -1)
    assert everything.tolist()[0][0] == [[True, True, False], [True, True, True]]  # up to the keys 61 and 69
    pairs = 32 * 64 + 8 * 70
    assert kernel_work(q, k, v, everything, prompt).flops == 6 * pairs * 4 * DIM


def test_work_of_an_estimator_counts_its_products_and_the_bytes_it_reads():
    q, k, v = inputs(q_len=64)
    prompt = sp.Prompt(64, block_size=32)
    pooled = least_work(q, k, v, sp.get_strategy("mean_pool", block_size=32, min_length=0), prompt)
    assert pooled["estimate"] == Work(flops=6 * 2 * 2 * 2 * DIM, least_bytes=(6 + 2) * 64 * DIM * BYTES)
    half = least_work(*(x.bfloat16() for x in (q, k, v)), sp.get_strategy("flash_prefill", block_size=32), prompt)
    assert half["estimate"].least_bytes == (6 + 2) * 64 * DIM * 2, (
        "counted in bf16, though each part is converted before it is read"
    )
    last = sp.get_strategy("last_query", queries=8, block_size=32, min_length=0)
    last_work = least_work(q, k, v, last, prompt)["estimate"]
    assert last_work.least_bytes == (6 * 8 + 2 * 64) * DIM * BYTES, "the last 8 queries, and all keys"
    assert last_work.flops >= 6 * 8 * 64 * 2 * DIM
    fixed = least_work(q, k, v, sp.get_strategy("a_shape", block_size=32, min_length=0), prompt)["estimate"]
    assert fixed == Work(0, 0)


def test_work_of_selection_and_lists_counts_the_bytes_of_their_tables():
    q, k, v = inputs(q_len=64)
    strategy = sp.get_strategy("mean_pool", share=1.0, block_size=32, min_length=0)
    work = least_work(q, k, v, strategy, sp.Prompt(64, block_size=32))
    assert work["select"] == Work(0, 6 * 2 * 2 * (BYTES + 1)), "scores in fp32, and a bool for each"
    kept, rows = 6 * 3, 6 * 2
    assert work["table"] == Work(0, 6 * 2 * 2 + 4 * (kept + 2 * rows))


# Profiles


@cache
def profiled():
    """All strategies on one short prompt in blocks of 32."""
    q, k, v = inputs(q_len=200)
    strategies = {name: sparse_at_any_length(sp.get_strategy(name, block_size=32)) for name in sp.list_strategies()}
    return profile_attention([(q, k, v)], strategies, repeats=1)


@pytest.mark.parametrize("name", sp.list_strategies())
def test_stages_and_rest_add_up_to_the_total(name):
    (row,) = (row for row in profiled()["strategies"] if row["name"] == name)
    assert row["total"] == pytest.approx(sum(row[stage] for stage in STAGES) + row["rest"])
    overhead = row["estimate"] + row["select"] + row["table"]
    assert row["overhead / sdpa"] == pytest.approx(overhead / profiled()["sdpa"])
    assert row["limit over sdpa"] * row["oracle density"] == pytest.approx(
        profiled()["sdpa"] / profiled()["dense flex"]
    )


@pytest.mark.parametrize("name", sp.list_strategies())
def test_rates_are_work_divided_by_time(name):
    (row,) = (row for row in profiled()["strategies"] if row["name"] == name)
    kernel = row["work"]["kernel"]
    assert kernel["gflop"] > 0
    assert kernel["gflop/s"] == pytest.approx(kernel["gflop"] / row["kernel"])
    assert kernel["gb/s"] == pytest.approx(kernel["mb"] / 1e3 / row["kernel"])
    assert kernel["mb at most"] >= kernel["mb"] / 6
    assert all(work["peak mib"] >= 0 for work in row["work"].values())
    if row["work"]["estimate"]["mb"]:
        assert row["work"]["estimate"]["gb/s"] > 0


def test_rates_of_dense_kernels_count_the_visible_blocks():
    found, pairs = profiled(), 128 * 128 + 72 * 200  # of the visible blocks of 128
    for name in ("sdpa", "dense flex"):
        assert found[f"{name} gflop/s"] * found[name] == pytest.approx(6 * pairs * 4 * DIM / 1e9)


def test_work_is_averaged_over_layers():
    strategies = {"a": sp.get_strategy("a_shape", block_size=32, sink=32, local=32, min_length=0)}
    found = profile_attention([inputs(q_len=200)] * 2, strategies, repeats=1)
    (one,) = profile_attention([inputs(q_len=200)], strategies, repeats=1)["strategies"]
    assert found["layers"] == 2
    assert found["strategies"][0]["work"]["kernel"]["gflop"] == pytest.approx(one["work"]["kernel"]["gflop"])


def test_the_oracle_needs_no_more_blocks_than_a_strategy_at_equal_recall():
    strategies = {str(x): sp.get_strategy("xattention", threshold=x, min_length=0) for x in (0.5, 0.98, 0.99)}
    found = profile_attention([inputs(q_len=1500)], strategies, repeats=1)
    densities = [row["density"] for row in found["strategies"] if row["recall"] >= 0.95]
    assert densities
    assert 0 < found["oracle density at 0.95"] <= min(densities)


def test_growth_is_the_exponent_of_time_in_length():
    short = {"tokens": 1000, "sdpa": 1.0, "strategies": [{"name": "a", "total": 1.0}]}
    long = {"tokens": 4000, "sdpa": 16.0, "strategies": [{"name": "a", "total": 8.0}]}
    assert growth(short, long) == pytest.approx({"sdpa": 2, "a": 1.5})


def test_profiles_are_shown_as_tables():
    text = tables(profiled())
    for name in sp.list_strategies():
        assert sum(line.startswith(f"| `{name}` |") for line in text.splitlines()) == 3
    heads, _, *_ = text.splitlines()
    assert "kernel / (density x dense flex)" in heads


def test_memory_of_a_stage_is_the_peak_of_its_allocations():
    class Allocating(sp.Strategy):
        def score(self, q, k, prompt):
            q.new_zeros(2**20).add_(1)  # 4 MiB, freed again
            return q.new_zeros(2**18)  # 1 MiB

        def select(self, scores, prompt):
            return prompt.visible()

    q, k, v = inputs(q_len=200)
    peaks = peak_bytes(q, k, v, Allocating(block_size=32, min_length=0), sp.Prompt(200, block_size=32))
    assert 4 * 2**20 <= peaks["estimate"] < 5 * 2**20
    assert peaks["select"] < 2**18
    assert peaks["kernel"] >= q.numel() * BYTES


def test_launches_on_a_gpu_are_timed_by_cuda_events(monkeypatch):
    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.recorded = True

        def elapsed_time(self, last):
            assert self.recorded
            assert last.recorded
            return 2.0  # ms

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    strategy = sp.get_strategy("a_shape", block_size=32, sink=32, local=32, min_length=0)
    found = profiling._launches(inputs(q_len=200), strategy, sp.Prompt(200, block_size=32))
    assert found["device"] == 0.002
    assert found["host"] > 0


def test_ceilings_have_a_rate_for_copies_and_each_dtype(monkeypatch):
    monkeypatch.setattr("sparse_prefill.evaluation.profiling.CEILING_SIZES", {"cpu": (2**16, 32)})
    found = ceilings([torch.float32, torch.bfloat16])
    assert list(found) == ["copy gb/s", "float32 gflop/s", "bfloat16 gflop/s"]
    assert all(rate > 0 for rate in found.values())


def test_products_of_sdpa_on_the_cpu_are_counted():
    class ByAttention(sp.Strategy):
        def score(self, q, k, prompt):
            return F.scaled_dot_product_attention(q, k, k, enable_gqa=True)

        def select(self, scores, prompt):
            return prompt.visible()

    q, k, v = inputs(q_len=64)
    work = least_work(q, k, v, ByAttention(block_size=32, min_length=0), sp.Prompt(64, block_size=32))
    assert work["estimate"].flops == 6 * 64 * 64 * 4 * DIM
