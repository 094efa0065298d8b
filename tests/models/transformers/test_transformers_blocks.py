"""``with sparse(...)`` blocks restore the model and may overlap, and copies made inside stay sparse."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface

import sparse_prefill as sp
from sparse_prefill.models.transformers import sparse
from tests.models.transformers.small_models import (
    BLOCK,
    EVERYTHING,
    HALF,
    SHAPE,
    assert_untouched,
    build,
    generate,
    logits,
)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_model_is_restored_after_an_exception_inside_generate(implementation):
    model = build(attention=implementation)
    config, keys, kind, before = model.config, list(model.state_dict()), type(model), logits(model)

    class Broken(sp.Strategy):
        def score(self, q, k, prompt):
            raise KeyError("nothing here")

    plan = sp.Plan(default=SHAPE, layers={1: Broken(block_size=BLOCK, min_length=0)})
    with pytest.raises(RuntimeError, match=r"In layer 1 \(Broken\): 'nothing here'") as caught, sparse(model, plan):
        generate(model)
    assert isinstance(caught.value.__cause__, KeyError)
    assert_untouched(model, implementation, config, keys)
    assert type(model) is kind
    assert torch.equal(logits(model), before)


def test_blocks_nest_and_the_inner_one_applies():
    model = build()
    config, keys = model.config, list(model.state_dict())
    with sparse(model, HALF) as outer:
        outer_logits = logits(model)
        with sparse(model, EVERYTHING) as inner:
            logits(model)
        assert torch.equal(logits(model), outer_logits)
    assert [len(layer.calls) for layer in outer.layers.values()] == [2, 2]
    assert inner.density == 1
    assert_untouched(model, "eager", config, keys)


def test_models_that_share_a_config_have_separate_bindings():
    one = build()
    other = type(one)(one.config).eval()
    assert other.config is one.config
    eager = logits(other)
    with sparse(one, HALF) as stats:
        assert torch.equal(logits(other), eager)
        with sparse(other, EVERYTHING) as others:
            torch.testing.assert_close(logits(other), eager, atol=2e-3, rtol=1e-3)
            logits(one)
    assert stats.density < others.density == 1


def test_threads_can_run_separate_models():
    models = [build("Qwen3") for _ in range(2)]
    strategies = [HALF, SHAPE]

    def run(model, strategy) -> tuple[torch.Tensor, float]:
        with sparse(model, strategy) as stats:
            generated = [generate(model) for _ in range(3)]
        assert all(torch.equal(one, generated[0]) for one in generated)
        return generated[0], stats.density

    separate = [run(model, strategy) for model, strategy in zip(models, strategies, strict=True)]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(run, models, strategies))
    for (tokens, density), (expected, expected_density) in zip(together, separate, strict=True):
        assert torch.equal(tokens, expected)
        assert density == expected_density
    assert separate[0][1] != separate[1][1]


def test_blocks_may_close_in_the_order_in_which_they_opened():
    model = build()
    config, keys, eager = model.config, list(model.state_dict()), logits(model)
    one, two = sparse(model, HALF), sparse(model, SHAPE)
    one.__enter__()
    two.__enter__()
    shape = logits(model)
    one.__exit__(None, None, None)
    assert torch.equal(logits(model), shape)
    two.__exit__(None, None, None)
    assert_untouched(model, "eager", config, keys)
    assert torch.equal(logits(model), eager)


def test_a_block_of_another_thread_on_the_same_model_is_refused():
    model = build()
    config, keys = model.config, list(model.state_dict())

    def enter() -> None:
        with sparse(model, SHAPE):
            pass

    with sparse(model, HALF), ThreadPoolExecutor(1) as pool:
        expected = logits(model)
        with pytest.raises(ValueError, match="Another thread has this model"):
            pool.submit(enter).result()
        assert torch.equal(pool.submit(logits, model).result(), expected)
    assert_untouched(model, "eager", config, keys)
    enter()


@pytest.mark.parametrize(
    "way",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), "saved"],
    ids=["deepcopy", "pickle", "saved"],
)
def test_a_copy_made_inside_a_block_stays_sparse(way, tmp_path, monkeypatch):
    for registry in (AttentionInterface, AttentionMaskInterface):
        monkeypatch.setattr(registry, "_global_mapping", dict(registry._global_mapping))
    model = build()
    config, keys = model.config, list(model.state_dict())
    with sparse(model, HALF):
        expected = logits(model)
        if way == "saved":
            torch.save(model, tmp_path / "model")
            for registry in (AttentionInterface, AttentionMaskInterface):  # as in another process
                registry._global_mapping.pop("sparse_prefill")
            other = torch.load(tmp_path / "model", weights_only=False)
        else:
            other = way(model)
    assert_untouched(model, "eager", config, keys)
    assert torch.equal(logits(other), expected)
    other.set_attn_implementation("eager")
    assert torch.equal(logits(other), logits(model))
    assert_untouched(other, "eager", other.config, keys)
