"""Tables are computed once for each prompt, device and set of options."""

import pickle
from dataclasses import replace

import torch

import sparse_prefill as sp
from sparse_prefill.core.prompt_cache import CacheKey, PromptCache, cached

CPU, META = torch.device("cpu"), torch.device("meta")


def test_a_value_is_made_once_for_each_name_device_and_set_of_options():
    cache, made = PromptCache(), []

    def value(key):
        return cache.get(key, lambda: made.append(key) or len(made))

    keys = [CacheKey("a", CPU), CacheKey("b", CPU), CacheKey("a", META), CacheKey("a", CPU, (1,))]
    assert [value(key) for key in [*keys, *keys]] == [1, 2, 3, 4] * 2
    assert made == keys
    assert len(cache) == 4


def test_a_value_that_is_put_replaces_an_earlier_one():
    cache, key = PromptCache(), CacheKey("table", CPU)
    assert cache.find(key) is None
    for value in (1, 2):
        cache.put(key, value)
        assert cache.find(key) == value


def test_a_cached_function_runs_once_for_each_device_and_set_of_options():
    calls = []

    @cached
    def zeros(prompt, device, count, width=1):
        calls.append((device, count, width))
        return torch.zeros(count, width, device=device)

    prompt = sp.Prompt(20, block_size=16)
    first = zeros(prompt, "cpu", 3)
    assert zeros(prompt, CPU, 3) is first
    assert zeros(prompt, "meta", 3).device == META
    assert zeros(prompt, "cpu", 3, width=2).shape == (3, 2)
    assert calls == [(CPU, 3, 1), (META, 3, 1), (CPU, 3, 2)]
    zeros(sp.Prompt(20, block_size=16), "cpu", 3)
    assert len(calls) == 4, "another prompt has another cache"


def test_layers_share_the_cache_of_a_prompt_and_changed_prompts_do_not():
    prompt = sp.Prompt(100, block_size=16)
    assert prompt.with_state(sp.KeyState()).cache is prompt.cache
    assert replace(prompt, window=20).cache is not prompt.cache
    assert prompt.on_grid(32) is prompt.on_grid(32)
    assert prompt.on_grid(32).cache is not prompt.cache
    assert prompt.split_sequences() is prompt.split_sequences()


def test_a_state_is_set_on_a_copy():
    prompt, state = sp.Prompt(100, block_size=16), sp.KeyState()
    bound = prompt.with_state(state)
    assert (bound.state, prompt.state) == (state, None)
    assert bound.with_state(state) is bound


def test_a_prompt_is_pickled_with_its_tables():
    prompt = sp.Prompt(100, block_size=16, left_padding=[3, 0])
    table = prompt.guards(10, 20, 5)
    loaded = pickle.loads(pickle.dumps(prompt))
    assert len(loaded.cache) == len(prompt.cache)
    assert torch.equal(loaded.guards(10, 20, 5), table)
