"""Wrappers that share tables between heads or layers, and the schedule that picks a strategy for each layer."""

from dataclasses import replace

import pytest
import reference
import torch
from torchtune.models.llama3_2 import llama3_2

import sparse_prefill as sp
from sparse_prefill import registry
from sparse_prefill.models.torchtune import prefill, sparsify
from sparse_prefill.strategy import to_config

SMALL = {"block_size": 16, "min_length": 0}
POOLED = {"name": "mean_pool", "share": 0.5, **SMALL}
ORACLE = {"name": "oracle", "share": 0.5, **SMALL}


# gqa_union --------------------------------------------------------------------------------------------------


def test_a_block_is_kept_by_all_heads_of_a_group_if_one_keeps_it():
    q, k, _ = reference.random_qkv(2, 6, 2, 200, scale=4)
    single = sp.get_strategy(**POOLED).keep(q, k)
    united = sp.get_strategy("gqa_union", of=POOLED).keep(q, k)
    for head in range(6):
        group = range(head // 3 * 3, head // 3 * 3 + 3)
        want = torch.stack([single[:, h] for h in group]).any(0)
        assert torch.equal(united[:, head], want)
    assert united.sum() > single.sum()


def test_groups_of_one_head_and_tables_for_all_heads_do_not_change():
    q, k, _ = reference.random_qkv(2, 4, 4, 200, scale=4)
    assert torch.equal(sp.get_strategy("gqa_union", of=POOLED).keep(q, k), sp.get_strategy(**POOLED).keep(q, k))
    a_shape = {"name": "a_shape", **SMALL}
    assert sp.get_strategy("gqa_union", of=a_shape).keep(q, k).shape[:2] == (1, 1)


# reuse_layer ------------------------------------------------------------------------------------------------


def layers(strategy, count):
    return [strategy.for_layer(sp.Layer(i, count)) for i in range(count)]


def inputs(layer):
    return reference.random_qkv(1, 4, 2, 150, scale=4, seed=layer)[:2]


@pytest.mark.parametrize(
    ("options", "sources"),
    [({"every": 2}, [0, 0, 2, 2, 4]), ({"every": 1}, [0, 1, 2, 3, 4]), ({"sources": [3, 1]}, [0, 1, 1, 3, 3])],
)
def test_a_layer_uses_the_table_of_the_latest_source(options, sources):
    bound = layers(sp.get_strategy("reuse_layer", of=POOLED, **options), 5)
    prompt, unshared = sp.Prompt(150, block_size=16), sp.get_strategy(**POOLED)
    for _ in range(2):  # a second pass uses no table of the first
        for layer, source in enumerate(sources):
            assert torch.equal(bound[layer].keep(*inputs(layer), prompt), unshared.keep(*inputs(source)))
    assert not torch.equal(unshared.keep(*inputs(0)), unshared.keep(*inputs(1)))


def test_without_a_model_each_call_selects_for_itself():
    strategy, prompt = sp.get_strategy("reuse_layer", of=POOLED), sp.Prompt(150, block_size=16)
    for seed in range(2):
        plain = sp.Prompt(150, block_size=16)
        assert torch.equal(strategy.keep(*inputs(seed), prompt), strategy.of.keep(*inputs(seed), plain))
        assert len(prompt.cache) == len(plain.cache), "it stores no table in the cache"


def test_different_wrappers_do_not_share_tables_of_one_prompt():
    prompt = sp.Prompt(150, block_size=16)
    pooled, other = (layers(sp.get_strategy("reuse_layer", of=POOLED), 2) for _ in range(2))
    oracle = layers(sp.get_strategy("reuse_layer", of=ORACLE), 2)
    want = pooled[0].keep(*inputs(0), prompt)
    other[0].keep(*inputs(5), prompt)
    oracle[0].keep(*inputs(0), prompt)
    assert torch.equal(pooled[1].keep(*inputs(1), prompt), want)
    assert not torch.equal(other[1].keep(*inputs(1), prompt), want)
    assert not torch.equal(oracle[1].keep(*inputs(1), prompt), want)


def test_changing_an_option_of_a_bound_strategy_keeps_its_layer_and_shared_tables():
    bound = layers(sp.get_strategy("reuse_layer", of=POOLED, every=2), 2)
    prompt = sp.Prompt(150, block_size=16)
    want = bound[0].keep(*inputs(0), prompt)
    sparser = replace(bound[1], of={**POOLED, "share": 0.2})
    assert torch.equal(sparser.keep(*inputs(1), prompt), want)
    assert torch.equal(bound[1].for_layer(sp.Layer(0, 2)).keep(*inputs(1), prompt), bound[1].of.keep(*inputs(1)))


def test_the_layer_is_not_an_option():
    assert set(registry.wrappers.options("reuse_layer")) == {"of", "every", "sources"}
    assert set(to_config(sp.get_strategy("reuse_layer", of=POOLED))) == {"name", "of", "every", "sources"}
    with pytest.raises(ValueError, match="has no option 'layer'"):
        sp.get_strategy("reuse_layer", of=POOLED, layer=1)


def test_the_error_for_a_source_without_a_table_names_the_layer_and_the_fix():
    bound = layers(sp.get_strategy("reuse_layer", of=POOLED, every=2), 4)
    with pytest.raises(ValueError, match=r"Layer 1 reuses the block mask of layer 0.*run the layers in order"):
        bound[1].keep(*inputs(1))
    prompt = sp.Prompt(150, block_size=16)
    bound[0].keep(*inputs(0), prompt)
    with pytest.raises(ValueError, match=r"mask of layer 2.*name layer 3 in sources"):
        bound[3].keep(*inputs(3), prompt)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every must be"),
        ({"sources": [-1]}, "each of sources must be"),
        ({"sources": []}, "at least one layer"),
    ],
)
def test_sources_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        sp.get_strategy("reuse_layer", of=POOLED, **options)


