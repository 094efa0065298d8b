"""Strategies written on a command line."""

import pytest

import sparse_prefill as sp
from sparse_prefill.spec import parse_strategy


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("a_shape", sp.get_strategy("a_shape")),
        ("xattention:threshold=0.97,stride=16", sp.get_strategy("xattention", threshold=0.97, stride=16)),
        ("flex_prefill:max_budget=null,official=true", sp.get_strategy("flex_prefill", official=True)),
        ("delta(a_shape)", sp.get_strategy("delta", of="a_shape")),
        (
            "delta(a_shape:sink=256,local=512):every=32",
            sp.get_strategy("delta", of=sp.get_strategy("a_shape", sink=256, local=512), every=32),
        ),
        ("gqa_union(delta(local))", sp.get_strategy("gqa_union", of=sp.get_strategy("delta", of="local"))),
        ("duo_attention:table=heads.tsv", sp.get_strategy("duo_attention", table="heads.tsv")),
        ("duo_attention:streaming=[true,false]", sp.get_strategy("duo_attention", streaming=[True, False])),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_spec_is_the_strategy_that_it_names(spec, expected):
    assert parse_strategy(spec) == expected


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "is no strategy"),
        ("a shape", "is no strategy"),
        ("delta(a_shape", "is no strategy"),
        ("a_shape:local", "'local' in 'a_shape:local' is no option"),
        ("a_shape:=3", "is no option"),
        ("a_shape:window=3", "has no option 'window'"),
        ("flexprefill", "Unknown strategy 'flexprefill'"),
        ("delta", "needs the option 'of'"),
        ("flex_prefill:official=no", "official of flex_prefill must be true or false, got 'no'"),
        ("flex_prefill:gamma=high", "gamma must be a number"),
        ("nowhere.yaml", "There is no plan at nowhere.yaml"),
    ],
)
def test_what_cannot_be_read_is_named(spec, message):
    with pytest.raises(ValueError, match=message):
        parse_strategy(spec)


@pytest.mark.parametrize("name", ["plan.yaml", "plan.json"])
def test_a_path_is_a_plan(name, tmp_path):
    plan, path = sp.Plan(default="a_shape", layers={0: "dense"}), tmp_path / name
    if path.suffix == ".json":
        path.write_text('{"default": {"name": "a_shape"}, "layers": {"0": {"name": "dense"}}}')
    else:
        plan.save(path)
    assert parse_strategy(str(path)) == plan


@pytest.mark.parametrize("content", ["[]", "{", '{"layer": 1}', '{"layers": []}'])
def test_a_file_of_something_else_is_no_plan(content, tmp_path):
    (tmp_path / "plan.json").write_text(content)
    with pytest.raises(ValueError, match=r"plan\.json is no plan"):
        parse_strategy(str(tmp_path / "plan.json"))
