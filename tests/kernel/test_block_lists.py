"""Keep tables become block lists: complete, disjoint, ascending, narrow."""

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import sparse_prefill as sp
from sparse_prefill.kernel import block_lists
from sparse_prefill.kernel.block_lists import block_tables, to_block_mask


def random_keep(prompt, heads, density, seed=0):
    """Visible blocks, each kept with probability ``density``, and the diagonal block of every row."""
    source = torch.Generator().manual_seed(seed)
    chosen = torch.rand(prompt.batch, heads, prompt.n_q, prompt.n_k, generator=source) < density
    return (chosen | prompt.diagonal()) & prompt.visible()


def listed(counts, indices, n_k):
    """Block lists as a table. Also checks the rules of every list."""
    assert counts.dtype == indices.dtype == torch.int32
    assert counts.shape == indices.shape[:-1]
    table = torch.zeros(*counts.shape, n_k, dtype=torch.bool)
    for place in torch.cartesian_prod(*map(torch.arange, counts.shape)).tolist():
        row = indices[tuple(place)][: counts[tuple(place)]].tolist()
        assert row == sorted(set(row)), "ascending, each block once"
        assert all(0 <= block < n_k for block in row)
        table[(*place, row)] = True
    return table


def memory(tables):
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tables}.values())


PROMPTS = [
    sp.Prompt(200, block_size=16),
    sp.Prompt(208, block_size=16),
    sp.Prompt(41, 205, block_size=16),
    sp.Prompt(150, block_size=16, left_padding=[37, 0, 150]),
    sp.Prompt(150, block_size=32, documents=[0] * 70 + [1] * 5 + [2] * 75),
    sp.Prompt(1, block_size=16),
    sp.Prompt(17, block_size=16),
]
PROMPT_IDS = ["ragged", "whole blocks", "chunk", "padding", "documents", "one token", "one token more than a block"]


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("prompt", PROMPTS, ids=PROMPT_IDS)
@given(density=st.sampled_from([0.0, 0.3, 1.0]), seed=st.integers(0, 99))
def test_lists_hold_each_kept_block_once_and_partial_where_the_mask_is_needed(prompt, heads, density, seed):
    keep = random_keep(prompt, heads, density, seed)
    tables = block_tables(keep, prompt)
    partial = listed(tables.partial_counts, tables.partial_indices, prompt.n_k)
    full = listed(tables.full_counts, tables.full_indices, prompt.n_k)
    whole = reference.fully_visible(prompt, prompt.batch)
    assert partial.shape == full.shape == keep.shape, "both lists have the same rows and heads"
    assert torch.equal(full, keep & whole)
    assert torch.equal(partial, keep & ~whole)
    assert not (partial & full).any()


@pytest.mark.parametrize("tokens", [127, 129, 200])
def test_ragged_last_blocks_are_partial(tokens):
    prompt = sp.Prompt(q_len=tokens, block_size=16)
    tables = block_tables(prompt.visible(), prompt)
    full = listed(tables.full_counts, tables.full_indices, prompt.n_k)
    assert not full[..., -1].any()
    assert listed(tables.partial_counts, tables.partial_indices, prompt.n_k)[..., -1, -1].all()


@pytest.mark.parametrize("prompt", PROMPTS, ids=PROMPT_IDS)
def test_full_lists_are_as_wide_as_the_longest_row(prompt):
    tables = block_tables(random_keep(prompt, 3, 0.2), prompt)
    assert tables.full_indices.shape[-1] <= max(2, tables.full_counts.max().item())


def test_lists_of_128k_tokens_and_32_heads_at_ten_percent_take_under_32_mb():
    prompt = sp.Prompt(q_len=131072)
    tables = block_tables(random_keep(prompt, 32, 0.1), prompt)
    assert (tables.partial_counts + tables.full_counts).sum() > 0.1 * 32 * 1024 * 1025 / 2
    assert memory(tables) < 32 * 2**20


@pytest.mark.parametrize("prompt", PROMPTS, ids=PROMPT_IDS)
@given(density=st.sampled_from([0.0, 0.3, 1.0]), seed=st.integers(0, 99))
def test_lists_made_without_reading_back_are_the_same_and_their_width_depends_only_on_the_length(prompt, density, seed):
    keep = random_keep(prompt, 3, density, seed)
    want, width = block_tables(keep, prompt), (prompt.n_k // 16 + 1) * 16
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block_lists, "SCRATCH_ENTRIES", 5 * width)  # a few rows at once
        patch.setattr(block_lists, "_as_wide_as_needed", block_lists._as_wide_as_possible)
        tables = block_tables(keep, prompt)
    assert tables.full_indices.shape[-1] == width
    full = (listed(x.full_counts, x.full_indices, prompt.n_k) for x in (tables, want))
    assert torch.equal(*full)


@pytest.mark.parametrize(
    ("version", "q_len", "equal"), [("2.11.0", 300, True), ("2.14.1", 300, False), ("2.14.1", 127, True)]
)
def test_lists_are_equally_wide_where_a_gpu_reads_both_with_the_strides_of_one(version, q_len, equal, monkeypatch):
    monkeypatch.setattr(torch, "__version__", version)
    prompt = sp.Prompt(q_len, 3000, block_size=16)
    tables = block_tables(torch.empty(1, 2, prompt.n_q, prompt.n_k, dtype=torch.bool, device="meta"), prompt)
    assert (tables.partial_indices.shape == tables.full_indices.shape) is equal


def test_an_empty_row_has_counts_of_zero():
    prompt = sp.Prompt(q_len=64, block_size=16)
    tables = block_tables(torch.zeros(1, 1, 4, 4, dtype=torch.bool), prompt)
    assert tables.partial_counts.tolist() == tables.full_counts.tolist() == [[[0, 0, 0, 0]]]


def test_block_mask_carries_lengths_block_size_and_the_token_rule():
    prompt = sp.Prompt(41, 205, block_size=16)
    mask = to_block_mask(random_keep(prompt, 3, 0.2), prompt)
    assert mask.seq_lengths == (41, 205)
    assert mask.BLOCK_SIZE == (16, 16)
    assert mask.q_indices is None, "there is no backward pass, so it needs no lists"
    i, j = torch.tensor(0), torch.arange(205)
    assert mask.mask_mod(torch.tensor(0), torch.tensor(0), i, j).tolist() == [key <= 164 for key in range(205)]


class _Largest(TorchDispatchMode):
    """Records the number of entries of the largest tensor that is made."""

    def __init__(self):
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.entries = max(self.entries, x.numel())
        return out


@pytest.mark.parametrize("name", sp.list_strategies())
def test_no_strategy_makes_a_table_of_tokens_by_tokens_nor_calls_create_block_mask(name, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("create_block_mask evaluates every token pair")

    monkeypatch.setattr(torch.nn.attention.flex_attention, "create_block_mask", refuse)
    q, k, _ = reference.random_qkv(heads=2, kv_heads=1, q_len=4096, scale=4)
    strategy = sp.get_strategy(name, block_size=16)
    with _Largest() as largest:
        mask = strategy.block_mask(q, k)
    assert mask.seq_lengths == (4096, 4096)
    assert 0 < largest.entries < 4096 * 4096 / 8
