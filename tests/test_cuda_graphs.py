"""CUDA graphs replay repeated calls with new values, and all other calls run as usual."""

from __future__ import annotations

import pytest
import reference
import torch

import sparse_prefill as sp
from sparse_prefill import cuda_graphs

BLOCK = 16


def qkv(q_len=160, kv_len=None, seed=0):
    return reference.random_qkv(heads=4, kv_heads=2, q_len=q_len, kv_len=kv_len or q_len, seed=seed, scale=4)


def strategy(name="flash_prefill", **options):
    return sp.get_strategy(name, block_size=BLOCK, min_length=0, **options)


@pytest.fixture
def runs(monkeypatch):
    """Counts captures and replays, on a CPU that is patched to act as a GPU.

    A replay runs the captured call again on the same tensors into the same output.
    """
    seen = {"captured": 0, "replayed": 0}

    def captured(attend, pool, device, strategy):
        seen["captured"] += 1
        out = attend()

        def replay():
            seen["replayed"] += 1
            out.copy_(attend())

        return replay, out

    monkeypatch.setattr(cuda_graphs, "_on_gpu", lambda q: True)
    monkeypatch.setattr(cuda_graphs, "_is_capturing", lambda: False)
    monkeypatch.setattr(cuda_graphs, "_new_pool", object)
    monkeypatch.setattr(cuda_graphs, "_captured", captured)
    return seen


@pytest.mark.parametrize("name", ["flash_prefill", "flex_prefill", "minference"])
def test_the_second_call_of_a_kind_is_captured_and_later_ones_are_replayed_with_new_values(name, runs):
    method = strategy(name)
    with torch.inference_mode(), sp.CudaGraphs() as graphs:
        for seed in range(4):
            tensors = qkv(seed=seed)
            assert torch.equal(sp.sparse_attention(*tensors, method), _without(graphs, *tensors, method))
    assert runs == {"captured": 1, "replayed": 3}
    assert len(graphs) == 1


def _without(graphs, *args, **options):
    graphs.__exit__()
    try:
        return sp.sparse_attention(*args, **options)
    finally:
        graphs.__enter__()


def test_later_calls_do_not_change_earlier_outputs(runs):
    with torch.inference_mode(), sp.CudaGraphs():
        outs = [sp.sparse_attention(*qkv(seed=seed), strategy()) for seed in range(4)]
    for seed, out in enumerate(outs):
        assert torch.equal(out, sp.sparse_attention(*qkv(seed=seed), strategy()))


def test_each_kind_of_call_has_a_separate_graph(runs):
    kinds = [
        {},
        {"tensors": qkv(176)},
        {"strategy": strategy(alpha=0.5)},
        {"strategy": sp.get_strategy("by_head", of=strategy(), heads={1: strategy("a_shape")})},
        {"scale": 0.5},
        {"softcap": 20.0},
        {"sinks": torch.linspace(-1, 1, 4)},
        {"prompt": sp.Prompt(160, block_size=BLOCK, window=50)},
        {"prompt": sp.Prompt(160, block_size=BLOCK, total_len=400)},
    ]
    with torch.inference_mode(), sp.CudaGraphs(most=20) as graphs:
        for _ in range(3):
            for kind in kinds:
                given = {"tensors": qkv(), "strategy": strategy(), **kind}
                tensors = given.pop("tensors")
                assert torch.equal(sp.sparse_attention(*tensors, **given), _without(graphs, *tensors, **given))
    assert len(graphs) == runs["captured"] == len(kinds)


def test_layers_that_share_a_graph_use_different_sinks(runs):
    tensors = qkv()
    with torch.inference_mode(), sp.CudaGraphs() as graphs:
        for seed in range(4):
            sinks = torch.randn(4, generator=torch.Generator().manual_seed(seed))
            out = sp.sparse_attention(*tensors, strategy(), sinks=sinks)
            assert torch.equal(out, _without(graphs, *tensors, strategy(), sinks=sinks))
    assert runs["captured"] == 1


def test_each_row_of_a_padded_batch_is_a_separate_call(runs):
    tensors = reference.random_qkv(batch=3, heads=4, kv_heads=2, q_len=160)
    prompt = sp.Prompt(160, block_size=BLOCK, left_padding=[0, 60, 60])
    with torch.inference_mode(), sp.CudaGraphs() as graphs:
        for _ in range(2):
            out = sp.sparse_attention(*tensors, strategy(), prompt=prompt)
            assert torch.equal(out, _without(graphs, *tensors, strategy(), prompt=prompt))
    assert runs == {"captured": 2, "replayed": 4}


