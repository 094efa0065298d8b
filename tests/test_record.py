"""record: one entry per call, with density, stage times and the reason of dense runs."""

import pytest
import reference
import torch

import sparse_prefill as sp

A_SHAPE = sp.get_strategy("a_shape", block_size=16, sink=16, local=32, min_length=0)
ORACLE = sp.get_strategy("oracle", block_size=16, share=0.5, min_length=0)


@pytest.mark.parametrize("strategy", [A_SHAPE, ORACLE], ids=["one table for all heads", "a table for each head"])
def test_density_is_the_kept_share_of_visible_blocks(strategy):
    q, k, v = reference.random_qkv(batch=2, q_len=150, scale=4)
    prompt = sp.Prompt(q_len=150, block_size=16, left_padding=[37, 0])
    with sp.record() as calls:
        sp.sparse_attention(q, k, v, strategy, prompt=prompt)
    assert len(calls) == 2  # one for each prompt
    for b, (call, tokens) in enumerate(zip(calls, (113, 150), strict=True)):
        single = sp.Prompt(tokens, block_size=16)
        keep = strategy.keep(q[b : b + 1, :, -tokens:], k[b : b + 1, :, -tokens:]).expand(1, 6, -1, -1)
        assert (call.strategy, call.q_len, call.kv_len, call.dense) == (strategy.name, tokens, tokens, None)
        assert call.density.dtype == torch.float32
        torch.testing.assert_close(call.density, keep.sum((-2, -1)) / reference.visible(single).sum((-2, -1)))
        assert (call.density < 1).all()


def test_stages_of_a_sparse_call_are_timed_separately():
    q, k, v = reference.random_qkv(q_len=100)
    with sp.record() as calls:
        sp.sparse_attention(q, k, v, A_SHAPE)
        sp.sparse_attention(q, k, v, A_SHAPE)
    for call in calls:
        assert call.seconds.keys() == {"estimate", "select", "table", "kernel"}
        assert all(0 <= seconds < 60 for seconds in call.seconds.values())
    assert calls[0].seconds is not calls[1].seconds


@pytest.mark.parametrize(
    ("reason", "q_len", "kv_len", "strategy"),
    [
        ("decode", 1, 333, A_SHAPE),
        ("min_length", 100, 127, sp.get_strategy("a_shape", block_size=16)),
        ("min_length", 333, 333, sp.get_strategy("oracle", block_size=16, min_length=334)),
        ("decode", 9, 333, A_SHAPE),
        ("one block", 16, 16, A_SHAPE),
        ("strategy", 333, 333, sp.get_strategy("dense")),
        ("strategy", 41, 205, sp.get_strategy("dense", block_size=16)),
    ],
)
def test_dense_calls_record_the_reason(reason, q_len, kv_len, strategy):
    q, k, v = reference.random_qkv(q_len=q_len, kv_len=kv_len)
    with sp.record() as calls:
        sp.sparse_attention(q, k, v, strategy)
    (call,) = calls
    assert (call.dense, call.q_len, call.kv_len) == (reason, q_len, kv_len)
    assert call.density.unique().tolist() == [1]
    assert call.seconds.keys() == {"kernel"}


def test_the_first_chunks_of_a_long_prompt_run_sparse():
    q, k, v = reference.random_qkv(q_len=100)
    strategy = sp.get_strategy("a_shape", block_size=16, min_length=256)
    with sp.record() as calls:
        sp.sparse_attention(q, k, v, strategy, prompt=sp.Prompt(100, block_size=16))
        sp.sparse_attention(q, k, v, strategy, prompt=sp.Prompt(100, block_size=16, total_len=255))
        sp.sparse_attention(q, k, v, strategy, prompt=sp.Prompt(100, block_size=16, total_len=256))
    assert [call.dense for call in calls] == ["min_length", "min_length", None]


def test_a_prompt_runs_sparse_from_the_crossover_of_its_strategy(monkeypatch):
    strategy = sp.get_strategy("a_shape", block_size=16, sink=16, local=16)
    monkeypatch.setattr(type(strategy), "crossover", 200)
    with sp.record() as calls:
        for tokens in (199, 200):
            sp.sparse_attention(*reference.random_qkv(q_len=tokens), strategy)
    assert [call.dense for call in calls] == ["min_length", None]


def test_inspect_gets_scored_tensors_and_the_keep_table():
    q, k, v = reference.random_qkv(q_len=200)
    seen = []
    with sp.record(lambda *arguments: seen.append(arguments)) as calls:
        sp.sparse_attention(q, k, v, ORACLE)
        sp.sparse_attention(q[:, :, -1:], k, v, ORACLE)  # dense calls have no table
    ((call, tensors, prompt),) = seen
    assert call is calls[0]
    assert torch.equal(tensors.q, q)
    assert torch.equal(tensors.k, k)
    assert torch.equal(tensors.v, v)
    assert torch.equal(tensors.out, sp.sparse_attention(q, k, v, ORACLE))
    assert torch.equal(tensors.keep, ORACLE.keep(q, k))
    assert (prompt.q_len, prompt.block_size) == (200, 16)


