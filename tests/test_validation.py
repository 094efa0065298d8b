"""Invalid input raises a ValueError that says what is wrong and what to do, before any computation."""

import math
from dataclasses import dataclass

import pytest
import reference
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import sparse_prefill as sp

A_SHAPE = sp.get_strategy("a_shape", block_size=16, sink=16, local=32, min_length=0)


def refuses(*words):
    """Expect a ValueError whose message contains all of these words."""
    pattern = "(?s)" + "".join(f"(?=.*{word})" for word in words)
    return pytest.raises(ValueError, match=pattern)


# Tensors ------------------------------------------------------------------------------------------------------


def tensors(q=(1, 6, 100, 16), k=(1, 2, 100, 16), v=(1, 2, 100, 16)):
    return [torch.zeros(shape) for shape in (q, k, v)]


BAD_TENSORS = {
    "q without a batch": (tensors(q=(6, 100, 16)), ["q must have 4 dimensions", r"\[6, 100, 16\]", "add the batch"]),
    "k without a batch": (tensors(k=(2, 100, 16)), ["k must have 4 dimensions"]),
    "v without a batch": (tensors(v=(2, 100, 16)), ["v must have 4 dimensions"]),
    "key heads that do not divide": (tensors(k=(1, 4, 100, 16)), ["multiple of the key heads", "6 and 4"]),
    "more key heads than query heads": (tensors(q=(1, 2, 100, 16), k=(1, 6, 100, 16)), ["multiple", "2 and 6"]),
    "value heads unlike key heads": (tensors(v=(1, 6, 100, 16)), ["k and v must agree in batch, heads and tokens"]),
    "more queries than keys": (tensors(q=(1, 6, 101, 16)), ["more tokens than k", "101 and 100", "whole prefix"]),
    "more keys than values": (tensors(v=(1, 2, 99, 16)), ["must not have more tokens than v"]),
    "more values than keys": (tensors(v=(1, 2, 101, 16)), ["k and v must agree"]),
    "two batch sizes": (tensors(q=(2, 6, 100, 16)), ["one batch size", "2 and 1"]),
    "two head_dims": (tensors(q=(1, 6, 100, 32)), ["one head_dim", "32 and 16"]),
    "no tokens": (tensors((1, 6, 0, 16), (1, 2, 0, 16), (1, 2, 0, 16)), ["q must not be empty"]),
    "no keys": (tensors(k=(1, 2, 0, 16)), ["k must not be empty"]),
    "two dtypes": ([x.to(d) for x, d in zip(tensors(), (torch.bfloat16, torch.float32, torch.float32), strict=True)],
                   ["one dtype", "bfloat16 and torch.float32", "cast"]),
    "values of another dtype": ([*tensors()[:2], tensors()[2].half()], ["q and v must have one dtype"]),
    "doubles": ([x.double() for x in tensors()], ["float32, bfloat16 or float16", "float64"]),
    "integers": ([x.long() for x in tensors()], ["float32, bfloat16 or float16", "int64"]),
    "keys on another device": ([tensors()[0], *(x.to("meta") for x in tensors()[1:])], ["one device", "cpu and meta"]),
    "values on another device": ([*tensors()[:2], tensors()[2].to("meta")], ["q and v must be on one device", "move"]),
    "no tensor": ([tensors()[0].tolist(), *tensors()[1:]], ["q must be a torch.Tensor, got list"]),
}  # fmt: skip


@pytest.mark.parametrize(("inputs", "words"), BAD_TENSORS.values(), ids=BAD_TENSORS)
def test_tensors_that_do_not_fit_each_other_are_refused(inputs, words):
    with refuses(*words):
        sp.sparse_attention(*inputs, A_SHAPE)
    prompt = sp.Prompt(q_len=100, block_size=16)
    with refuses(*words):
        sp.block_sparse_attention(*inputs, prompt.visible(), prompt=prompt)
    with refuses(*words):
        sp.dense_attention(*inputs, prompt=prompt)


@pytest.mark.parametrize("call", ["keep", "block_mask"])
@pytest.mark.parametrize(
    ("inputs", "words"),
    [(inputs, words) for inputs, words in BAD_TENSORS.values() if not any("v" in word.split() for word in words)],
    ids=[name for name, (_, words) in BAD_TENSORS.items() if not any("v" in word.split() for word in words)],
)
def test_queries_and_keys_that_do_not_fit_a_strategy_are_refused(inputs, words, call):
    with refuses(*words):
        getattr(A_SHAPE, call)(*inputs[:2])