def test_later_chunks_reuse_key_statistics_of_a_replayed_chunk(runs):
    q, k, v = qkv(320)
    method = strategy()

    def in_two(state):
        first = sp.Prompt(160, block_size=BLOCK, total_len=320)
        sp.sparse_attention(q[:, :, :160], k[:, :, :160], v[:, :, :160], method, prompt=first, state=state)
        return sp.sparse_attention(q[:, :, 160:], k, v, method, state=state)

    want = in_two(sp.KeyState())
    with torch.inference_mode(), sp.CudaGraphs():
        for _ in range(3):
            state = sp.KeyState()
            assert torch.equal(in_two(state), want)
    statistics = [x.clone() for x in state._blocks.values()]
    assert statistics
    assert runs == {"captured": 1, "replayed": 2}
    with torch.inference_mode(), sp.CudaGraphs():  # a later prompt doesn't overwrite the statistics
        for _ in range(3):
            sp.sparse_attention(*qkv(160, seed=1), method, state=sp.KeyState())
    assert all(torch.equal(a, b) for a, b in zip(statistics, state._blocks.values(), strict=True))


def test_the_least_recently_used_graph_is_dropped(runs):
    with torch.inference_mode(), sp.CudaGraphs(most=2) as graphs:
        for tokens in (160, 160, 176, 176, 160, 192, 192, 160, 176):
            sp.sparse_attention(*qkv(tokens), strategy())
    assert len(graphs) == 2
    assert runs["captured"] == 4, "160, 176 and 192 tokens, and 176 again"


@pytest.mark.parametrize("case", ["decode", "dense", "chunk", "one block", "recorded"])
def test_unsupported_calls_run_without_a_graph(case, runs):
    tensors = {"decode": qkv(1, 160), "chunk": qkv(80, 160), "one block": qkv(16)}.get(case, qkv())
    method = strategy() if case != "dense" else sp.get_strategy("flash_prefill", block_size=BLOCK, min_length=1000)
    with torch.inference_mode(), sp.CudaGraphs():
        for _ in range(3):
            if case == "recorded":
                with sp.record() as calls:
                    sp.sparse_attention(*tensors, method)
                assert calls[0].dense is None
            else:
                sp.sparse_attention(*tensors, method)
    assert runs == {"captured": 0, "replayed": 0}


def test_layers_that_share_a_table_run_without_a_graph(runs):
    shared = sp.get_strategy("reuse_layer", of=strategy(), every=2)
    layers = [shared.for_layer(sp.Layer(index, 4)) for index in range(4)]
    inside = sp.get_strategy("gqa_union", of=layers[0])
    assert inside.shares_across_layers
    with torch.inference_mode(), sp.CudaGraphs():
        for _ in range(3):
            prompt = sp.Prompt(160, block_size=BLOCK)
            for layer in layers:
                sp.sparse_attention(*qkv(), layer, prompt=prompt)
    assert runs["captured"] == 0
    assert not shared.shares_across_layers


def test_layers_of_a_model_share_a_graph(runs):
    transformers = pytest.importorskip("transformers")
    from sparse_prefill.models.transformers import sparse

    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    tokens = torch.randint(3, 64, (1, 203), generator=torch.Generator().manual_seed(3))
    a_few = sp.get_strategy("flex_prefill", gamma=0.3, min_budget=16, block_size=BLOCK, min_length=0)
    options = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    with torch.inference_mode(), sparse(model, a_few, stats=False):
        want = model(tokens).logits, model.generate(tokens, **options)
        with sp.CudaGraphs():
            assert torch.equal(model(tokens).logits, want[0])
            assert runs == {"captured": 1, "replayed": 3}
            assert torch.equal(model.generate(tokens, **options), want[1])
    assert runs == {"captured": 1, "replayed": 7}


def test_tensors_on_a_cpu_are_refused():
    with pytest.raises(ValueError, match="q is on cpu"), sp.CudaGraphs():
        sp.sparse_attention(*qkv(), strategy())


@pytest.mark.parametrize("most", [0, -1, 1.5, True])
def test_a_wrong_number_of_graphs_is_refused(most):
    with pytest.raises(ValueError, match="most must be"):
        sp.CudaGraphs(most=most)


def test_nested_with_blocks_have_separate_graphs(runs):
    outer, inner = sp.CudaGraphs(), sp.CudaGraphs()
    with torch.inference_mode():
        with outer:
            with inner:
                for _ in range(2):
                    sp.sparse_attention(*qkv(), strategy())
            for _ in range(2):
                sp.sparse_attention(*qkv(176), strategy())
        for _ in range(2):
            sp.sparse_attention(*qkv(192), strategy())
    assert (len(outer), len(inner)) == (1, 1)
    assert runs["captured"] == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", [name for name in sp.list_strategies() if name not in ("dense", "oracle")])
def test_replays_on_a_gpu_equal_direct_calls(name):
    method = sp.get_strategy(name, min_length=0)
    with torch.inference_mode(), sp.CudaGraphs() as graphs:
        for tokens in (4096, 4001):
            for seed in range(4):
                qkv = reference.random_qkv(heads=4, kv_heads=2, q_len=tokens, dim=64, seed=seed, scale=4)
                tensors = [x.cuda().bfloat16() for x in qkv]
                want = _without(graphs, *tensors, method)
                assert torch.equal(sp.sparse_attention(*tensors, method), want)
    assert len(graphs) == (0 if method.dense_reason(sp.Prompt(4096), want.device) else 2)
