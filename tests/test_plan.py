"""Plans and configurations: files round-trip, and each layer and head gets its strategy."""

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st

import sparse_prefill as sp
from sparse_prefill.strategy import as_strategy, to_config

CONFIGS = st.one_of(
    st.builds(
        lambda sink, local: {"name": "a_shape", "sink": sink, "local": local},
        st.integers(0, 512),
        st.integers(1, 2**31 - 1),
    ),
    st.builds(lambda gamma: {"name": "flex_prefill", "gamma": gamma}, st.floats(0.01, 1)),
    st.builds(lambda t: {"name": "xattention", "threshold": t}, st.lists(st.floats(0, 1), min_size=1, max_size=4)),
    st.just("dense"),
)
NESTED = st.one_of(
    CONFIGS,
    st.builds(
        lambda of, heads: {"name": "by_head", "of": of, "heads": heads},
        CONFIGS,
        st.dictionaries(st.integers(0, 31), CONFIGS, max_size=3),
    ),
)


@given(default=NESTED, layers=st.dictionaries(st.integers(0, 80), NESTED, max_size=4))
def test_a_saved_plan_loads_unchanged(default, layers, tmp_path_factory):
    plan = sp.Plan(default=default, layers=layers)
    path = tmp_path_factory.mktemp("plan") / "plan.yaml"
    plan.save(path)
    assert sp.Plan.load(path) == plan
    for index in range(3):
        layer = sp.Layer(index, 81)
        assert sp.Plan.load(path).for_layer(layer) == plan.for_layer(layer)


@pytest.mark.parametrize("name", sp.list_strategies())
def test_every_strategy_is_rebuilt_from_its_configuration(name):
    strategy = sp.get_strategy(name)
    assert as_strategy(to_config(strategy)) == strategy


def test_a_plan_gives_each_layer_its_strategy():
    plan = sp.Plan(default="a_shape", layers={1: "dense"})
    assert [plan.for_layer(sp.Layer(i, 3)).name for i in range(3)] == ["a_shape", "dense", "a_shape"]
    with pytest.raises(ValueError, match="strategy for layer 1, but the model has 1 layers"):
        plan.for_layer(sp.Layer(0, 1))


@pytest.mark.parametrize("layers", [{-1: "dense"}, {"3": "dense"}, {True: "dense"}])
def test_a_plan_accepts_only_layer_numbers(layers):
    with pytest.raises(ValueError, match="numbered from 0"):
        sp.Plan(layers=layers)


