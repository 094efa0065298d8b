"""Evaluate strategies on texts: density, recall, and the likelihood of answers and tokens."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_prefill import registry
from sparse_prefill.core.files import check_output
from sparse_prefill.evaluation import Collector, kl_divergence, perplexity_ratio
from sparse_prefill.evaluation.head_tables import estimate_head_table
from sparse_prefill.evaluation.results import Results
from sparse_prefill.evaluation.steps import Failures, OnStep, Steps, Strategies, reported_failures, with_dense
from sparse_prefill.evaluation.texts import FactText, hide_facts, read_source
from sparse_prefill.head_table import load_table, save_table
from sparse_prefill.models.at_length import layers_by, sparse_at_length, too_short
from sparse_prefill.models.eval_model import EvalModel
from sparse_prefill.plan import Plan
from sparse_prefill.record import record
from sparse_prefill.strategy import Strategy, as_strategy, to_config

DIGITS_BY_HEAD = 3  # of numbers for each layer and head
SECOND_HALF, LAST_QUARTER = 0.5, 0.25


def without_dense_rows(options: Mapping[str, Any], head_table: Callable[[], Path]) -> Strategy:
    """A strategy for an evaluation: without dense last rows by default, and with a table of heads if it needs one.

    Args:
        options (Mapping[str, Any]): name and options of the strategy. Given options stay.
        head_table (Callable[[], Path]): returns the file of a table, see :func:`saved_head_table`; called if needed.

    Returns:
        Strategy: the strategy. The same holds for a strategy that it wraps.

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


def saved_head_table(subject: EvalModel, tokens: Tensor, path: Path) -> Path:
    """The file of a table of heads, estimated and written unless it exists.

    Args:
        subject (EvalModel): the model.
        tokens (Tensor): a text that nothing else is measured on, int64 [1, s].
        path (Path): the file.

    Raises:
        ValueError: if the file exists and isn't a table of heads, or can't be written. Files are checked before the
            model runs.
    """
    if path.exists():
        load_table(path)
        return path
    target = check_output(path)
    table = estimate_head_table(subject, list(tokens))
    target.parent.mkdir(parents=True, exist_ok=True)
    save_table(table, target)
    return path


def text_with_facts(
    subject: EvalModel, settings: Mapping[str, Any], *, tokens: int, facts: int = 1, seed: int = 0
) -> FactText:
    """A text with facts, from the settings that reports hold.

    Args:
        subject (EvalModel): the model.
        settings (Mapping[str, Any]): "name"; "files", see :func:`~sparse_prefill.evaluation.texts.read_source`; and
            "skip", the number of tokens to skip at the beginning, default 0.
        tokens, facts, seed: see :func:`~sparse_prefill.evaluation.texts.hide_facts`.
    """
    ids = subject.encode("\n\n".join(read_source(file) for file in settings["files"]))
    skip = settings.get("skip", 0)
    return hide_facts(settings["name"], ids, subject.encode, tokens=tokens, facts=facts, skip=skip, seed=seed)


