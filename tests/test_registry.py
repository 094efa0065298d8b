"""Registries: listed names, refused names and options, and entry points of other packages."""

import subprocess
import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass

import pytest
import reference
import torch

import sparse_prefill as sp
from sparse_prefill import registry
from sparse_prefill.plan import with_options
from sparse_prefill.spec import parse_strategy

GETTERS = {"strategy": sp.get_strategy, "estimator": sp.get_estimator, "selector": sp.get_selector}
REGISTRIES = {"strategy": registry.strategies, "estimator": registry.estimators, "selector": registry.selectors}


@pytest.fixture
def forget():
    """Collects names that a test registers, by default strategies, and unregisters them after the test."""
    names = []

    def later(name, kind=registry.strategies):
        names.append((name, kind))

    yield later
    for name, kind in names:
        kind.unregister(name)


def test_strategies_are_listed_in_order_of_their_names():
    names = sp.list_strategies()
    assert names == sorted(names)
    assert {"a_shape", "dense", "flex_prefill", "oracle"} <= set(names)


@pytest.mark.parametrize("name", sp.list_strategies())
def test_every_strategy_has_a_name_a_paper_and_options(name):
    strategy = sp.get_strategy(name)
    assert isinstance(strategy, sp.Strategy)
    assert strategy.name == name
    assert strategy.paper
    options = registry.strategies.options(name)
    assert {"block_size", "min_length", "sink", "local", "last"} <= options.keys()
    assert all(sp.get_strategy(name, **{option: default}) == strategy for option, default in options.items())


@pytest.mark.parametrize("name", sp.list_strategies())
def test_strategies_are_immutable(name):
    with pytest.raises(AttributeError):
        sp.get_strategy(name).block_size = 64


@pytest.mark.parametrize("kind", GETTERS)
def test_an_unknown_name_lists_the_registered_ones(kind):
    with pytest.raises(ValueError, match=f"Unknown {kind} 'nonsense'. There are: ") as error:
        GETTERS[kind]("nonsense")
    assert all(name in str(error.value) for name in REGISTRIES[kind].names())


@pytest.mark.parametrize(
    ("kind", "name", "existing"),
    [
        ("strategy", "flex_prefill", "gamma, tau"),
        ("strategy", "a_shape", "sink, local"),
        ("estimator", "true_mass", "chunk"),
        ("estimator", "pooled_attention", "pool_size"),
        ("selector", "cumulative", "share, edge, scope"),
    ],
)
def test_an_unknown_option_lists_the_existing_ones(kind, name, existing):
    with pytest.raises(ValueError, match=f"The {kind} '{name}' has no option 'nonsense'") as error:
        GETTERS[kind](name, nonsense=1)
    assert all(option in str(error.value).split("There are: ")[1] for option in existing.split(", "))


class Bare(sp.Strategy):
    every: int = 4


class Rows:
    share: float = 0.5

    def __call__(self, scores, prompt):
        return scores > self.share


class Half(ABC):
    @abstractmethod
    def __call__(self, scores, prompt): ...


def open_ended(**options): ...


def listed(*sizes): ...


def named(name="x"): ...


@pytest.mark.parametrize(
    ("kind", "factory", "message"),
    [
        ("strategy", Bare, "has the fields every, and no way to set them: write @dataclass"),
        ("estimator", Rows, "has the fields share, and no way to set them: write @dataclass"),
        ("selector", Rows, "has the fields share"),
        ("strategy", sp.get_strategy("dense"), "must be a class or a function that builds it, got a Dense"),
        ("selector", Half, "is an abstract class"),
        ("estimator", open_ended, r"takes \*\*options: give every option a name"),
        ("estimator", listed, r"takes \*sizes: give every option a name"),
        ("selector", named, "has an option name"),
        ("selector", dict.fromkeys, "has no readable signature|takes"),
    ],
)
def test_factories_that_cannot_be_built_from_options_are_refused(kind, factory, message):
    with pytest.raises(ValueError, match=f"The {kind} 'new' .*{message}|The {kind} 'new' {message}"):
        REGISTRIES[kind].register("new")(factory)
    assert "new" not in REGISTRIES[kind]


@pytest.mark.parametrize("name", [Bare, "", "a b", "delta(x)", "a:b", None])
def test_a_registration_needs_a_name_that_specs_can_parse(name):
    with pytest.raises(ValueError, match="is registered by a name of letters"):
        sp.register_strategy(name)


