"""Scores of tasks: written answers, and the likelihood of a right answer inside the sparse prefill."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from sparse_prefill.models.at_length import LayersRun, layers_by, sparse_at_length, too_short
from sparse_prefill.plan import Plan, with_options
from sparse_prefill.record import record
from sparse_prefill.strategy import Strategy, get_strategy
from sparse_prefill.tasks.task import Task

if TYPE_CHECKING:
    from sparse_prefill.models.eval_model import EvalModel

BEYOND_MODEL = 0.5  # below this score of the dense model, a task says nothing about sparse attention


def containment(task: Task, text: str) -> float:
    """Share of a task's answers that a text contains, ignoring case; 1 for any of them if one is enough."""
    found = [answer.lower() in text.lower() for answer in task.answers]
    return float(any(found)) if task.any_answer else statistics.mean(found)


def score(
    subject: EvalModel, strategy: Strategy | Plan | str, tasks: Iterable[Task], *, generate: bool = True
) -> Iterator[dict[str, Any]]:
    """Score a strategy on tasks, one after the other.

    Each task is scored twice. ``accuracy``: the model writes an answer with dense decoding, which can still find what
    the sparse prefill missed. ``nll`` and ``exact``: the model reads a right answer inside the sparse prefill; no row
    of it is dense, since the guard ``last`` of the strategy is set to 0. Prompts run sparse however short they are.
    Sliding windows run as in use: those shorter than the strategy's ``min_length`` run dense.

    Args:
        subject (EvalModel): the model.
        strategy (Strategy | Plan | str): the attention of the prefill. :func:`summary` also needs the scores of
            "dense".
        tasks (Iterable[Task]): tasks that were made with the model's tokenizer.
        generate (bool): also let the model write answers. Default: True.

    Yields:
        dict[str, Any]: the scores of one task:

        * "task", "length", "index", "seed" and "depth" of the task, and "strategy", the label, or "plan" for a plan;
        * "nll", negative log-likelihood of the answers in nats per token, and "exact", the share of the answers whose
          tokens are all the likeliest;
        * "density", the share of the visible blocks that the prefill computed;
        * "dense_layers", layers by the reason why they ran dense, and "windows", layers by the tokens of their sliding
          windows;
        * with ``generate``, the "text" that the model wrote and its "accuracy", see :func:`containment`.

    Raises:
        ValueError: if a task is longer than the model takes, or so short that it can't run sparse, or the model's
            predictions aren't finite.

    Example:
        >>> for result in score(model, "flex_prefill", [make("qa_1", length=4096, encode=model.encode)]):
        ...     print(result["accuracy"], result["nll"])
    """
    if isinstance(strategy, str):
        strategy = get_strategy(strategy)
    for task in tasks:
        result = {
            "task": task.name,
            "length": task.length,
            "index": task.index,
            "seed": task.seed,
            "depth": task.depth,
            "strategy": "plan" if isinstance(strategy, Plan) else strategy.label,
            **_read(subject, strategy, task),
        }
        if generate:
            prompt = torch.tensor([task.prompt])
            served = sparse_at_length(strategy, len(task.prompt), subject.device)
            text = subject.decode(subject.generate(served, prompt, task.max_new_tokens))
            result |= {"text": text, "accuracy": containment(task, text)}
        yield result


def _read(subject: EvalModel, strategy: Strategy | Plan, task: Task) -> dict[str, Any]:
    tokens = torch.tensor([[*task.prompt, *task.answer]])
    # The prefill ends before the last token, which predicts nothing.
    served = sparse_at_length(with_options(strategy, last=0), tokens.shape[1] - 1, subject.device)
    layers = LayersRun()
    with record(inspect=layers) as calls:
        found = subject.likelihood(served, tokens, last=len(task.answer))
    if short := too_short(layers.reasons, layers.windows):
        raise ValueError(f"{task.name} ran dense ({', '.join(short)}): take longer prompts.")
    hits = (found.greedy[0].cpu() == tokens[0, -len(task.answer) :]).tolist()
    if not bool(found.nll.isfinite().all()):
        raise ValueError("The model's predictions aren't finite: try another dtype.")
    nll = found.nll[0].tolist()
    return {
        "nll": statistics.mean(nll[i] for span in task.spans for i in span),
        "exact": statistics.mean(all(hits[i] for i in span) for span in task.spans),
        "density": statistics.mean(float(call.density.mean()) for call in calls),
        "dense_layers": layers_by(layers.reasons),
        "windows": layers_by(layers.windows),
    }


def summary(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Means of results of :func:`score` over the samples of each task, length and strategy.

    Args:
        results (Sequence[Mapping[str, Any]]): results of one model, including those of "dense".

    Returns:
        list[dict[str, Any]]: rows with

        * "task", "length", "strategy" and "samples";
        * the means "accuracy", "exact", "nll" and "density"; accuracies are None if nothing was generated;
        * "dense_layers" and "windows" of the first sample; results of earlier releases have none;
        * "dense_accuracy" and "dense_exact" of the same task and length;
        * "beyond_model", whether the dense accuracy is under 0.5 ("dense_exact" if nothing was generated), so that the
          row says nothing about the strategy.

    Raises:
        ValueError: if a task and length has no dense results.
    """
    groups: dict[tuple[str, int, str], list[Mapping[str, Any]]] = {}
    for result in results:
        groups.setdefault((result["task"], result["length"], result["strategy"]), []).append(result)
    rows = []
    for (task, length, strategy), group in groups.items():
        if (task, length, "dense") not in groups:
            raise ValueError(f"There are no dense results of {task} at {length} tokens: score 'dense' as well.")
        dense = groups[task, length, "dense"]
        accuracy, exact = _mean("accuracy", dense), statistics.mean(result["exact"] for result in dense)
        rows.append(
            {
                "task": task,
                "length": length,
                "strategy": strategy,
                "samples": len(group),
                **{key: _mean(key, group) for key in ("accuracy", "exact", "nll", "density")},
                **{key: group[0][key] for key in ("dense_layers", "windows") if key in group[0]},
                "dense_accuracy": accuracy,
                "dense_exact": exact,
                "beyond_model": (exact if accuracy is None else accuracy) < BEYOND_MODEL,
            }
        )
    return rows


def _mean(key: str, group: Sequence[Mapping[str, Any]]) -> float | None:
    values = [result[key] for result in group if key in result]
    return statistics.mean(values) if values else None
