"""Properties of all registered parts: new parts are tested without changes here."""

from __future__ import annotations

import inspect
import re
import runpy
import weakref
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from test_strategies import small
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sparse_prefill as sp
from sparse_prefill import evaluation, registry
from sparse_prefill.core import tensor_checks
from sparse_prefill.head_table import save_table
from sparse_prefill.strategy import as_strategy, to_config

ROOT = Path(__file__).parents[1]
ESTIMATORS = registry.estimators.names()
STRATEGIES = sp.list_strategies()

# Compiled without a graph break ---------------------------------------------------------------------------

PROMPTS = {
    "whole": {"q_len": 333},
    "padded chunk": {"batch": 2, "heads": 4, "kv_heads": 4, "q_len": 41, "kv_len": 205, "padding": [170, 20]},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", PROMPTS.values(), ids=PROMPTS)
@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimators_trace_in_one_graph_and_equal_eager(name, sizes, dtype):
    padding = sizes.get("padding")
    q, k, _ = reference.random_qkv(**{key: size for key, size in sizes.items() if key != "padding"}, dtype=dtype)
    estimator = sp.get_estimator(name)
    compiled = torch.compile(estimator, fullgraph=True, dynamic=False, backend="eager")
    with torch._dynamo.config.patch(recompile_limit=256):  # dynamo counts all of these as one function
        found, want = (f(q, k, sp.Prompt(q.shape[2], k.shape[2], 16, padding)) for f in (compiled, estimator))
    torch.testing.assert_close(found, want, rtol=1e-6, atol=1e-6)  # sums over the ragged end have another order


# Long prompts ---------------------------------------------------------------------------------------------

TOKENS = 128 * 1024
SCRATCH = 2.5e9  # bytes
LAST = {"true_mass": 8192, "oracle": 8192}  # chunk length for parts that compute the full attention


class LiveBytes(TorchDispatchMode):
    """Peak bytes of tensors created in this mode. Reads of values are counted and return 1."""

    def __init__(self, *inputs):
        super().__init__()
        self.known = {x.untyped_storage()._cdata for x in inputs}
        self.live = self.peak = self.syncs = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            self.syncs += 1
            return 1
        out = func(*args, **(kwargs or {}))
        for storage in {x.untyped_storage() for x in tree_leaves(out) if isinstance(x, torch.Tensor)}:
            if storage._cdata not in self.known:
                self.known.add(storage._cdata)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        return out

    def _freed(self, address, size):
        self.known.discard(address)
        self.live -= size


def long_prompt(run, queries=TOKENS):
    """Bytes of scratch and number of reads back for 128K tokens, 32 query heads and 8 key heads of 128 in bf16.

    Runs as on a GPU, where more tensors are live at once than on a CPU.
    """
    with FakeTensorMode():  # data-dependent shapes raise
        q = torch.empty(1, 32, queries, 128, dtype=torch.bfloat16, device="meta")
        k = torch.empty(1, 8, TOKENS, 128, dtype=torch.bfloat16, device="meta")
        with LiveBytes(q, k) as seen:
            run(q, k, sp.Prompt(queries, TOKENS))
    return seen.peak, seen.syncs


def test_live_bytes_counts_peak_memory_and_reads_back():
    def run(q, k, prompt):
        for _ in range(3):
            a = k + 1
            b = a[:, :, 1:] * 2  # a view takes no memory
            del a, b
        return bool(k.sum() > 0)

    assert long_prompt(run) == (k_bytes(TOKENS) + k_bytes(TOKENS - 1), 1)


def k_bytes(tokens):
    return 2 * 8 * tokens * 128


@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimators_stay_within_scratch_and_never_sync_for_long_prompts(name):
    peak, syncs = long_prompt(sp.get_estimator(name), LAST.get(name, TOKENS))
    assert peak < SCRATCH
    assert not syncs


@pytest.mark.parametrize("name", STRATEGIES)
def test_strategies_stay_within_scratch_and_never_sync_for_long_prompts(name, monkeypatch):
    monkeypatch.setattr(tensor_checks, "_check_has_values", lambda *tensors: None)
    strategy = sp.get_strategy(name)
    # keep() makes a prompt with the default block size of the strategy.
    peak, syncs = long_prompt(lambda q, k, _: strategy.keep(q, k), LAST.get(name, TOKENS))
    assert peak < SCRATCH
    assert not syncs


class Launches(TorchDispatchMode):
    """Counts operations that would launch a GPU kernel, without views and device queries."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.namespace == "aten" and not func.is_view and "empty" not in func.name()
        return func(*args, **(kwargs or {}))


def launches(run):
    with FakeTensorMode():
        q = torch.empty(1, 32, TOKENS, 128, dtype=torch.bfloat16, device="meta")
        k = torch.empty(1, 8, TOKENS, 128, dtype=torch.bfloat16, device="meta")
        with Launches() as seen:
            run(q, k, sp.Prompt(TOKENS))
    return seen.count


def test_launches_counts_operations_that_compute():
    assert launches(lambda q, k, prompt: (q[:, :, 1:] + 1).mul_(2)) == 2


@pytest.mark.parametrize("name", ["flex_prefill", "flash_prefill", "minference", "prism", "proxy_attn", "xattention"])
def test_estimates_for_long_prompts_launch_few_kernels(name):
    # Each launch costs host time, however little it computes.
    assert launches(sp.get_strategy(name).score) < 1500


# Chunks ---------------------------------------------------------------------------------------------------

INVARIANT = [name for name in STRATEGIES if getattr(registry.strategies.factory(name), "chunk_invariant", False)]


@given(blocks=st.integers(2, 12), rest=st.sampled_from([0, 1, 13]), cuts=st.sets(st.integers(1, 11)), data=st.data())
@pytest.mark.parametrize("name", INVARIANT)
def test_chunks_of_whole_blocks_select_the_same_blocks_as_the_whole_prompt(name, blocks, rest, cuts, data):
    tokens = 16 * blocks + rest
    q, k, _ = reference.random_qkv(heads=4, kv_heads=2, q_len=tokens, scale=4, seed=data.draw(st.integers(0, 99)))
    strategy = small(name, last=0)
    whole = strategy.keep(q, k)
    edges = [0, *sorted(16 * cut for cut in cuts if cut < blocks), tokens]
    for begin, end in pairwise(edges):
        part = strategy.keep(q[:, :, begin:end], k[:, :, :end])
        rows = slice(begin // 16, begin // 16 + part.shape[2])
        assert torch.equal(part, whole[:, :, rows, : part.shape[3]])


def test_some_strategies_are_chunk_invariant_and_some_are_not():
    assert {"a_shape", "dense", "mean_pool"} <= set(INVARIANT) < set(STRATEGIES)
    assert sp.get_strategy("oracle").chunk_invariant
    assert not sp.get_strategy("oracle", scope="head").chunk_invariant


# Texts of classes -----------------------------------------------------------------------------------------

CLASSES = {
    name: kind.factory(name)
    for kind in (registry.strategies, registry.wrappers)
    for name in kind.names()
    if isinstance(kind.factory(name), type)
}
GUARDS = {field.name for field in fields(sp.Strategy)}


@pytest.mark.parametrize("name", CLASSES)
def test_a_class_names_its_paper_when_to_use_it_and_how_it_differs(name):
    for attribute in ("paper", "use", "differs"):
        assert getattr(CLASSES[name], attribute).strip(), attribute


@pytest.mark.parametrize("name", CLASSES)
def test_a_class_names_the_released_code_or_says_that_there_is_none(name):
    for entry in filter(None, CLASSES[name].reference.split("; ")):
        assert re.fullmatch(r"[\w-]+/[\w-]+(@[0-9a-f]{7,40})?: \S.*", entry), entry
    if not CLASSES[name].reference:
        assert re.search(r"no released code|not compared with the released code", CLASSES[name].differs)


@pytest.mark.parametrize("name", CLASSES)
def test_a_docstring_explains_every_option(name):
    doc = inspect.cleandoc(CLASSES[name].__doc__)
    summary, _, rest = doc.partition("\n\n")
    assert "\n" not in summary
    assert rest
    assert summary.endswith(".")
    explained = set(re.findall(r"^    \*{0,2}(\w+)(?: \(.*?\))?:", doc.partition("Args:\n")[2], re.MULTILINE))
    if "guards" in explained:
        explained |= GUARDS
    options = {field.name for field in fields(CLASSES[name]) if field.init}
    assert options <= explained


# Strategies registered at run time ------------------------------------------------------------------------


@pytest.fixture
def every_other():
    @sp.register_strategy("every_other")
    @dataclass(frozen=True, kw_only=True)
    class EveryOther(sp.Strategy):
        """Keep every other block."""

        paper = "a test"

        step: int = 2

        def score(self, q, k, prompt):
            return torch.zeros(1, 1, 1, 1)

        def select(self, scores, prompt):
            return (torch.arange(prompt.n_k) % self.step == 0).expand(1, 1, prompt.n_q, -1)

    yield "every_other"
    registry.strategies.unregister("every_other")


def test_a_strategy_registered_at_run_time_is_known_everywhere(every_other):
    assert every_other in sp.list_strategies()
    strategy = sp.get_strategy(every_other, step=3)
    assert as_strategy(to_config(strategy)) == strategy
    assert sp.Plan(layers={1: every_other}).for_layer(sp.Layer(1, 2)).name == every_other
    assert sp.get_strategy("by_head", of=every_other).label == "by_head(every_other)"
    assert small(every_other, step=4).block_size == 16

    q, k, v = reference.random_qkv(q_len=333, scale=4)
    strategy = small(every_other)
    prompt = sp.Prompt(333, block_size=16)
    keep = strategy.keep(q, k)
    want = reference.sparse_attention(q, k, v, keep, prompt)
    torch.testing.assert_close(sp.sparse_attention(q, k, v, strategy).double(), want, rtol=0, atol=1e-5)
    mass = evaluation.true_mass(q, k, prompt, [20])
    assert 0 < evaluation.recall(mass, keep, [20]).min() < 1
    assert 0.5 < evaluation.density(keep, prompt) < 0.7


def test_a_strategy_registered_at_run_time_is_documented_and_evaluated(every_other, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")  # as when running a script in docs
    page = runpy.run_path(str(ROOT / "docs" / "pages.py"))["page"](every_other)
    assert "Keep every other block." in page
    assert "| `step` | `2` |" in page
    cfg = OmegaConf.load(ROOT / "recipes" / "configs" / "evaluate_smollm2.yaml")
    recipe = runpy.run_path(str(ROOT / "recipes" / "evaluate.py"))["EvaluateRecipe"](OmegaConf.merge(cfg, {"more": []}))
    recipe.table = tmp_path / "heads.tsv"
    save_table([[0.5]], recipe.table)
    assert recipe.strategies()[every_other] == sp.get_strategy(every_other)


def test_a_strategy_registered_at_run_time_is_timed_by_name(every_other, capsys):
    benchmark = runpy.run_path(str(ROOT / "benchmarks" / "attention.py"))
    arguments = ["--lengths", "300", "--heads", "6", "2", "16", "--dtypes", "fp32", "--repeats", "1"]
    report = benchmark["main"]([*arguments, "--strategies", f"{every_other}:min_length=0,step=3"])
    (row,) = report["results"][0]["strategies"]
    assert row["total"] > 0
    assert row["density"] < 1
    assert f"| {every_other}:min_length=0,step=3 |" in capsys.readouterr().out
