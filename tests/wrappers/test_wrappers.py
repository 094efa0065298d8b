"""Tests of every registered wrapper around several strategies; new wrappers are tested without changes to this file."""

from functools import cache

import pytest
import reference
import torch

import sparse_prefill as sp
from sparse_prefill import registry
from sparse_prefill.strategy import Strategy, as_strategy, to_config
from sparse_prefill.wrappers.base import Wrapper

SMALL = {"block_size": 16, "min_length": 0}
STRATEGIES = {
    "a_shape": {"sink": 16, "local": 32},
    "mean_pool": {"share": 0.5},
    "flex_prefill": {"gamma": 0.5, "tau": 0.0, "min_budget": 16},
    "oracle": {"share": 0.5},
}
WRAPPERS = sp.list_wrappers()
# Without these options a wrapper would change nothing here or keep all blocks.
OPTIONS = {
    "by_head": {"heads": {1: {"name": "a_shape", "sink": 16, "local": 48, **SMALL}}},
    "delta": {"every": 16},
    "similarity_guard": {"threshold": 0.03},
}
SHARED_BY_GROUP = {"gqa_union"}  # one selection for a group of heads: repeating the keys changes it


def around(wrapper, of, **options):
    """A wrapper of ``of``: a strategy, or a name in STRATEGIES."""
    of = {"name": of, **STRATEGIES[of], **SMALL} if isinstance(of, str) else of
    return sp.get_strategy(wrapper, of=of, **OPTIONS.get(wrapper, {}), **options)


def changes_output(strategy):
    """Whether a strategy or wrapper overrides ``attend``."""
    while isinstance(strategy, Wrapper):
        if type(strategy).attend is not Wrapper.attend:
            return True
        strategy = strategy.of
    return type(strategy).attend is not Strategy.attend


def case(q_len=301, kv_len=None, padding=None, dtype=torch.float32):
    # One batch size and one head count: each new combination compiles a kernel.
    qkv = reference.random_qkv(2, 4, 2, q_len, kv_len, scale=4, dtype=dtype)
    return qkv, sp.Prompt(q_len, kv_len or q_len, 16, left_padding=padding)


CASES = {
    "odd length": case(),
    "chunk on the grid": case(208, 304),
    "chunk off the grid": case(201, 311),
    "left padding": case(padding=[37, 0]),
    "bf16": case(dtype=torch.bfloat16),
}


@cache
def solved(wrapper, of, situation):
    (q, k, v), prompt = CASES[situation]
    strategy = around(wrapper, of)
    keep = strategy.keep(q, k, prompt)
    # As in sparse_attention, except that rows of padded batches share one block grid.
    return strategy, (q, k, v), prompt, keep, strategy.attend(sp.AttentionInputs(q=q, k=k, v=v, prompt=prompt), keep)


every_wrapper = pytest.mark.parametrize("wrapper", WRAPPERS)
every_strategy = pytest.mark.parametrize("of", STRATEGIES)
every_situation = pytest.mark.parametrize("situation", CASES)


@every_situation
@every_strategy
@every_wrapper
def test_the_table_and_the_output_are_valid(wrapper, of, situation):
    strategy, (q, k, v), prompt, keep, out = solved(wrapper, of, situation)
    seen, own = reference.visible(prompt, 2), reference.diagonal(prompt, 2)
    assert keep.dtype == torch.bool
    keep = keep.broadcast_to(2, 4, prompt.n_q, prompt.n_k)
    assert not (keep & ~seen).any()
    assert (keep | ~own).all()
    assert out.dtype == q.dtype
    assert out.shape == q.shape
    assert out.isfinite().all()
    padding = prompt.query_positions() < prompt.start()[:, None].expand(2, 1)  # [2, M]
    zero = (out == 0).all(-1).all(1)
    assert torch.equal(zero, padding)
    if not changes_output(strategy):
        want = reference.sparse_attention(q, k, v, keep, prompt)
        tolerance = 2e-2 if situation == "bf16" else 1e-5
        torch.testing.assert_close(out.double(), want, rtol=0, atol=tolerance)


@every_wrapper
def test_the_inputs_of_this_file_skip_blocks(wrapper):
    _, _, prompt, keep, _ = solved(wrapper, "a_shape", "odd length")
    assert keep.float().mean() < 0.9 * prompt.visible().float().mean()


