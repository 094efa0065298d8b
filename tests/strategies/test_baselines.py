"""The plain baselines keep exactly the blocks that their docstrings say."""

import math

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st

import sparse_prefill as sp

PROMPTS = {
    "one token": {"q_len": 1},
    "63": {"q_len": 63},
    "127": {"q_len": 127},
    "a token after whole blocks": {"q_len": 129},
    "1000": {"q_len": 1000, "heads": 2, "kv_heads": 1},
    "batch, no groups": {"q_len": 100, "batch": 2, "heads": 4, "kv_heads": 4},
    "chunk": {"q_len": 64, "kv_len": 208},
    "chunk off the grid": {"q_len": 41, "kv_len": 205},
    "chunk under a block": {"q_len": 5, "kv_len": 205},
    "padding": {"q_len": 150, "batch": 2, "heads": 4, "kv_heads": 2, "left_padding": [37, 0]},
    "padded chunk": {"q_len": 41, "kv_len": 205, "batch": 2, "heads": 4, "left_padding": [20, 170]},
    "all padding": {"q_len": 64, "batch": 2, "heads": 2, "left_padding": [64, 3]},
    "documents": {"q_len": 150, "documents": [0] * 70 + [1] * 5 + [2] * 75},
}
every_prompt = pytest.mark.parametrize("sizes", PROMPTS.values(), ids=PROMPTS)
one_document = pytest.mark.parametrize(
    "sizes", [sizes for name, sizes in PROMPTS.items() if name != "documents"], ids=list(PROMPTS)[:-1]
)


def inputs(left_padding=None, documents=None, scale=3.0, **sizes):
    q, k, _ = reference.random_qkv(scale=scale, **sizes)
    return q, k, sp.Prompt(q.shape[2], k.shape[2], 16, left_padding=left_padding, documents=documents)


def visible_with_own(prompt, table):
    """The visible blocks of a table and the own blocks, for one head."""
    batch = len(table)
    return (table | reference.diagonal(prompt, batch)) & reference.visible(prompt, batch)


# local ----------------------------------------------------------------------------------------------------


@every_prompt
@pytest.mark.parametrize("tokens", [0, 1, 40])
def test_local_keeps_the_blocks_of_the_nearest_tokens_and_no_sink(sizes, tokens):
    q, k, prompt = inputs(**sizes)
    keep = sp.get_strategy("local", block_size=16, local=tokens).keep(q, k, prompt)
    near = reference.block_table(
        prompt, prompt.batch, lambda b, rows, keys: rows.start + prompt.offset - (keys.stop - 1) < tokens
    )
    assert torch.equal(keep, visible_with_own(prompt, near))


# dilated --------------------------------------------------------------------------------------------------


@every_prompt
@pytest.mark.parametrize(
    ("dilation", "window", "sink"), [(2, 8192, 0), (2, 64, 20), (3, 100, 0), (1, 33, 0), (5, 1, 16)]
)
def test_dilated_keeps_sinks_and_every_nth_block_of_the_window(sizes, dilation, window, sink):
    q, k, prompt = inputs(**sizes)
    keep = sp.get_strategy("dilated", block_size=16, dilation=dilation, window=window, sink=sink).keep(q, k, prompt)

    def rule(b, rows, keys):
        for row in rows:
            distance = (row + prompt.offset) // 16 - keys.start // 16
            if distance >= 0 and distance % dilation == 0 and distance * 16 < window:
                return True
        firsts = {reference.first_key(prompt, b, key) for key in keys}
        return any(first <= key < first + sink for key in keys for first in firsts)

    assert torch.equal(keep, visible_with_own(prompt, reference.block_table(prompt, prompt.batch, rule)))