def measure_texts(
    subject: EvalModel,
    strategies: Strategies,
    texts: Sequence[FactText],
    results: Results,
    *,
    seed: int = 0,
    query_blocks: int = 6,
    on_step: OnStep | None = None,
) -> Failures:
    """Read texts with facts through each strategy; the answers are inside the sparse prefill.

    Texts run sparse however short they are. Sliding windows run as in use: those shorter than a strategy's
    ``min_length`` run dense. The row's "windows" and "dense_layers" list them.

    Args:
        subject (EvalModel): the model.
        strategies (Mapping[str, Strategy | Plan]): strategies by the names of their rows. "dense" is always measured.
        texts (Sequence[FactText]): one text or more.
        results (Results): gets a row for each strategy, see ``docs/cli.md``.
        seed (int): seed of strategies that draw random numbers. Default: 0.
        query_blocks (int): number of query blocks of each text in which recall, oracle and output error are measured.
            Default: 6.
        on_step (Callable | None): called as ``on_step(done, total, text)`` before each step. Default: nothing.

    Returns:
        dict[str, str]: the errors of strategies that failed, by name; also in the report, under "failures".

    Raises:
        ValueError: if there is no text, or not every layer of the model attends through the library.
        RuntimeError: if all strategies fail with the same one, as where the attention kernel can't run.
    """
    if not texts:
        raise ValueError("texts must be one or more, got none: see hide_facts.")
    strategies = with_dense(strategies)
    missing = [name for name in strategies if "worst_recall" not in results.row(name)]
    if not missing:
        return {}
    steps = Steps(on_step, len(texts) * len(dict.fromkeys(["dense", *missing])))
    errors: dict[str, Exception] = {}

    def read(name: str) -> tuple[list[_Read], Collector]:
        torch.manual_seed(seed)
        collector = Collector(subject.layers, subject.heads, query_blocks=query_blocks)
        found = []
        for text in texts:
            steps(name if len(texts) == 1 else f"{name}, {text.name}")
            with record(inspect=collector):
                found.append(_read(subject, strategies[name], text))
            if len(collector.windows) != len(found):  # hybrid models, whose calls would be counted to other layers
                raise ValueError(f"Not each of the {subject.layers} layers of {subject.name} attends sparsely.")
        return found, collector

    dense, of_dense = read("dense")
    for name in missing:
        try:
            found, collector = (dense, of_dense) if name == "dense" else read(name)
            row = _row(strategies[name], texts, dense, found, collector)
        except (ValueError, RuntimeError) as error:
            errors[name] = error
            steps.skip_to_next(len(texts))
            continue
        results.put(name, row)
        results.order(list(strategies))
    results.write()
    return reported_failures(strategies, errors, results)


@dataclass(frozen=True, eq=False)
class _Read:
    """The likelihood of a text under one strategy."""

    nll: Tensor  # fp32 [body - 1], of the text without questions and answers
    answers: list[float]  # negative log-likelihood of each, per token
    exact: list[bool]
    log_probs: Tensor  # fp32 [answers, v], of the first token of each


def _read(subject: EvalModel, strategy: Strategy | Plan, text: FactText) -> _Read:
    # The first token has no prediction, so the prediction of token i is at i - 1.
    at = [slice(answer.start - 1, answer.stop - 1) for answer in text.answers]
    last = text.tokens.shape[1] - 1  # the length of the prefill
    strategy = sparse_at_length(strategy, last, subject.device)
    found = subject.likelihood(strategy, text.tokens, last, [part.start for part in at])
    nll, greedy, truth = found.nll[0].cpu(), found.greedy[0].cpu(), text.tokens[0, 1:]
    if not bool(nll.isfinite().all()):
        raise ValueError("The model's predictions aren't finite: try another dtype.")
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
    for reasons, windows in zip(collector.dense_reasons, collector.windows, strict=True):
        if short := too_short(reasons, windows):
            raise ValueError(f"It ran dense ({', '.join(short)}): take longer texts.")
    del kept["prompts"], kept["dense_calls"]
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
        "dense_layers": layers_by(collector.dense_reasons[0]),
        "windows": layers_by(collector.windows[0]),
        "by_head": {name: _rounded(collector.arrays()[name].mean(0)) for name in ("density", "recall")},
    }


def described(strategy: Strategy | Plan) -> dict[str, Any]:
    """Label and options of a strategy or a plan, for its row."""
    if isinstance(strategy, Plan):
        layers = {str(index): to_config(one) for index, one in strategy.layers.items()}
        return {"strategy": "plan", "options": {"default": to_config(strategy.default), "layers": layers}}
    return {
        "strategy": strategy.label,
        "options": {key: value for key, value in to_config(strategy).items() if key != "name"},
    }


def _rounded(table: Tensor) -> list[list[float]]:
    return [[round(x, DIGITS_BY_HEAD) for x in row] for row in table.tolist()]