PROMPT = sp.Prompt(100, block_size=16)
CALLS = {
    "sparse_attention": lambda q, k, v: sp.sparse_attention(q, k, v, A_SHAPE),
    "block_sparse_attention": lambda q, k, v: sp.block_sparse_attention(q, k, v, PROMPT.visible(), prompt=PROMPT),
    "dense_attention": lambda q, k, v: sp.dense_attention(q, k, v, prompt=PROMPT),
    "keep": lambda q, k, v: A_SHAPE.keep(q, k),
    "block_mask": lambda q, k, v: A_SHAPE.block_mask(q, k),
}


def in_fake_mode(call, q, k, v):
    with FakeTensorMode():
        return call(q, k, v)


def fake(call, q, k, v):
    mode = FakeTensorMode()
    return call(*map(mode.from_tensor, (q, k, v)))


def exported(call, q, k, v):
    class Model(torch.nn.Module):
        def forward(self, q, k, v):
            return call(q, k, v)

    return torch.export.export(Model(), (q, k, v))


def dual(call, q, k, v):
    with torch.no_grad(), forward_ad.dual_level():
        return call(forward_ad.make_dual(q, q), k, v)


STRANGE = {
    "meta": (lambda call, *qkv: call(*(x.to("meta") for x in qkv)), ["must have values", "meta or fake"]),
    "fake": (fake, ["must have values", "FakeTensorMode"]),
    "inside of a fake mode": (in_fake_mode, ["must have values", "FakeTensorMode"]),
    "exported": (exported, ["must have values", "torch.export"]),
    "traced": (lambda call, *qkv: torch.jit.trace(call, qkv), ["can't be traced", "without tracing"]),
    "traced by make_fx": (lambda call, *qkv: make_fx(call)(*qkv), ["can't be traced", "make_fx"]),
    "vmap": (lambda call, *qkv: torch.func.vmap(call)(*(x[None] for x in qkv)), ["no transforms", "first dimension"]),
    "jvp": (lambda call, q, k, v: torch.func.jvp(lambda x: call(x, k, v), (q,), (q,)), ["no transforms"]),
    "dual numbers": (dual, ["no transforms", "no derivatives"]),
    "nested": (lambda call, q, k, v: call(torch.nested.nested_tensor([q[0]]), k, v), ["plain dense", "right_padding"]),
    "jagged": (lambda call, q, k, v: call(torch.nested.nested_tensor([q[0]], layout=torch.jagged), k, v),
               ["plain dense", "NestedTensor"]),
    "sparse": (lambda call, q, k, v: call(q.to_sparse(), k, v), ["plain dense", "to_dense"]),
    "complex": (lambda call, q, k, v: call(q.to(torch.complex64), k, v), ["float32, bfloat16 or float16"]),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize(("given", "words"), STRANGE.values(), ids=STRANGE)
def test_tensors_without_values_and_traced_calls_are_refused(given, words, call):
    with refuses(*words):
        given(call, *reference.random_qkv())


@pytest.mark.parametrize("which", [0, 1, 2])
def test_inputs_that_require_gradients_are_refused(which):
    inputs = reference.random_qkv()
    inputs[which].requires_grad_()
    with refuses("no backward", "torch.no_grad", "detach"):
        sp.sparse_attention(*inputs, A_SHAPE)


@pytest.mark.parametrize("scale", [0, -1.0, math.inf, math.nan])
def test_scales_that_arent_positive_numbers_are_refused(scale):
    with refuses("scale must be a positive number", str(scale)):
        sp.sparse_attention(*reference.random_qkv(), A_SHAPE, scale=scale)


# Prompts ------------------------------------------------------------------------------------------------------

BAD_PROMPTS = {
    "no tokens": ({"q_len": 0}, ["q_len", "1 or more", "got 0"]),
    "less than no tokens": ({"q_len": -5}, ["q_len", "1 or more"]),
    "a length that is no whole number": ({"q_len": 5.0}, ["q_len", "whole number", "5.0"]),
    "a length that is a bool": ({"q_len": True}, ["q_len", "whole number"]),
    "a length of text": ({"q_len": 5, "kv_len": "9"}, ["kv_len", "whole number", "'9'"]),
    "more queries than keys": ({"q_len": 9, "kv_len": 8}, ["q_len=9 and kv_len=8", "keys of the whole prefix"]),
    "more tokens than int32 counts": ({"q_len": 2**31}, ["q_len", "2147483647 at most", "got 2147483648"]),
    "more keys than int32 counts": ({"q_len": 9, "kv_len": 2**40}, ["kv_len", "2147483647 at most"]),
    "blocks of 2**31": ({"q_len": 9, "block_size": 2**31}, ["block_size", "2147483647 at most", "got 2147483648"]),
    "blocks of 2**70": ({"q_len": 9, "block_size": 2**70}, ["block_size", "2147483647 at most"]),
    "blocks of 100": ({"q_len": 9, "block_size": 100}, ["block_size must be a power of two", "100"]),
    "blocks of 8": ({"q_len": 9, "block_size": 8}, ["at least 16", "got 8"]),
    "blocks of 0": ({"q_len": 9, "block_size": 0}, ["at least 16", "got 0"]),
    "blocks of 64.0": ({"q_len": 9, "block_size": 64.0}, ["power of two", "64.0"]),
    "padding and documents": ({"q_len": 2, "left_padding": [1], "documents": [0, 1]}, ["separate document"]),
    "padding that is no list": ({"q_len": 9, "left_padding": 3}, [r"left_padding", r"shape \[B\]"]),
    "padding as a mask": ({"q_len": 2, "left_padding": torch.tensor([True])}, ["whole numbers", "torch.bool"]),
    "padding in parts": ({"q_len": 9, "left_padding": [0.5]}, ["left_padding must be whole numbers", "float32"]),
    "less than no padding": ({"q_len": 9, "left_padding": [-1]}, [r"\[0, kv_len=9\]", r"\[-1\]"]),
    "more padding than tokens": ({"q_len": 9, "left_padding": [3, 10]}, [r"\[0, kv_len=9\]", "10"]),
    "too few document ids": ({"q_len": 9, "documents": [0, 1]}, ["documents", "kv_len=9", r"\[1, 2\]"]),
    "documents in parts": ({"q_len": 2, "documents": [0.0, 1.0]}, ["documents must be whole numbers"]),
    "documents out of order": ({"q_len": 3, "documents": [0, 1, 0]}, ["must not decrease", "in their order"]),
    "documents of too many dimensions": ({"q_len": 2, "documents": [[[0, 1]]]}, ["documents", r"\[1, 1, 2\]"]),
}


@pytest.mark.parametrize(("arguments", "words"), BAD_PROMPTS.values(), ids=BAD_PROMPTS)
def test_invalid_prompts_are_refused(arguments, words):
    with refuses(*words):
        sp.Prompt(**arguments)


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        (sp.Prompt(q_len=99, block_size=16), ["q_len=99 and kv_len=99", "q has 100 tokens", "build the Prompt"]),
        (sp.Prompt(q_len=100, kv_len=200, block_size=16), ["kv_len=200", "k has 100"]),
        (sp.Prompt(q_len=100, block_size=32), ["block_size=32", "block_size=16", "give both the same"]),
        (sp.Prompt(q_len=100, block_size=16, left_padding=[1, 2]), ["batch of 2", "q has a batch of 1"]),
    ],
    ids=["queries", "keys", "block size", "batch"],
)
def test_prompts_that_do_not_match_the_tensors_are_refused(prompt, words):
    q, k, v = reference.random_qkv(q_len=100)
    with refuses(*words):
        sp.sparse_attention(q, k, v, A_SHAPE, prompt=prompt)
    with refuses(*words):
        A_SHAPE.keep(q, k, prompt)
    if prompt.block_size == 16:
        with refuses(*words):
            sp.block_sparse_attention(q, k, v, prompt.visible(), prompt=prompt)
        with refuses(*words):
            sp.dense_attention(q, k, v, prompt=prompt)