def test_sources_beyond_the_model_are_refused():
    with pytest.raises(ValueError, match="names layer 7, but the model has 4 layers"):
        layers(sp.get_strategy("reuse_layer", of=POOLED, sources=[0, 7]), 4)


# layer_schedule ---------------------------------------------------------------------------------------------


def test_layers_outside_the_range_get_the_other_strategy():
    strategy = sp.get_strategy("layer_schedule", of=POOLED, start=1, stop=3)
    assert [s.name for s in layers(strategy, 4)] == ["dense", "mean_pool", "mean_pool", "dense"]
    strategy = sp.get_strategy("layer_schedule", of=POOLED, others={"name": "a_shape", "sink": 64})
    assert [s.name for s in layers(strategy, 4)] == ["a_shape", "a_shape", "mean_pool", "mean_pool"]


def test_a_wrapper_around_a_schedule_wraps_the_strategy_of_each_layer():
    strategy = sp.get_strategy("delta", of={"name": "layer_schedule", "of": POOLED, "start": 1})
    assert [s.label for s in layers(strategy, 2)] == ["delta(dense)", "delta(mean_pool)"]
    assert [s.block_size for s in layers(strategy, 2)] == [128, 16]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": -1}, "start must be"),
        ({"start": 3, "stop": 3}, "stop must be a whole number, 4 or more"),
        ({"others": 3}, "A strategy must be"),
    ],
)
def test_schedules_with_an_invalid_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        sp.get_strategy("layer_schedule", of=POOLED, **options)


def test_a_schedule_that_starts_after_the_last_layer_is_refused():
    with pytest.raises(ValueError, match="starts at layer 4, but the model has 4 layers"):
        layers(sp.get_strategy("layer_schedule", of=POOLED, start=4), 4)


# Through a model --------------------------------------------------------------------------------------------

TOKENS = torch.randint(1, 128, (1, 203), generator=torch.Generator().manual_seed(3))


def build():
    torch.manual_seed(0)
    model = llama3_2(
        vocab_size=128,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        embed_dim=64,
        intermediate_dim=96,
        max_seq_len=256,
        scale_factor=1,
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                parameter.mul_(3)
    return model


def run(strategy, tokens=TOKENS, **options):
    """The logits, the label and keep table of each sparse call, and the records of all calls."""
    seen = []
    with sp.record(lambda call, tensors, prompt: seen.append((call.strategy, tensors.keep))) as calls:
        logits = prefill(sparsify(build(), strategy), tokens, **options)
    return logits, seen, calls


def test_a_model_reuses_tables_and_attends_over_them():
    logits, seen, _ = run(sp.get_strategy("reuse_layer", of=POOLED, every=2))
    tables = [keep for _, keep in seen]
    assert torch.equal(tables[0], tables[1])
    assert torch.equal(tables[2], tables[3])
    assert not torch.equal(tables[1], tables[2])
    unshared, single, _ = run(sp.get_strategy(**POOLED))
    assert torch.equal(tables[0], single[0][1])
    assert (logits - unshared).abs().max() > 1e-3
    each_layer, _, _ = run(sp.get_strategy("reuse_layer", of=POOLED, every=1))
    torch.testing.assert_close(each_layer, unshared)


def test_left_padded_rows_reuse_their_own_tables():
    strategy = sp.get_strategy("reuse_layer", of=POOLED, every=4)
    batch = torch.cat([TOKENS, torch.nn.functional.pad(TOKENS[:, :150], (53, 0))])
    together, _, _ = run(strategy, batch, left_padding=[0, 53])
    for row, tokens in enumerate((TOKENS, TOKENS[:, :150])):
        torch.testing.assert_close(together[row], run(strategy, tokens)[0][0], atol=1e-5, rtol=1e-4)


def test_a_model_runs_its_first_layers_dense_in_blocks_of_another_size():
    _, seen, calls = run(sp.get_strategy("layer_schedule", of=POOLED, start=2))
    assert [call.dense for call in calls] == ["strategy", "strategy", None, None]
    assert [label for label, _ in seen] == ["mean_pool", "mean_pool"]
    coarse = {"name": "a_shape", "sink": 32, "local": 32, "block_size": 32, "min_length": 0}
    _, seen, calls = run(sp.get_strategy("layer_schedule", of=POOLED, start=1, stop=2, others=coarse))
    assert [keep.shape[-1] for _, keep in seen] == [7, 13, 7, 7]


def test_layers_that_reuse_tables_after_dense_layers_need_a_source_among_the_sparse_ones():
    reused = {"name": "reuse_layer", "of": POOLED, "every": 4}
    with pytest.raises(ValueError, match="name layer 2 in sources if layer 0 runs dense"):
        run(sp.get_strategy("layer_schedule", of=reused, start=2))
    _, seen, _ = run(sp.get_strategy("layer_schedule", of={**reused, "sources": [2]}, start=2))
    assert torch.equal(seen[0][1], seen[1][1])
