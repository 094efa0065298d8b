"""Measure strategies on a model: what they keep, what they cost, and what the model still knows.

Each function adds to :class:`~sparse_prefill.evaluation.results.Results`, writes them after each step, leaves out what is
there already, and goes on with the next strategy where one fails.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_prefill import registry, tasks
from sparse_prefill.evaluation import Collector, kl_divergence, perplexity_ratio
from sparse_prefill.evaluation.results import Results
from sparse_prefill.evaluation.texts import FactText
from sparse_prefill.evaluation.timing import STAGES, time_attention
from sparse_prefill.head_table import save_table, window_loss
from sparse_prefill.layer import Layer
from sparse_prefill.models.subject import Subject
from sparse_prefill.options import check_tokens
from sparse_prefill.plan import Plan
from sparse_prefill.prompt import Prompt
from sparse_prefill.record import record
from sparse_prefill.strategy import Strategy, as_strategy, get_strategy, to_config

Strategies = Mapping[str, Strategy | Plan]
OnStep = Callable[[int, int, str], None]
Failures = dict[str, str]

DIGITS = 3  # of numbers for each layer and head
SECOND_HALF, LAST_QUARTER = 0.5, 0.25


def without_dense_rows(options: Mapping[str, Any], head_table: Callable[[], Path]) -> Strategy:
    """A strategy as it is to be measured: with no dense last rows granted, and with a table of heads if it needs one.

    Args:
        options (Mapping[str, Any]): its name and its options, which stay as they are given.
        head_table (Callable[[], Path]): makes the table, if it is called; see :func:`estimate_head_table`.

    Returns:
        Strategy: the strategy; what it wraps is treated alike.

    Raises:
        ValueError: if the name or an option is unknown.
    """
    options = dict(options)
    if "of" in options:
        inner = {"name": options["of"]} if isinstance(options["of"], str) else options["of"]
        options["of"] = without_dense_rows(inner, head_table)
        return as_strategy(options)
    known = registry.strategies.options(options["name"])
    if "table" in known and not options.get("table"):
        options["table"] = str(head_table())
    if "last" in known:
        options.setdefault("last", 0)
    return as_strategy(options)


def estimate_head_table(subject: Subject, tokens: Tensor, path: Path) -> Path:
    """Write how much each key head loses by sinks and a window, unless the file is there; returns its path.

    Args:
        subject (Subject): the model.
        tokens (Tensor): a text that nothing else is measured on, int64 [1, s].
        path (Path): the file.
    """
    if not path.exists():
        rows: list[list[float]] = []
        subject.capture(tokens, lambda layer, q, k, v: rows.append(window_loss(q, k)))
        path.parent.mkdir(parents=True, exist_ok=True)
        save_table(rows, path)
    return path


# What is kept, and what the model still knows


def measure_texts(
    subject: Subject,
    strategies: Strategies,
    texts: Sequence[FactText],
    results: Results,
    *,
    seed: int = 0,
    query_blocks: int = 6,
    on_step: OnStep | None = None,
) -> Failures:
    """Read texts with facts through each strategy: answers stand inside the sparse prefill.

    Args:
        subject (Subject): the model.
        strategies (Mapping[str, Strategy | Plan]): by the names of their rows. "dense" is measured in any case.
        texts (Sequence[FactText]): one or more.
        results (Results): gets a row of each strategy, see ``docs/cli.md``.
        seed (int): of strategies that draw random numbers. Default: 0.
        query_blocks (int): query blocks of each text to measure recall, oracle and output error in. Default: 6.
        on_step (Callable | None): called as ``on_step(done, total, text)`` before each step. Default: nothing.

    Returns:
        dict[str, str]: what went wrong, by name of the strategy.
    """
    strategies = _with_dense(strategies)
    missing = [name for name in strategies if "worst_recall" not in results.row(name)]
    if not missing:
        return {}
    steps = _Steps(on_step, len(texts) * len(dict.fromkeys(["dense", *missing])))
    failures: Failures = {}

    def read(name: str) -> tuple[list[_Read], Collector]:
        torch.manual_seed(seed)
        collector = Collector(subject.layers, subject.heads, query_blocks=query_blocks)
        found = []
        for text in texts:
            steps(name if len(texts) == 1 else f"{name}, {text.name}")
            with record(inspect=collector):
                found.append(_read(subject, strategies[name], text))
        return found, collector

    dense, of_dense = read("dense")
    for name in missing:
        try:
            found, collector = (dense, of_dense) if name == "dense" else read(name)
            row = _row(strategies[name], texts, dense, found, collector)
        except (ValueError, RuntimeError) as error:
            failures[name] = str(error)
            steps.skip_to_next(len(texts))
            continue
        results.put(name, row)
        results.order(list(strategies))
    results.write()
    return failures


@dataclass(frozen=True, eq=False)
class _Read:
    """What a model expected of a text."""

    nll: Tensor  # fp32 [body - 1], of the text alone
    answers: list[float]  # negative log-likelihood of each, per token
    exact: list[bool]
    log_probs: Tensor  # fp32 [answers, v], of the first token of each


def _read(subject: Subject, strategy: Strategy | Plan, text: FactText) -> _Read:
    # The first token has no prediction, so what expects token i stands at i - 1.
    at = [slice(answer.start - 1, answer.stop - 1) for answer in text.answers]
    last = text.tokens.shape[1] - 1
    found = subject.likelihood(strategy, text.tokens, last, [part.start for part in at])
    nll, greedy, truth = found.nll[0].cpu(), found.greedy[0].cpu(), text.tokens[0, 1:]
    if not bool(nll.isfinite().all()):
        raise ValueError("The model's predictions aren't finite numbers: try another dtype.")
    return _Read(
        nll[: len(text.body) - 1],
        [float(nll[part].mean()) for part in at],
        [bool((greedy[part] == truth[part]).all()) for part in at],
        found.log_probs[0].cpu(),
    )


def _row(
    strategy: Strategy | Plan, texts: Sequence[FactText], dense: list[_Read], found: list[_Read], collector: Collector
) -> dict[str, Any]:
    kept = collector.summary()
    reasons = kept.pop("dense_calls").keys() - {"strategy"}  # layers that a strategy leaves dense count as such
    if reasons:
        raise ValueError(f"It ran dense ({', '.join(sorted(reasons))}): take longer texts.")
    del kept["prompts"]
    pairs = list(zip(dense, found, strict=True))
    answers = [nll for one in found for nll in one.answers]
    exact = [hit for one in found for hit in one.exact]

    def perplexity(last: float = 1.0) -> float:
        return statistics.geometric_mean(perplexity_ratio(a.nll, b.nll, last) for a, b in pairs)

    return {
        **described(strategy),
        **kept,
        "kl_last_token": statistics.mean(float(kl_divergence(a.log_probs, b.log_probs).mean()) for a, b in pairs),
        "needle_nll": statistics.mean(answers),
        "needle_exact": statistics.mean(exact),
        "needles": len(exact),
        "perplexity_ratio": perplexity(SECOND_HALF),
        "perplexity_ratio_whole": perplexity(),
        "perplexity_ratio_last_quarter": perplexity(LAST_QUARTER),
        "by_prompt": {
            text.name: {"needle_nll": statistics.mean(one.answers), "needle_exact": statistics.mean(one.exact)}
            for text, one in zip(texts, found, strict=True)
        },
        "by_head": {name: _rounded(collector.arrays()[name].mean(0)) for name in ("density", "recall")},
    }


def described(strategy: Strategy | Plan) -> dict[str, Any]:
    """Label and options of a strategy, or of a plan, as they are written into rows."""
    if isinstance(strategy, Plan):
        layers = {str(index): to_config(one) for index, one in strategy.layers.items()}
        return {"strategy": "plan", "options": {"default": to_config(strategy.default), "layers": layers}}
    return {
        "strategy": strategy.label,
        "options": {key: value for key, value in to_config(strategy).items() if key != "name"},
    }


def _rounded(table: Tensor) -> list[list[float]]:
    return [[round(x, DIGITS) for x in row] for row in table.tolist()]


# Tasks


def measure_tasks(
    subject: Subject,
    strategies: Strategies,
    names: Sequence[str],
    results: Results,
    *,
    lengths: Sequence[int],
    samples: int = 1,
    depths: Sequence[float] = (),
    generate: bool = True,
    seed: int = 42,
    haystack: str | Path | None = None,
    on_step: OnStep | None = None,
) -> Failures:
    """Score strategies on tasks, the dense model beside them.

    Args:
        subject (Subject): the model.
        strategies (Mapping[str, Strategy | Plan]): by the names of their rows. "dense" is scored in any case.
        names (Sequence[str]): tasks, some of :func:`~sparse_prefill.tasks.list_tasks`.
        results (Results): under "tasks" gets the "results" of each sample, as :func:`~sparse_prefill.tasks.score`
            yields them without the text, and their "summary".
        lengths (Sequence[int]): tokens of prompt and answer.
        samples (int): samples of each task, length and depth. Default: 1.
        depths (Sequence[float]): where to put what is asked for, from 0 to 1. Default: none, i.e. drawn.
        generate (bool): let the model write answers, too. Default: True.
        seed (int): of the tasks. Default: 42.
        haystack (str | Path | None): text file that things are hidden in. Default: the language reference of Python.
        on_step (Callable | None): called as ``on_step(done, total, text)`` before each step. Default: nothing.

    Returns:
        dict[str, str]: what went wrong, by name of the strategy; it is left out of the tasks that follow.

    Raises:
        ValueError: if a task or a length can't be made.
    """
    strategies = _with_dense(strategies)
    found = results.content.setdefault("tasks", {"results": [], "summary": []})["results"]
    cells = [
        (task, length, depth, index)
        for task in names
        for length in lengths
        for depth in (depths or [None])
        for index in range(samples)
    ]
    known = {_key(one) for one in found if "accuracy" in one or not generate}
    steps = _Steps(on_step, sum((name, *cell) not in known for name in strategies for cell in cells))
    failures: Failures = {}
    for task, length, depth, index in cells:
        missing = [name for name in strategies if (name, task, length, depth, index) not in known]
        if not missing:
            continue
        made = tasks.make(
            task,
            length=length,
            encode=subject.encode,
            chat=subject.chat,
            index=index,
            depth=depth,
            seed=seed,
            haystack=haystack,
        )
        for name in missing:
            at = "" if depth is None else f" at {depth:.0%}"
            steps(f"{name}, {task} of {length}{at}")
            if name in failures:
                continue
            try:
                (result,) = tasks.score(subject, strategies[name], [made], generate=generate)
            except (ValueError, RuntimeError) as error:
                failures[name] = str(error)
                continue
            found[:] = [one for one in found if _key(one) != (name, task, length, depth, index)]
            # Rows are told apart by their names; labels leave options out.
            found.append({**result, "strategy": name, "grid": depth is not None, "text": None})
            del found[-1]["text"]
            results.write()
    complete = {(one["task"], one["length"]) for one in found if one["strategy"] == "dense"}
    results.content["tasks"]["summary"] = tasks.summary([x for x in found if (x["task"], x["length"]) in complete])
    results.write()
    return failures


def _key(result: Mapping[str, Any]) -> tuple:
    depth = result["depth"] if result["grid"] else None
    return result["strategy"], result["task"], result["length"], depth, result["index"]


# Time


def measure_times(
    subject: Subject,
    strategies: Strategies,
    tokens: Tensor,
    results: Results,
    *,
    repeats: int = 5,
    every: int = 1,
    on_step: OnStep | None = None,
) -> None:
    """Time the attention of each strategy on the model's own queries, keys and values; all take turns.

    Args:
        subject (Subject): the model.
        strategies (Mapping[str, Strategy | Plan]): by the names of their rows. "dense" is timed in any case.
        tokens (Tensor): token ids, int64 [1, s].
        results (Results): gets, in each row, "estimate_ms", "select_ms", "table_ms", "kernel_ms" and "attention_ms",
            medians averaged over layers, and "speedup_attention" over dense attention. Nothing is timed if all have it.
        repeats (int): runs of each, 1 or more. Default: 5.
        every (int): time one layer in this many. Default: 1.
        on_step (Callable | None): called as ``on_step(done, total, text)`` before each step. Default: nothing.
    """
    strategies = _with_dense(strategies)
    if all("speedup_attention" in results.row(name) for name in strategies):
        return
    found = time_layers(subject, strategies, tokens, repeats=repeats, every=every, dense=False, on_step=on_step)
    means = mean_times(found.values())
    for name, times in means.items():
        of_row = {f"{part}_ms": 1e3 * times[part] for part in (*STAGES, "attention")}
        of_row["speedup_attention"] = means["dense"]["attention"] / times["attention"]
        results.put(name, of_row)


def time_layers(
    subject: Subject,
    strategies: Strategies,
    tokens: Tensor,
    *,
    repeats: int,
    every: int,
    dense: bool = True,
    on_step: OnStep | None = None,
) -> dict[int, dict[str, dict[str, float]]]:
    """What :func:`~sparse_prefill.evaluation.timing.time_attention` finds, by layer. Args as for it and above."""
    check_tokens("repeats", repeats, least=1)
    check_tokens("every", every, least=1)
    places = layers_of(subject)
    prompt = Prompt(q_len=tokens.shape[1])  # one for all layers, as in a model
    steps = _Steps(on_step, len(places[::every]))
    found = {}

    def visit(index: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        steps(f"time layer {index}")
        bound = {name: strategy.for_layer(places[index]) for name, strategy in strategies.items()}
        q, k, v = (x.contiguous() for x in (q, k, v))
        found[index] = time_attention(q, k, v, bound, repeats=repeats, dense=dense, prompt=prompt)

    subject.capture(tokens, visit, every)
    return found


def mean_times(layers: Sequence[Mapping[str, Mapping[str, float]]] | Any) -> dict[str, dict[str, float]]:
    """Means over layers of times by name and part."""
    layers = list(layers)
    return {
        name: {part: statistics.mean(layer[name][part] for layer in layers) for part in parts}
        for name, parts in layers[0].items()
    }


def layers_of(subject: Subject) -> list[Layer]:
    """What strategies are told of each layer of a model."""
    found: list[Layer] = []
    subject.prefill(_Listener(found=found), torch.zeros(1, 2, dtype=torch.int64))
    return found


@dataclass(frozen=True, kw_only=True)
class _Listener(Strategy):
    """Dense attention that notes which layers ask for it."""

    found: list[Layer]

    def for_layer(self, layer: Layer) -> Strategy:
        self.found.append(layer)
        return get_strategy("dense")


def _with_dense(strategies: Strategies) -> dict[str, Strategy | Plan]:
    return {"dense": get_strategy("dense"), **strategies}


class _Steps:
    """Counts steps, and tells somebody."""

    def __init__(self, on_step: OnStep | None, total: int) -> None:
        self.on_step, self.total, self.done = on_step, total, 0

    def __call__(self, text: str) -> None:
        if self.on_step is not None:
            self.on_step(self.done, self.total, text)
        self.done += 1

    def skip_to_next(self, size: int) -> None:
        """Count what is left of a group of steps as done."""
        self.done = -(-self.done // size) * size