# Options ------------------------------------------------------------------------------------------------------

NOT_FRACTIONS = [0, -0.5, 1.5, math.nan, math.inf, "0.9", None, True]
NOT_TOKENS = [-1, 1.5, math.nan, "128", True]
NOT_DISTANCES = [-1, math.nan, math.inf, "0", None]
BAD_OPTIONS = [
    *(("strategy", "flex_prefill", "gamma", value, r"a number in \(0, 1\]") for value in NOT_FRACTIONS),
    *(("strategy", "flex_prefill", "tau", value, "finite number, 0 or more") for value in NOT_DISTANCES),
    *(("strategy", "flex_prefill", o, value, "whole number, 1 or more")
      for o in ("min_budget", "max_budget") for value in (0, *NOT_TOKENS)),
    ("strategy", "flex_prefill", "official", "yes", "True or False"),
    *(("strategy", "oracle", "share", value, r"a number in \(0, 1\]") for value in NOT_FRACTIONS),
    ("strategy", "oracle", "scope", "layer", "row, head"),
    *(("estimator", "true_mass", "chunk", value, "whole number, 1 or more") for value in (0, *NOT_TOKENS)),
    *(("selector", "top_k", "k", value, "whole number, 1 or more") for value in (0, None, *NOT_TOKENS)),
    *(("selector", "cumulative", "share", value, r"a number in \(0, 1\]") for value in NOT_FRACTIONS),
    ("selector", "cumulative", "edge", "below", "reach, within"),
    ("selector", "cumulative", "scope", "layer", "row, head"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "name", "option", "value", "allowed"), BAD_OPTIONS)
