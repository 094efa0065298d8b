"""Divergence and perplexity against sums by hand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparse_prefill import evaluation


@given(st.integers(0, 1000))
def test_divergence_is_the_expected_difference_of_log_probabilities(seed):
    generator = torch.Generator().manual_seed(seed)
    dense, sparse = (torch.randn(2, 3, 7, generator=generator).double().log_softmax(-1) for _ in range(2))
    found = evaluation.kl_divergence(dense, sparse)
    for i in range(2):
        for j in range(3):
            pairs = zip(dense[i, j].tolist(), sparse[i, j].tolist(), strict=True)
            assert float(found[i, j]) == pytest.approx(sum(math.exp(a) * (a - b) for a, b in pairs))


def test_divergence_of_impossible_tokens():
    likely, sure = torch.tensor([0.5, 0.5]).log(), torch.tensor([1.0, 0.0]).log()
    assert float(evaluation.kl_divergence(sure, sure)) == 0
    assert float(evaluation.kl_divergence(sure, likely)) == pytest.approx(math.log(2))
    assert float(evaluation.kl_divergence(likely, sure)) == math.inf


@given(st.integers(0, 1000), st.integers(1, 50), st.sampled_from([0.25, 0.5, 1.0]))
def test_perplexity_ratio_counts_only_the_last_tokens(seed, tokens, last):
    generator = torch.Generator().manual_seed(seed)
    dense, sparse = torch.rand(2, 2, tokens, generator=generator)
    count = math.ceil(last * tokens)

    def perplexity(nll):
        values = [x for row in nll.tolist() for x in row[-count:]]
        return math.exp(sum(values) / len(values))

    expected = perplexity(sparse) / perplexity(dense)
    assert evaluation.perplexity_ratio(dense, sparse, last) == pytest.approx(expected)


def test_predictions_that_cannot_be_compared_are_refused():
    a, b = torch.zeros(1, 4), torch.zeros(1, 5)
    for measure in (evaluation.kl_divergence, evaluation.perplexity_ratio):
        with pytest.raises(ValueError, match="predictions of the same tokens"):
            measure(a, b)
    with pytest.raises(ValueError, match="at least one token"):
        evaluation.perplexity_ratio(a[:, :0], a[:, :0])
    for last in (0, 1.5):
        with pytest.raises(ValueError, match=r"last must lie in \(0, 1\]"):
            evaluation.perplexity_ratio(a, a, last)


def test_a_ratio_of_losses_is_infinite_on_overflow_and_refused_if_undefined():
    ones = torch.ones(2)
    for loss in (1e6, math.inf):
        assert evaluation.perplexity_ratio(ones, torch.tensor([1.0, loss])) == math.inf
    for dense, sparse in ((ones, ones * math.nan), (ones * math.inf, ones * math.inf)):
        with pytest.raises(ValueError, match="is NaN, or infinite in both"):
            evaluation.perplexity_ratio(dense, sparse)