@pytest.mark.parametrize("situation", [s for s in CASES if s != "bf16"])
@every_wrapper
def test_the_output_is_dense_if_the_wrapped_strategy_keeps_all_blocks(wrapper, situation):
    (q, k, v), prompt = CASES[situation]
    everything = {"name": "oracle", "share": 1.0, **SMALL}
    options = {"heads": {1: everything}} if wrapper == "by_head" else {}
    strategy = sp.get_strategy(wrapper, of=everything, **options)
    assert torch.equal(strategy.keep(q, k, prompt).expand(2, 4, -1, -1), prompt.visible().expand(2, 4, -1, -1))
    out = sp.sparse_attention(q, k, v, strategy, prompt=prompt)
    torch.testing.assert_close(out.double(), reference.dense_attention(q, k, v, prompt), rtol=0, atol=1e-5)


@every_strategy
@every_wrapper
def test_with_a_fixed_table_later_tokens_do_not_change_earlier_rows(wrapper, of):
    strategy, (q, k, v), prompt, keep, _ = solved(wrapper, of, "odd length")
    before = strategy.attend(sp.AttentionInputs(q=q, k=k, v=v, prompt=prompt), keep)
    q, k, v = (x.clone() for x in (q, k, v))
    for x in (q, k, v):
        x[:, :, 200:] = -7
    after = strategy.attend(sp.AttentionInputs(q=q, k=k, v=v, prompt=prompt), keep)
    assert torch.equal(before[:, :, :200], after[:, :, :200])
    assert not torch.equal(before, after)


@every_strategy
@every_wrapper
def test_a_row_of_a_batch_equals_the_same_prompt_by_itself(wrapper, of):
    # The prompt is a batch of two equal rows: a batch of one would compile a kernel.
    strategy, (q, k, v), _, keep, out = solved(wrapper, of, "odd length")
    for b in range(2):
        twice = [x[b : b + 1].expand(2, -1, -1, -1) for x in (q, k, v)]
        assert torch.equal(strategy.keep(*twice[:2]).expand(2, 4, -1, -1)[0], keep.expand(2, 4, -1, -1)[b])
        torch.testing.assert_close(sp.sparse_attention(*twice, strategy)[0], out[b], rtol=0, atol=1e-6)


@every_strategy
@pytest.mark.parametrize("wrapper", [name for name in WRAPPERS if name not in SHARED_BY_GROUP])
def test_grouped_heads_equal_repeated_keys(wrapper, of):
    strategy, (q, k, v), prompt, keep, out = solved(wrapper, of, "chunk off the grid")
    k, v = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
    assert torch.equal(strategy.keep(q, k, prompt).expand(2, 4, -1, -1), keep.expand(2, 4, -1, -1))
    torch.testing.assert_close(
        strategy.attend(sp.AttentionInputs(q=q, k=k, v=v, prompt=prompt), keep), out, rtol=0, atol=1e-5
    )


@every_strategy
@every_wrapper
def test_padding_by_whole_blocks_shifts_the_table_and_its_values_do_not_matter(wrapper, of):
    strategy = around(wrapper, of)
    (q, k, v), _ = CASES["odd length"]
    prompt = sp.Prompt(301, block_size=16, left_padding=[48, 48])
    keep = strategy.keep(q, k, prompt)
    out = sp.sparse_attention(q, k, v, strategy, prompt=prompt)
    unpadded = [x[:, :, 48:].contiguous() for x in (q, k, v)]
    assert torch.equal(keep[..., 3:, 3:], strategy.keep(*unpadded[:2]).expand(len(keep), -1, -1, -1))
    torch.testing.assert_close(out[:, :, 48:], sp.sparse_attention(*unpadded, strategy), rtol=0, atol=1e-5)
    q, k, v = (x.clone() for x in (q, k, v))
    for x in (q, k, v):
        x[:, :, :48] = 1e4
    assert torch.equal(strategy.keep(q, k, prompt), keep)
    assert torch.equal(sp.sparse_attention(q, k, v, strategy, prompt=prompt), out)


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 63, 129])
@every_wrapper
def test_no_length_gives_nan(wrapper, tokens):
    q, k, v = (x[:, :, :tokens].contiguous() for x in CASES["odd length"][0])
    assert sp.sparse_attention(q, k, v, around(wrapper, "mean_pool")).isfinite().all()


