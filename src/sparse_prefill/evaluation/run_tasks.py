"""Score strategies on tasks, the dense model beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparse_prefill import tasks
from sparse_prefill.core.option_checks import check_tokens
from sparse_prefill.evaluation.results import Results
from sparse_prefill.evaluation.steps import Failures, OnStep, Steps, Strategies, with_dense
from sparse_prefill.models.eval_model import EvalModel


def measure_tasks(
    subject: EvalModel,
    strategies: Strategies,
    names: Sequence[str],
    results: Results,
    *,
    lengths: Sequence[int],
    samples: int = 1,
    depths: Sequence[float] = (),
    generate: bool = True,
    chat: bool = True,
    seed: int = 42,
    haystack: str | Path | None = None,
    on_step: OnStep | None = None,
) -> Failures:
    """Score strategies on tasks, the dense model beside them.

    Args:
        subject (EvalModel): the model.
        strategies (Mapping[str, Strategy | Plan]): by the names of their rows. "dense" is scored in any case.
        names (Sequence[str]): tasks, some of :func:`~sparse_prefill.tasks.list_tasks`.
        results (Results): under "tasks" gets the "results" of each sample, as :func:`~sparse_prefill.tasks.score`
            yields them without the text, and their "summary".
        lengths (Sequence[int]): tokens of prompt and answer.
        samples (int): samples of each task, length and depth. Default: 1.
        depths (Sequence[float]): where to put what is asked for, from 0 to 1. Default: none, i.e. drawn.
        generate (bool): let the model write answers, too. Default: True.
        chat (bool): ask in the model's chat template, if it has one, and not in plain text. Default: True.
        seed (int): of the tasks. Default: 42.
        haystack (str | Path | None): text file that things are hidden in. Default: the language reference of Python.
        on_step (Callable | None): called as ``on_step(done, total, text)`` before each step. Default: nothing.

    Returns:
        dict[str, str]: what went wrong, by name of the strategy; it is left out of the tasks that follow.

    Raises:
        ValueError: if there is no task, length or sample, a task can't be made, or a length is more than the model
            takes.
    """
    check_tokens("samples", samples, least=1)
    if not names or not lengths:
        raise ValueError(f"Give at least one task and one length, got {list(names)} and {list(lengths)}.")
    if max(lengths) > subject.max_tokens:
        raise ValueError(
            f"{subject.name} takes {subject.max_tokens} tokens, and a length is {max(lengths)}: shorten it."
        )
    strategies = with_dense(strategies)
    found = results.content.setdefault("tasks", {"results": [], "summary": []})["results"]
    grid: Sequence[float | None] = depths or [None]
    cells = [
        (task, length, depth, index)
        for task in names
        for length in lengths
        for depth in grid
        for index in range(samples)
    ]
    known = {_key(one) for one in found if "accuracy" in one or not generate}
    steps = Steps(on_step, sum((name, *cell) not in known for name in strategies for cell in cells))
    failures: Failures = {}
    for task, length, depth, index in cells:
        missing = [name for name in strategies if (name, task, length, depth, index) not in known]
        if not missing:
            continue
        made = tasks.make(
            task,
            length=length,
            encode=subject.encode,
            chat=subject.chat if chat else None,
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
            result.pop("text", None)
            # Rows are told apart by their names; labels leave options out.
            found.append({**result, "strategy": name, "grid": depth is not None})
            results.write()
    complete = {(one["task"], one["length"]) for one in found if one["strategy"] == "dense"}
    results.content["tasks"]["summary"] = tasks.summary([x for x in found if (x["task"], x["length"]) in complete])
    results.write()
    return failures


def _key(result: Mapping[str, Any]) -> tuple:
    depth = result["depth"] if result["grid"] else None
    return result["strategy"], result["task"], result["length"], depth, result["index"]
