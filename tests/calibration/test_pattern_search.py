"""MInference's search on heads whose pattern is known."""

from __future__ import annotations

from dataclasses import replace

import pytest
import reference
import torch

import sparse_prefill as sp
from sparse_prefill import evaluation
from sparse_prefill.calibration.pattern_search import SHAPES, output_errors, search_patterns
from sparse_prefill.models.eval_model import LayerInputs
from sparse_prefill.strategies.minference import HeadPattern, load_patterns, save_patterns
from tests.calibration.replay import Replay

N, SIZE = 512, 16
MINF = sp.get_strategy("minference", block_size=SIZE, min_length=0, sink=1, local=1)
SHAPE = {
    "stream": HeadPattern("stream_llm", 16, 256),
    "columns": HeadPattern("vertical_and_slash", 256, 1),
    "diagonals": HeadPattern("vertical_and_slash", 1, 256),
    "blocks": HeadPattern("block_sparse", 4, 0),
}


def heads() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k [1, 4, N, N] and v: a head for each shape, with sharp attention in known places."""
    generator = torch.Generator().manual_seed(0)
    position = torch.arange(N)
    back = position[:, None] - position
    wanted = (back == 0).expand(4, -1, -1).clone()  # each token attends to at least itself
    near = (back >= 0) & (back < 80)
    wanted[0] |= near & (position % SIZE == 0)  # a window that the last queries don't show
    wanted[0, -64:] = ((back >= 160) & (back < 240))[-64:]
    wanted[1][:, SIZE * torch.randperm(N // SIZE, generator=generator)[:8]] = True  # single columns
    for distance in (200, 232, 264, 296):  # far diagonals, each of which crosses two blocks of a row
        wanted[2] |= back == distance
    blocks = torch.rand(N // SIZE, N // SIZE, generator=generator) < 0.08
    wanted[3] |= blocks.repeat_interleave(SIZE, 0).repeat_interleave(SIZE, 1)
    logits = 10.0 * wanted
    logits[0, :-64] -= 5.0 * (near & ~wanted[0])[:-64]  # the mean of its blocks doesn't show it either
    q = N**0.5 * logits  # for one-hot keys
    k = torch.eye(N).expand(4, -1, -1)
    v = torch.randn(4, N, 16, generator=generator)
    return q[None], k[None].contiguous(), v[None]


def test_each_head_gets_the_pattern_of_its_attention(tmp_path):
    subject = Replay([heads()])
    found = search_patterns(subject, subject.ids, density=0.4, shapes=tuple(SHAPE.values()), strategy=MINF)
    types = [found[0][head].type for head in range(4)]
    assert types == ["stream_llm", "vertical_and_slash", "vertical_and_slash", "block_sparse"]
    assert found[0][1].vertical > found[0][1].slash
    assert found[0][2].vertical < found[0][2].slash
    save_patterns(tmp_path / "patterns.json", found)
    assert load_patterns(tmp_path / "patterns.json") == found
    strategy = replace(MINF, config=str(tmp_path / "patterns.json"))
    q, k, _ = subject.texts[N][0]
    keep = strategy.for_layer(sp.Layer(0, 1)).keep(q, k)
    assert evaluation.density(keep, sp.Prompt(q_len=N, block_size=SIZE)).max() <= 0.4


def test_candidates_use_the_density_of_the_target():
    q, k, v = reference.random_qkv(q_len=400, scale=3)
    subject = Replay([(q, k, v)])
    prompt = sp.Prompt(q_len=400, block_size=SIZE)
    for shape in SHAPES:
        patterns = search_patterns(subject, subject.ids, density=0.5, shapes=[shape], strategy=MINF)[0]
        fixed = sp.get_strategy("minference", heads=patterns, block_size=SIZE, min_length=0, sink=1, local=1)
        density = evaluation.density(fixed.keep(q, k, prompt), prompt)
        assert (density <= 0.5).all()
        # Sizes of block-sparse heads come in units of 64 tokens, four of these blocks.
        assert (density > (0.3 if shape.type == "block_sparse" else 0.4)).all(), shape


def test_output_errors_equal_those_of_naive_attention():
    q, k, v = reference.random_qkv(q_len=150, scale=3)
    prompt = sp.Prompt(q_len=150, block_size=SIZE)
    keeps = [torch.rand(1, 6, 10, 10) < share for share in (0.3, 0.9)]
    keeps = [(keep | prompt.diagonal()) & prompt.visible() for keep in keeps]
    found = output_errors(LayerInputs(0, MINF, q, k, v, prompt), keeps, 1000)
    dense = reference.dense_attention(q, k, v, prompt)
    for row, keep in zip(found, keeps, strict=True):
        sparse = reference.sparse_attention(q, k, v, keep, prompt)
        expected = (sparse - dense).square().sum((0, 2, 3)).sqrt() / dense.square().sum((0, 2, 3)).sqrt()
        torch.testing.assert_close(row, expected.double(), atol=1e-4, rtol=1e-4)
    assert (found[1] < found[0]).all()


def test_texts_are_searched_together_and_the_result_is_reproducible():
    texts = [[reference.random_qkv(q_len=n, seed=n + i, scale=3) for i in range(2)] for n in (400, 330)]
    subject, seen = Replay(*texts), []
    once = search_patterns(subject, subject.ids, density=0.5, strategy=MINF, on_progress=lambda *at: seen.append(at))
    assert once == search_patterns(subject, subject.ids, density=0.5, strategy=MINF)
    assert [len(layer) for layer in once] == [6, 6]
    assert seen == [(i, 8) for i in range(1, 9)]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"density": 0.01}, "The guards and the smallest stream_llm pattern compute more than density=0.01"),
        ({"density": 2}, r"density must be a number in \(0, 1\]"),
        ({"shapes": []}, "at least one candidate"),
        ({"strategy": sp.get_strategy("minference", heads={0: ["stream_llm", 1, 1]})}, "drop config and heads"),
    ],
)
def test_wrong_input_is_refused(change, match):
    subject = Replay([reference.random_qkv(q_len=150)])
    with pytest.raises(ValueError, match=match):
        search_patterns(subject, subject.ids, **{"strategy": MINF, **change})