def test_inspect_gets_queries_multiplied_by_the_scale():
    q, k, v = reference.random_qkv(q_len=200)
    seen = []
    with sp.record(lambda call, tensors, prompt: seen.append((tensors.q, tensors.keep))):
        sp.sparse_attention(q, k, v, ORACLE, scale=1.25)
    torch.testing.assert_close(seen[0][0], q * 5)
    assert torch.equal(seen[0][1], ORACLE.keep(q * 5, k))


def test_nothing_is_recorded_outside_of_the_with_block():
    q, k, v = reference.random_qkv(q_len=100)
    sp.sparse_attention(q, k, v, A_SHAPE)
    with sp.record() as calls:
        pass
    sp.sparse_attention(q, k, v, A_SHAPE)
    assert calls == []


def test_recording_does_not_change_the_output():
    q, k, v = reference.random_qkv(q_len=200, scale=4)
    want = sp.sparse_attention(q, k, v, ORACLE)
    with sp.record():
        assert torch.equal(sp.sparse_attention(q, k, v, ORACLE), want)


def test_the_outer_recorder_continues_after_an_inner_one_and_after_an_exception():
    q, k, v = reference.random_qkv(q_len=100)

    def fail(*arguments):
        raise RuntimeError("stop")

    with sp.record() as outer:
        with sp.record() as inner:
            sp.sparse_attention(q, k, v, A_SHAPE)
        with pytest.raises(RuntimeError, match="stop"), sp.record(fail) as failed:
            sp.sparse_attention(q, k, v, A_SHAPE)
        sp.sparse_attention(q, k, v, ORACLE)
    assert [call.strategy for call in inner] == ["a_shape"]
    assert [call.strategy for call in failed] == ["a_shape"]
    assert [call.strategy for call in outer] == ["oracle"]


def test_a_failed_call_adds_no_entry():
    q, k, v = reference.random_qkv(q_len=100)
    with sp.record() as calls:
        with pytest.raises(ValueError, match="block_size"):
            sp.sparse_attention(q, k, v, A_SHAPE, prompt=sp.Prompt(q_len=100))
        sp.sparse_attention(q, k, v, A_SHAPE)
    assert len(calls) == 1


def test_a_row_of_padding_adds_no_entry():
    q, k, v = reference.random_qkv(batch=2, q_len=150)
    prompt = sp.Prompt(q_len=150, block_size=16, left_padding=[150, 0])
    with sp.record() as calls:
        sp.sparse_attention(q, k, v, A_SHAPE, prompt=prompt)
    assert [call.density.shape[0] for call in calls] == [1]


def test_seconds_of_a_directly_called_strategy_are_not_recorded():
    q, k, v = reference.random_qkv(q_len=200)
    with sp.record() as calls:
        ORACLE.keep(q, k)
        sp.sparse_attention(q, k, v, sp.get_strategy("dense"))
    assert calls[0].seconds.keys() == {"kernel"}


def test_density_counts_the_blocks_of_segments():
    q, k, v = reference.random_qkv(1, 4, 2, 4096, dim=64)
    inner = sp.get_strategy("a_shape", sink=16, local=16, block_size=16, min_length=0)
    strategy = sp.get_strategy("mean_correction", of=inner)
    prompt = sp.Prompt(4096, block_size=16)
    with sp.record() as calls:
        sp.sparse_attention(q, k, v, strategy, prompt=prompt)
        sp.sparse_attention(q, k, v, inner, prompt=prompt)
    keep, visible = inner.keep(q, k, prompt), prompt.visible()
    skipped = prompt.fully_visible() & ~keep  # one slot each; 16 slots form a block
    slots = torch.nn.functional.pad(skipped, (0, -skipped.shape[-1] % 16)).unflatten(-1, (-1, 16)).any(-1)
    assert calls[1].density.mean() == pytest.approx(float(keep.sum() / visible.sum()), rel=1e-5)
    assert calls[0].density.mean() == pytest.approx(float((keep.sum() + slots.sum()) / visible.sum()), rel=1e-5)


def test_density_counts_the_dense_rows_of_delta():
    q, k, v = reference.random_qkv(1, 4, 2, 4096, dim=64)
    inner = sp.get_strategy("a_shape", sink=64, local=64, block_size=64, min_length=0)
    with sp.record() as calls:
        sp.sparse_attention(q, k, v, sp.get_strategy("delta", of=inner), prompt=sp.Prompt(4096, block_size=64))
    keep = inner.keep(q, k, sp.Prompt(4096, block_size=64))
    rows = [*range(0, 4096 - 128, 64), *range(4096 - 128, 4096)]
    want = float(keep.sum()) + sum(row + 1 for row in rows) / 64**2
    assert calls[0].density.mean() == pytest.approx(want / (64 * 65 / 2), rel=1e-5)
