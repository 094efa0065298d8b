"""Likelihoods inside one sparse prefill, compared with torchtune's."""

from __future__ import annotations

import torch
import torch.nn.functional as F

import sparse_prefill as sp
from sparse_prefill.models.torchtune import (
    generate,
    score,
    sparsify,
)
from tests.models.torchtune.small_decoders import DENSE, HALF, LENGTH, TOKENS, build


def test_a_left_padded_row_is_scored_as_its_unpadded_prompt():
    model = sparsify(build(), HALF)
    batch = torch.cat([TOKENS, F.pad(TOKENS[:, 53:], (53, 0))])
    answer = torch.tensor([[5, 6, 7]])
    together = score(model, batch, answer.expand(2, -1), left_padding=torch.tensor([0, 53]))
    for row, prompt in enumerate((TOKENS, TOKENS[:, 53:])):
        torch.testing.assert_close(together.nll[row], score(model, prompt, answer).nll[0], atol=1e-5, rtol=1e-4)


def test_a_dense_score_is_the_likelihood_under_torchtune():
    model = build()
    prompt, answer = TOKENS[:, :-6], TOKENS[:, -6:]
    with torch.no_grad():
        expected = F.cross_entropy(model(TOKENS)[:, -7:-1].transpose(1, 2), answer, reduction="none")
    found = score(sparsify(model, DENSE), prompt, answer)
    torch.testing.assert_close(found.nll, expected, atol=1e-4, rtol=1e-4)
    assert found.exact.tolist() == [False]


def test_an_answer_is_scored_inside_one_sparse_prefill():
    model = sparsify(build(), DENSE)
    greedy = generate(model, TOKENS, max_new_tokens=4).tokens
    assert score(model, TOKENS, greedy).exact.tolist() == [True]

    prompt, answer = TOKENS[:, :-6], TOKENS[:, -6:]
    dense = score(model, prompt, answer)
    diagonal = sparsify(model, sp.get_strategy("a_shape", sink=0, local=0, block_size=16, min_length=0))
    with sp.record() as calls:
        found = score(diagonal, prompt, answer)
    assert [(call.q_len, call.dense) for call in calls] == [(LENGTH - 1, None)] * 2
    assert (found.nll - dense.nll).abs().max() > 0.05
