"""Former public names work for one more version, and say their new name."""

import pytest
import torch

import sparse_prefill as sp
from sparse_prefill import tasks
from sparse_prefill.models import subject


def test_former_methods_of_a_prompt_warn_and_do_the_same():
    prompt = sp.Prompt(300, block_size=16, left_padding=[3, 0])
    with pytest.warns(FutureWarning, match=r"Prompt.pieces is now called split_sequences"):
        assert len(prompt.pieces()) == len(prompt.split_sequences()) == 2
    for old, new in (("near", "local_blocks"), ("first", "sink_blocks"), ("last", "tail_blocks")):
        with pytest.warns(FutureWarning, match=new) as warned:
            assert torch.equal(getattr(prompt, old)(40), getattr(prompt, new)(40))
        assert warned[0].filename == __file__, "the warning points at the call"


def test_values_that_layers_share_are_still_found_under_their_former_name():
    prompt = sp.Prompt(300, block_size=16)
    with pytest.warns(FutureWarning, match=r"Prompt.shared is now called Prompt.cache") as warned:
        prompt.shared["mine"] = 1
    assert warned[0].filename == __file__
    with pytest.warns(FutureWarning):
        assert prompt.with_state(sp.KeyState()).shared == {"mine": 1}


def test_former_attributes_of_a_strategy_count():
    with pytest.warns(FutureWarning, match="heads_apart is now called head_independent"):

        class Mine(sp.Strategy):
            heads_apart = True

    assert Mine().for_heads(slice(0, 2), slice(0, 1)) is not None


def test_former_classes_are_the_same():
    assert (tasks.Draft, tasks.Draw) == (tasks.PromptTemplate, tasks.TaskSampler)
    assert subject.Subject is subject.EvalModel