@every_wrapper
def test_short_prompts_and_decoding_run_dense(wrapper):
    strategy = sp.get_strategy(wrapper, of={"name": "a_shape", "block_size": 16, "min_length": 302})
    (q, k, v), _ = CASES["odd length"]
    with sp.record() as calls:
        sp.sparse_attention(q, k, v, strategy)
        sp.sparse_attention(q[:, :, -1:], k, v, strategy)
    assert [call.dense for call in calls] == ["min_length", "decode"]
    assert calls[0].strategy == f"{wrapper}(a_shape)"


# Nested ---------------------------------------------------------------------------------------------------


CHANGING = [name for name in WRAPPERS if changes_output(around(name, "mean_pool"))]
PAIRS = [(outer, inner) for outer in WRAPPERS for inner in WRAPPERS if outer != inner]


@pytest.mark.parametrize(
    ("outer", "inner"), [pair for pair in PAIRS if pair[0] != "by_head" or pair[1] not in CHANGING]
)
def test_wrappers_nest(outer, inner):
    strategy = around(outer, around(inner, "mean_pool"))
    (q, k, v), prompt = CASES["chunk off the grid"]
    keep = strategy.keep(q, k, prompt)
    out = sp.sparse_attention(q, k, v, strategy, prompt=prompt)
    changing = [name for name in (outer, inner) if name in CHANGING]
    if not changing:
        want = reference.sparse_attention(q, k, v, keep, prompt)
        torch.testing.assert_close(out.double(), want, rtol=0, atol=1e-5)
    if len(changing) == 1:
        want = around(changing[0], "mean_pool").attend(sp.AttentionInputs(q=q, k=k, v=v, prompt=prompt), keep)
        torch.testing.assert_close(out, want, rtol=0, atol=1e-6)
    assert out.isfinite().all()


@pytest.mark.parametrize("inner", CHANGING)
def test_by_head_refuses_wrappers_that_change_the_output_at_any_depth(inner):
    for of in (around(inner, "a_shape"), around("gqa_union", around(inner, "a_shape"))):
        with pytest.raises(ValueError, match="put it around by_head"):
            sp.get_strategy("by_head", of=of)


@pytest.mark.parametrize("situation", CASES)
def test_mean_correction_and_delta_give_the_same_output_in_either_order(situation):
    (q, k, v), prompt = CASES[situation]
    a = around("delta", around("mean_correction", "a_shape"))
    b = around("mean_correction", around("delta", "a_shape"))
    out = sp.sparse_attention(q, k, v, a, prompt=prompt)
    assert torch.equal(out, sp.sparse_attention(q, k, v, b, prompt=prompt))
    for one in ("delta", "mean_correction"):
        assert (out - solved(one, "a_shape", situation)[-1]).abs().max() > 1e-2


# By name --------------------------------------------------------------------------------------------------


@every_wrapper
def test_wrappers_are_built_by_name_and_written_as_configuration(wrapper):
    strategy = sp.get_strategy(wrapper, of={"name": "a_shape", "sink": 16, **SMALL}, **OPTIONS.get(wrapper, {}))
    assert (strategy.of.name, strategy.of.sink) == ("a_shape", 16)
    assert sp.get_strategy(wrapper, of="a_shape").label == f"{wrapper}(a_shape)"
    deep = sp.get_strategy(wrapper, of={"name": "gqa_union", "of": {"name": "a_shape", "sink": 16}})
    for one in (strategy, deep):
        assert as_strategy(to_config(one)) == one


@every_wrapper
def test_a_plan_with_a_wrapper_is_saved_and_loaded(wrapper, tmp_path):
    plan = sp.Plan(default=around(wrapper, "mean_pool"))
    plan.save(tmp_path / "plan.yaml")
    assert sp.Plan.load(tmp_path / "plan.yaml") == plan


@every_wrapper
def test_each_wrapper_documents_its_paper_its_use_and_its_differences(wrapper):
    factory = registry.wrappers.factory(wrapper)
    assert factory.paper
    assert factory.use
    assert factory.differs
    assert "Args:" in factory.__doc__