def test_options_out_of_range_are_refused(kind, name, option, value, allowed):
    with refuses(f"{option} must be", allowed, f"got {value!r}"):
        getattr(sp, f"get_{kind}")(name, **{option: value})


@pytest.mark.parametrize("name", sp.list_strategies())
@pytest.mark.parametrize("option", ["sink", "local", "last", "min_length"])
@pytest.mark.parametrize("value", NOT_TOKENS)
def test_guards_that_arent_token_counts_are_refused_by_every_strategy(name, option, value):
    with refuses(f"{option} must be a whole number, 0 or more", f"got {value!r}"):
        sp.get_strategy(name, **{option: value})


@pytest.mark.parametrize("name", sp.list_strategies())
@pytest.mark.parametrize("value", [0, 8, 100, -128, 64.0, "128", None, True])
def test_block_sizes_that_arent_powers_of_two_are_refused_by_every_strategy(name, value):
    with refuses("block_size must be a power of two, at least 16", f"got {value!r}"):
        sp.get_strategy(name, block_size=value)


@pytest.mark.parametrize("name", sp.list_strategies())
@pytest.mark.parametrize("value", [2**31, 2**63])
def test_block_sizes_beyond_int32_are_refused_by_every_strategy(name, value):
    with refuses("block_size must be a whole number, 2147483647 at most", f"got {value!r}"):
        sp.get_strategy(name, block_size=value)


# Errors of user-defined strategies ----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Fixed(sp.Strategy):
    """Selects a given table."""

    table: torch.Tensor

    def score(self, q, k, prompt):
        return None

    def select(self, scores, prompt):
        return self.table


BAD_TABLES = {
    "one row of blocks too many": torch.ones(1, 6, 8, 7, dtype=torch.bool),
    "as many heads as there are key heads": torch.ones(1, 2, 7, 7, dtype=torch.bool),
    "another batch": torch.ones(2, 6, 7, 7, dtype=torch.bool),
    "no batch": torch.ones(6, 7, 7, dtype=torch.bool),
    "tokens by tokens": torch.ones(1, 6, 100, 100, dtype=torch.bool),
    "scores": torch.ones(1, 6, 7, 7),
}


@pytest.mark.parametrize("table", BAD_TABLES.values(), ids=BAD_TABLES)
def test_tables_that_do_not_fit_are_refused(table):
    q, k, v = reference.random_qkv(q_len=100)
    words = ("keep table must be bool and broadcastable", r"\[1, 6, 7, 7\]", str(table.dtype))
    strategy = Fixed(block_size=16, min_length=0, table=table)
    with refuses(*words):
        strategy.keep(q, k)
    with refuses(*words):
        sp.sparse_attention(q, k, v, strategy)
    with refuses(*words):
        sp.block_sparse_attention(q, k, v, table, prompt=sp.Prompt(q_len=100, block_size=16))


def test_tables_on_another_device_are_refused():
    q, k, _ = reference.random_qkv(q_len=100)
    table = torch.ones(1, 6, 7, 7, dtype=torch.bool, device="meta")
    with refuses("on the device of q", "meta and cpu"):
        Fixed(block_size=16, table=table).keep(q, k)


def test_strategies_without_score_and_select_are_refused():
    q, k, _ = reference.random_qkv(q_len=100)
    with pytest.raises(NotImplementedError, match=r"Strategy has to define score\(q, k, prompt\)"):
        sp.Strategy(block_size=16).keep(q, k)