def test_a_class_without_new_fields_needs_no_dataclass_decorator(forget):
    forget("half_a_shape-0.5")

    @sp.register_strategy("half_a_shape-0.5")
    class Quiet(type(sp.get_strategy("a_shape"))):
        def select(self, scores, prompt):
            return scores

    assert parse_strategy("half_a_shape-0.5:sink=3").sink == 3


def test_an_unknown_option_of_a_class_without_options_is_refused(forget):
    @sp.register_strategy("bare")
    class Bare:
        def __init__(self):
            pass

    forget("bare")
    with pytest.raises(ValueError, match=r"'bare' has no option 'nonsense'.*There are: none"):
        sp.get_strategy("bare", nonsense=1)


def test_an_option_without_a_default_is_required():
    with pytest.raises(ValueError, match="'top_k' needs the option 'k'"):
        sp.get_selector("top_k")


@pytest.mark.parametrize(
    ("register", "name"),
    [
        (sp.register_strategy, "dense"),
        (sp.register_estimator, "true_mass"),
        (sp.register_selector, "top_k"),
    ],
)
def test_a_registered_name_cannot_be_registered_again(register, name):
    with pytest.raises(ValueError, match=f"'{name}' is registered already: choose another name"):
        register(name)(lambda: None)


def test_a_dataclass_registered_at_run_time_works_by_name(forget):
    @sp.register_strategy("every_other_block")
    @dataclass(frozen=True, kw_only=True)
    class EveryOtherBlock(sp.Strategy):
        step: int = 2

        def score(self, q, k, prompt):
            return torch.zeros(1, 1, 1, 1)

        def select(self, scores, prompt):
            return (torch.arange(prompt.n_k) % self.step == 0).expand(1, 1, prompt.n_q, -1)

    forget("every_other_block")
    assert "every_other_block" in sp.list_strategies()
    q, k, v = reference.random_qkv(heads=2, kv_heads=1, q_len=2100, scale=4)
    with sp.record() as calls:
        out = sp.sparse_attention(q, k, v, "every_other_block")
    assert (calls[0].strategy, calls[0].dense) == ("every_other_block", None)
    columns = torch.tensor([[j % 2 == 0 or i == j for j in range(17)] for i in range(17)]).tril()
    want = reference.sparse_attention(q, k, v, columns[None, None], sp.Prompt(q_len=2100))
    torch.testing.assert_close(out.double(), want, rtol=0, atol=1e-5)
    assert sp.get_strategy("every_other_block", step=3).step == 3
    with pytest.raises(ValueError, match="step"):
        sp.get_strategy("every_other_block", stride=3)


def test_a_function_that_returns_a_strategy_may_be_registered(forget):
    @sp.register_strategy("pooled")
    def pooled(share: float = 0.5, block_size: int = 128, min_length: int = 0):
        return sp.ComposedStrategy(
            estimator=sp.get_estimator("pooled_attention"),
            selector=sp.get_selector("cumulative", share=share),
            block_size=block_size,
            min_length=min_length,
        )

    forget("pooled")
    strategy = sp.get_strategy("pooled", block_size=16)
    assert strategy.name == "pooled"
    assert "pooled" in sp.list_strategies()
    q, k, v = reference.random_qkv(q_len=200, scale=4)
    with sp.record() as calls:
        out = sp.sparse_attention(q, k, v, strategy)
    assert calls[0].strategy == "pooled"
    prompt = sp.Prompt(q_len=200, block_size=16)
    torch.testing.assert_close(
        out.double(), reference.sparse_attention(q, k, v, strategy.keep(q, k), prompt), rtol=0, atol=1e-5
    )
    with pytest.raises(ValueError, match="There are: share, block_size, min_length"):
        sp.get_strategy("pooled", gamma=1)


def test_two_names_for_one_class_keep_their_own_name(forget):
    for share in (0.5, 0.9):
        sp.register_strategy(f"half_{share}")(lambda share=share: sp.get_strategy("oracle", share=share))
        forget(f"half_{share}")
    first, second = sp.get_strategy("half_0.5"), sp.get_strategy("half_0.9")
    assert (first.name, second.name, sp.get_strategy("oracle").name) == ("half_0.5", "half_0.9", "oracle")


def test_a_strategy_that_a_function_returns_twice_keeps_its_name(forget):
    shared = sp.get_strategy("a_shape", sink=32)
    for name in ("one", "other"):
        sp.register_strategy(name)(lambda: shared)
        forget(name)
    assert [sp.get_strategy(name).name for name in ("one", "other")] == ["one", "other"]
    assert shared.name == "a_shape"
    assert sp.get_strategy("one") == shared


