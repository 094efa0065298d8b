"""Specs: strategies written on a command line."""

import pytest

import sparse_prefill as sp
from sparse_prefill.spec import is_plan, parse_strategy
from sparse_prefill.strategies.minference import save_patterns


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
        ('by_head(dense):heads={"1":"local"}', sp.get_strategy("by_head", of="dense", heads={1: "local"})),
        ("duo_attention:streaming=[true,false]", sp.get_strategy("duo_attention", streaming=[True, False])),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_spec_is_parsed_to_the_strategy_that_it_names(spec, expected):
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
        ("runs:3/nowhere.yaml", "There is no plan at runs:3/nowhere.yaml"),
        ("minference:block_size=16,config=nowhere.json", "There is no pattern file at nowhere.json"),
        ("a_shap:config=nowhere.json", "Unknown strategy 'a_shap'"),
        ("a_shape:name=dense", "name is given twice in 'a_shape:name=dense'"),
        ("delta(a_shape):of=dense", "of is given twice"),
        ("a_shape:sink=1,sink=2", "sink is given twice"),
        ('by_head(dense):heads={"0":"local","0":"dense"}', "is no list or mapping: it gives the key '0' twice"),
        ("xattention:threshold=[0.9", "is no list or mapping"),
        (f"a_shape:sink={10**22}", "sink must be a whole number, 2147483647 at most"),
        (f"flex_prefill:tau={10**22}", "tau must be a finite number"),
        (f"flex_prefill:gamma={10**400}", "gamma must be a number in"),
    ],
)
def test_specs_that_cannot_be_parsed_are_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        parse_strategy(spec)


@pytest.mark.parametrize("name", ["plan.yaml", "plan.json"])
def test_a_path_is_loaded_as_a_plan(name, tmp_path):
    plan, path = sp.Plan(default="a_shape", layers={0: "dense"}), tmp_path / name
    if path.suffix == ".json":
        path.write_text('{"default": {"name": "a_shape"}, "layers": {"0": {"name": "dense"}}}')
    else:
        plan.save(path)
    assert parse_strategy(str(path)) == plan


@pytest.mark.parametrize("content", ["[]", "{", '{"layer": 1}', '{"layers": []}'])
def test_files_without_a_plan_are_refused(content, tmp_path):
    (tmp_path / "plan.json").write_text(content)
    with pytest.raises(ValueError, match=r"plan\.json is no plan"):
        parse_strategy(str(tmp_path / "plan.json"))


def test_a_spec_may_end_with_a_file_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_patterns("pat.json", [{0: ["stream_llm", 16, 32, 1.0]}])
    built = parse_strategy("minference:block_size=16,config=pat.json")
    assert built == sp.get_strategy("minference", config="pat.json", block_size=16)
    assert not is_plan("minference:config=pat.json")
    assert not is_plan("delta(minference:config=pat.json):every=32,x=a.yaml")
    assert is_plan("pat.json")
