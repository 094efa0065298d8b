"""Former public names work for one more version, and warn with the new name."""

from functools import partial

import pytest
import torch

import sparse_prefill as sp
from sparse_prefill import registry, tasks
from sparse_prefill.models import subject
from sparse_prefill.spec import parse_strategy


def test_former_methods_of_a_prompt_warn_and_return_the_same():
    prompt = sp.Prompt(300, block_size=16, left_padding=[3, 0])
    with pytest.warns(FutureWarning, match=r"Prompt.pieces is now called split_sequences"):
        assert len(prompt.pieces()) == len(prompt.split_sequences()) == 2
    for old, new in (("near", "local_blocks"), ("first", "sink_blocks"), ("last", "tail_blocks")):
        with pytest.warns(FutureWarning, match=new) as warned:
            assert torch.equal(getattr(prompt, old)(40), getattr(prompt, new)(40))
        assert warned[0].filename == __file__, "the warning points at the call"


def test_the_former_name_of_the_cache_warns_and_works():
    prompt = sp.Prompt(300, block_size=16)
    with pytest.warns(FutureWarning, match=r"Prompt.shared is now called Prompt.cache") as warned:
        prompt.shared["mine"] = 1
    assert warned[0].filename == __file__
    with pytest.warns(FutureWarning):
        assert prompt.with_state(sp.KeyState()).shared == {"mine": 1}


def test_former_attributes_of_a_strategy_take_effect():
    with pytest.warns(FutureWarning, match="heads_apart is now called head_independent"):

        class Mine(sp.Strategy):
            heads_apart = True

    assert Mine().for_heads(slice(0, 2), slice(0, 1)) is not None


def test_former_class_names_refer_to_the_same_classes():
    assert (tasks.Draft, tasks.Draw) == (tasks.PromptTemplate, tasks.TaskSampler)
    assert subject.Subject is subject.EvalModel


def test_former_options_warn_and_set_the_new_option():
    for get, name in ((sp.get_estimator, "pooled_attention"), (sp.get_strategy, "mean_slash")):
        with pytest.warns(FutureWarning, match="The option grain is now called pool_size"):
            former = get(name, grain=32)
        assert former == get(name, pool_size=32)
        with pytest.warns(FutureWarning, match="The option grain is now called pool_size"):
            assert former.grain == 32
        with pytest.warns(FutureWarning, match="The option grain is now called pool_size"):
            assert type(former)(grain=32) == former


def test_former_options_are_read_from_specs_and_files(tmp_path):
    want = sp.get_strategy("mean_slash", pool_size=32)
    with pytest.warns(FutureWarning, match="pool_size"):
        assert parse_strategy("mean_slash:grain=32") == want
    path = tmp_path / "plan.yaml"
    sp.Plan(default=want).save(path)
    path.write_text(path.read_text().replace("pool_size", "grain"))
    with pytest.warns(FutureWarning, match="pool_size"):
        assert sp.Plan.load(path) == sp.Plan(default=want)


def test_an_option_given_by_both_names_is_refused():
    message = "grain is the former name of pool_size, and both are given: give pool_size only"
    for build in (partial(sp.get_strategy, "mean_slash"), type(sp.get_strategy("mean_slash"))):
        with pytest.raises(ValueError, match=message):
            build(grain=32, pool_size=16)


def test_former_options_are_not_listed():
    assert "grain" not in registry.strategies.options("mean_slash")