def test_the_name_of_a_registered_function_survives_changed_options_and_layers(forget):
    sp.register_wrapper("union")(lambda of: sp.get_strategy("gqa_union", of=of))
    forget("union", registry.wrappers)
    strategy = sp.get_strategy("union", of="a_shape")
    assert strategy.for_layer(sp.Layer(index=0, count=2)).label == "union(a_shape)"
    changed = with_options(strategy, sink=16)
    assert (changed.label, changed.of.sink) == ("union(a_shape)", 16)


def test_a_factory_of_another_type_is_refused(forget):
    sp.register_strategy("number")(lambda: 7)
    forget("number")
    with pytest.raises(ValueError, match="'number' was built as a int, not as a Strategy"):
        sp.get_strategy("number")


# Other packages -----------------------------------------------------------------------------------------------

PLUGIN = """
from dataclasses import dataclass
import torch
import sparse_prefill as sp

@dataclass(frozen=True, kw_only=True)
class Theirs(sp.Strategy):
    extra: int = 3
    def score(self, q, k, prompt):
        return torch.ones(1, 1, 1, 1, dtype=torch.bool)
    def select(self, scores, prompt):
        return scores

@sp.register_strategy("decorated")
@dataclass(frozen=True, kw_only=True)
class Decorated(Theirs):
    pass

def their_estimator(scale: float = 1.0):
    return lambda q, k, prompt: torch.full((1, 1, prompt.n_q, prompt.n_k), scale)

def their_selector():
    return lambda scores, prompt: scores > 0
"""
ENTRY_POINTS = """
[sparse_prefill.strategies]
theirs = plugin:Theirs
decorated = plugin:Decorated
missing = no_such_module:Strategy
broken = broken_plugin:Strategy
[sparse_prefill.estimators]
their_estimator = plugin:their_estimator
missing = plugin:no_such_name
[sparse_prefill.selectors]
their_selector = plugin:their_selector
"""


@pytest.fixture
def installed(tmp_path):
    """A folder with another installed package, two of whose entry points are broken."""
    (tmp_path / "plugin.py").write_text(PLUGIN)
    (tmp_path / "broken_plugin.py").write_text("raise RuntimeError('out of order')")
    info = tmp_path / "plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    return tmp_path


def run(installed, program):
    """Output and warnings of a program in a separate process, with the package on its path."""
    start = f"import sys; sys.path.insert(0, {str(installed)!r}); import sparse_prefill as sp\n"
    result = subprocess.run([sys.executable, "-W", "always", "-c", start + program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout, result.stderr


def test_an_installed_package_adds_strategies_estimators_and_selectors_by_name(installed):
    out, _ = run(
        installed,
        """
assert "plugin" not in sys.modules, "loaded at the first miss, not at import"
sp.get_strategy("dense")
assert "plugin" not in sys.modules
import torch
strategy = sp.get_strategy("theirs", extra=4, block_size=16)
assert (strategy.name, strategy.extra) == ("theirs", 4)
assert strategy.keep(torch.zeros(1, 1, 40, 16), torch.zeros(1, 1, 40, 16)).sum() == 6
prompt = sp.Prompt(q_len=40, block_size=16)
scores = sp.get_estimator("their_estimator", scale=2.0)(None, None, prompt)
assert sp.get_selector("their_selector")(scores, prompt).all()
assert sp.get_strategy("decorated").extra == 3
print(sp.list_strategies())
""",
    )
    assert "'theirs'" in out
    assert "'decorated'" in out
    assert "'oracle'" in out
    assert "missing" not in out


def test_listing_includes_entry_points(installed):
    out, _ = run(installed, "print(sp.list_strategies())")
    assert "'theirs'" in out


def test_a_broken_entry_point_warns_and_the_others_still_load(installed):
    _, warnings = run(
        installed,
        """
sp.get_strategy("theirs")
sp.get_estimator("their_estimator")
""",
    )
    for name, why in (
        ("'missing' of no_such_module:Strategy", "No module named"),
        ("'broken' of broken_plugin:Strategy", "out of order"),
        ("'missing' of plugin:no_such_name", "no_such_name"),
    ):
        line = next(line for line in warnings.splitlines() if f"{name} could not be loaded" in line)
        assert why in line


def test_an_entry_point_never_replaces_a_method_of_the_library(installed):
    (installed / "plugin-1.0.dist-info" / "entry_points.txt").write_text(
        "[sparse_prefill.strategies]\noracle = plugin:Theirs\n"
    )
    out, _ = run(installed, "sp.list_strategies(); print(type(sp.get_strategy('oracle')).__module__)")
    assert out.strip() == "sparse_prefill.strategies.oracle"