def test_dilated_has_half_the_density_of_its_window():
    prompt = sp.Prompt(8192)
    q = torch.zeros(1, 1, 8192, 1)
    keep = sp.get_strategy("dilated", sink=0).keep(q, q, prompt)
    assert keep.sum() == sum(i // 2 + 1 for i in range(64))


# random ---------------------------------------------------------------------------------------------------


def mixed(x):
    for _ in range(2):
        x = (x ^ x >> 16) * 0x45D9F3B % 2**32
    return x ^ x >> 16


@every_prompt
@pytest.mark.parametrize(("density", "seed"), [(0.25, 0), (0.6, 2**40 + 7), (1.0, 3)])
def test_random_depends_only_on_the_seed_and_the_indices_of_both_blocks(sizes, density, seed):
    q, k, prompt = inputs(**sizes)
    keep = sp.get_strategy("random", block_size=16, density=density, seed=seed).keep(q, k, prompt)

    def rule(b, rows, keys):
        first = reference.padding_of(prompt, b) // 16
        row, column = (rows.start + prompt.offset) // 16 - first, keys.start // 16 - first
        if row < 0 or column < 0:
            return False
        number = mixed(mixed(mixed(seed % 2**32) ^ row) ^ column)
        return number // 256 / 2**24 >= 1 - density

    assert torch.equal(keep, visible_with_own(prompt, reference.block_table(prompt, prompt.batch, rule)))


@pytest.mark.parametrize("density", [0.05, 0.25, 0.7])
@pytest.mark.parametrize("seed", [0, 1, 2, 12345])
def test_random_keeps_its_density_overall_and_in_each_row_and_column(density, seed):
    prompt = sp.Prompt(16 * 512, block_size=16)
    q = torch.zeros(1, 1, 16 * 512, 1)
    strategy = sp.get_strategy("random", block_size=16, density=density, seed=seed)
    selected = strategy.select(strategy.score(q, q, prompt), prompt).float()  # causality and own blocks aside

    def deviation(count):
        return 4.5 * math.sqrt(density * (1 - density) / count)  # 4.5 standard deviations of a binomial mean

    assert abs(selected.mean() - density) < deviation(512 * 512)
    for dim in (-1, -2):
        assert (selected.mean(dim) - density).abs().max() < deviation(512)
    # Neighbours are independent: the probability of keeping both is density squared.
    for pair in (selected[..., 1:] * selected[..., :-1], selected[..., 1:, :] * selected[..., :-1, :]):
        assert abs(pair.mean() - density**2) < 4.5 * density / math.sqrt(pair.numel())


@given(low=st.floats(0.01, 1), high=st.floats(0.01, 1), seed=st.integers(0, 99))
def test_a_higher_density_keeps_a_superset_and_another_seed_keeps_other_blocks(low, high, seed):
    q, k, prompt = inputs(q_len=300)

    def keep(density, seed):
        return sp.get_strategy("random", block_size=16, density=density, seed=seed).keep(q, k, prompt)

    low, high = sorted((low, high))
    assert not (keep(low, seed) & ~keep(high, seed)).any()
    assert torch.equal(keep(1.0, seed), prompt.visible())
    assert not torch.equal(keep(0.5, seed), keep(0.5, seed + 1))


# last_query -----------------------------------------------------------------------------------------------


@one_document
@pytest.mark.parametrize("options", [{"share": 0.9}, {"share": 0.5, "queries": 5}, {"budget": 40}], ids=str)
def test_last_query_keeps_the_columns_that_hold_the_attention_of_the_last_queries(sizes, options):
    q, k, prompt = inputs(**sizes)
    keep = sp.get_strategy("last_query", block_size=16, **options).keep(q, k, prompt)
    last = list(range(max(0, prompt.q_len - options.get("queries", 64)), prompt.q_len))
    p = reference.probabilities(q[:, :, last], k, reference.token_mask(prompt, len(q))[:, None, last]).sum(2)
    for b, h in torch.cartesian_prod(torch.arange(len(q)), torch.arange(q.shape[1])).tolist():
        mass = [p[b, h, list(reference.key_block(prompt, j))].sum().item() for j in range(prompt.n_k)]
        count = math.ceil(options["budget"] / 16) if "budget" in options else reference.fewest(mass, options["share"])
        table = torch.zeros(len(q), 1, prompt.n_q, prompt.n_k, dtype=torch.bool)
        if sum(mass) > 0:
            table[..., list(reference.largest(mass, count))] = True
        assert torch.equal(keep[b, h], visible_with_own(prompt, table)[b, 0])


def test_last_query_skips_blocks_of_these_inputs():
    q, k, prompt = inputs(q_len=300)
    for options in ({}, {"budget": 40}):
        keep = sp.get_strategy("last_query", block_size=16, **options).keep(q, k, prompt)
        assert (prompt.visible() & ~keep).any((2, 3)).all()


# Options --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("local", {"local": -1}),
        ("dilated", {"dilation": 0}),
        ("dilated", {"window": 0}),
        ("dilated", {"window": 1.5}),
        ("random", {"density": 0}),
        ("random", {"density": True}),
        ("random", {"seed": -1}),
        ("random", {"seed": 0.5}),
        ("last_query", {"share": 0}),
        ("last_query", {"queries": 0}),
        ("last_query", {"budget": 0}),
    ],
)
def test_options_out_of_range_are_refused(name, options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
        sp.get_strategy(name, **options)
