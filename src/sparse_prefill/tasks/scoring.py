"""Scores of tasks: by what a model writes, and by what it expects inside the sparse prefill."""

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

BEYOND = 0.5  # a model that scores less with dense attention tells nothing about sparse attention


def containment(task: Task, text: str) -> float:
    """Share of a task's answers that a text contains, whatever their case; 1 for any of them where one is enough."""
    found = [answer.lower() in text.lower() for answer in task.answers]
    return float(any(found)) if task.any_answer else statistics.mean(found)


def score(
    subject: EvalModel, strategy: Strategy | Plan | str, tasks: Iterable[Task], *, generate: bool = True
) -> Iterator[dict[str, Any]]:
    """Score a strategy on tasks, one after the other.

    Each task is scored twice. The model writes an answer with dense decoding, which finds what the sparse prefill has
    missed, if only it has a way to (``accuracy``). And it reads a right answer within the sparse prefill, with no row
    attended densely, the guard ``last`` of the strategy set to 0 (``nll``, ``exact``). Prompts run sparse however
    short they are, sliding windows as in use: those under the strategy's ``min_length`` dense.

    Args:
        subject (EvalModel): the model.
        strategy (Strategy | Plan | str): what attends; score "dense" as well, for :func:`summary`.
        tasks (Iterable[Task]): made with the model's tokenizer.
        generate (bool): let the model write answers, too. Default: True.

    Yields:
        dict[str, Any]: numbers, strings and None, of one task: its ``task`` name, ``length``, ``index``, ``seed`` and
        ``depth``; the ``strategy``'s label, "plan" for a plan; ``nll`` of the answers, per token; ``exact``, the share
        of the answers whose tokens are all the likeliest; ``density``, the share of the blocks that the prefill
        computed; ``dense_layers`` and ``windows``, layers by why they ran dense and by the tokens of their sliding
        windows; and, if it was to generate, ``accuracy``, see :func:`containment`, and the ``text`` that has it.

    Raises:
        ValueError: if a task is longer than the model takes, or so short that it can't run sparse, or the model's
            predictions aren't finite.

    Example:
        >>> for result in score(subject, "flex_prefill", [make("qa_1", length=4096, encode=subject.encode)]):
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
    # The prefill ends before the last token, which has nothing to predict.
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
        results (Sequence[Mapping[str, Any]]): of one model, those of "dense" among them.

    Returns:
        list[dict[str, Any]]: rows of ``task``, ``length``, ``strategy``, ``samples``, the means ``accuracy``,
        ``exact``, ``nll`` and ``density``; ``dense_layers`` and ``windows`` of the first sample; the ``dense_accuracy``
        and ``dense_exact`` of the same task and length; and ``beyond_model``: whether the dense accuracy is under 0.5,
        so that the row tells nothing about the strategy. Where nothing was generated, accuracies are None, and
        ``dense_exact`` decides. Results of earlier releases have no ``dense_layers`` and ``windows``.

    Raises:
        ValueError: if there are no dense results of a task and length.
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
                "beyond_model": (exact if accuracy is None else accuracy) < BEYOND,
            }
        )
    return rows


def _mean(key: str, group: Sequence[Mapping[str, Any]]) -> float | None:
    values = [result[key] for result in group if key in result]
    return statistics.mean(values) if values else None