def test_invalid_plans_and_strategies_are_refused(tmp_path):
    (tmp_path / "plan.yaml").write_text("strategy: dense")
    with pytest.raises(ValueError, match="is no plan"):
        sp.Plan.load(tmp_path / "plan.yaml")
    for bad in (3, {"gamma": 0.5}, None):
        with pytest.raises(ValueError, match="a Strategy, a name, or a mapping"):
            sp.Plan(default=bad)
    composed = sp.ComposedStrategy(
        estimator=sp.get_estimator("pooled_attention"), selector=sp.get_selector("top_k", k=3)
    )
    with pytest.raises(ValueError, match="can't be written"):
        sp.Plan(default=composed).save(tmp_path / "plan.yaml")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"default:\n",
        b"layers:\n",
        b"default: dense\nlayers:\n  0:\n",
        b"default:\n  name: a_shape\n  sink:\n",
        b"default:\n  name: a_shape\n sink: 3\n",
        b"default: {name: a_shape, 3: 4}\n",
        b"default: {1: a_shape}\n",
        b"default: {name: a_shape, sink: 1, sink: 2}\n",
        b"layers: {0: dense, 0: local}\n",
        b"layers: [dense]\n",
        b"layers: {first: dense}\n",
        b"0: dense\n",
        b"default: {name: by_head, of: dense, heads:}\n",
        b"default: &a {name: delta, of: *a}\n",
        b"default: {name: a_shape, sink: 10000000000000000000000}\n",
        "default: dense # schön\n".encode("latin-1"),
        bytes(range(256)),
    ],
)
def test_a_broken_plan_raises_a_value_error_that_names_the_file(content, tmp_path):
    (tmp_path / "plan.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=r"plan\.yaml is no plan: ") as error:
        sp.Plan.load(tmp_path / "plan.yaml")
    assert "\n" not in str(error.value)


def test_a_plan_in_json_has_layer_and_head_numbers_as_text(tmp_path):
    layers = '{"layers": {"1": {"name": "by_head", "of": "dense", "heads": {"3": "local"}}}}'
    (tmp_path / "plan.json").write_text(layers)
    plan = sp.Plan(layers={1: sp.get_strategy("by_head", of="dense", heads={3: "local"})})
    assert sp.Plan.load(tmp_path / "plan.json") == plan


def test_by_head_gives_each_head_its_strategy():
    q, k, v = reference.random_qkv(batch=2, heads=6, kv_heads=2, q_len=200, scale=4)
    options = {"block_size": 16, "min_length": 0}
    a_shape = sp.get_strategy("a_shape", sink=16, local=32, **options)
    pooled = sp.get_strategy("mean_pool", share=0.5, **options)
    mixed = sp.get_strategy("by_head", of=pooled, heads={1: a_shape, 5: to_config(a_shape)})
    keep = mixed.keep(q, k)
    for head in range(6):
        want = (a_shape if head in (1, 5) else pooled).keep(q, k).expand(2, 6, -1, -1)[:, head]
        assert torch.equal(keep[:, head], want)
    out = sp.sparse_attention(q, k, v, mixed)
    want = reference.sparse_attention(q, k, v, keep, sp.Prompt(200, block_size=16))
    torch.testing.assert_close(out.double(), want, rtol=0, atol=1e-5)
    scores = mixed.score_table(mixed.score(q, k, sp.Prompt(200, block_size=16)), sp.Prompt(200, block_size=16))
    assert scores.shape == keep.shape


@pytest.mark.parametrize(
    "options",
    [
        {"name": "xattention", "threshold": [0.1, 0.5, 0.9, 0.2, 0.6, 1.0]},
        {"name": "minference", "heads": {h: ["vertical_and_slash", 16 * h, 16, 1.0] for h in range(6)}},
        {"name": "by_head", "of": {"name": "a_shape", "sink": 16, "local": 16}, "heads": {4: "dense", 5: "dense"}},
        {"name": "duo_attention", "streaming": [True, False]},
    ],
    ids=lambda options: options["name"],
)
def test_a_strategy_that_indexes_heads_gets_all_heads(options):
    q, k, _ = reference.random_qkv(heads=6, kv_heads=2, q_len=200, scale=4)

    def in_blocks(config):
        if isinstance(config, dict) and "name" in config:
            inner = {key: in_blocks(value) for key, value in config.items()}
            return inner if config["name"] == "by_head" else {**inner, "block_size": 16}
        if isinstance(config, dict) and options["name"] == "by_head":
            return {key: {"name": value, "block_size": 16} for key, value in config.items()}
        return config

    numbered = as_strategy(in_blocks(options))
    other = sp.get_strategy("a_shape", sink=16, local=16, block_size=16)
    keep = sp.get_strategy("by_head", of=numbered, heads={0: other, 3: other}).keep(q, k)
    for head in range(6):
        want = (other if head in (0, 3) else numbered).keep(q, k).expand(1, 6, -1, -1)[:, head]
        assert torch.equal(keep[:, head], want)


def test_missing_heads_and_other_block_sizes_are_refused():
    q, k, _ = reference.random_qkv(q_len=200)
    with pytest.raises(ValueError, match="no head 6: q has 6 heads"):
        sp.get_strategy("by_head", of="a_shape", heads={6: "dense"}).keep(q, k)
    with pytest.raises(ValueError, match="share one block size"):
        sp.get_strategy("by_head", of="a_shape", heads={0: {"name": "dense", "block_size": 64}})
    with pytest.raises(ValueError, match="numbered from 0"):
        sp.get_strategy("by_head", of="a_shape", heads={-1: "dense"})


def test_wrappers_are_listed_and_suggested_for_unknown_names():
    assert "by_head" in sp.list_wrappers()
    assert not set(sp.list_wrappers()) & set(sp.list_strategies())
    with pytest.raises(ValueError, match="to wrap one: by_head"):
        sp.get_strategy("by_heads")
    with pytest.raises(ValueError, match="needs the option 'of'"):
        sp.get_strategy("by_head")
    assert sp.get_strategy("by_head", of="a_shape").label == "by_head(a_shape)"


@pytest.mark.parametrize("layout", ["half_split", "interleaved"])
def test_negative_positions_undo_rotary_embedding_and_products_depend_on_distance(layout):
    rope = sp.Rope(layout, tuple(10_000.0 ** (-i / 8) for i in range(8)))
    x, y = torch.randn(2, 3, 20, 24), torch.randn(2, 3, 20, 24)
    at = torch.arange(20)
    torch.testing.assert_close(rope.rotate(rope.rotate(x, at), -at), x)
    torch.testing.assert_close(rope.rotate(x, at)[..., 16:], x[..., 16:])
    products = (rope.rotate(x, at) * rope.rotate(y, at + 3)).sum(-1)
    torch.testing.assert_close(
        products, (rope.rotate(x, at + 50) * rope.rotate(y, at + 53)).sum(-1), atol=1e-4, rtol=1e-4
    )
