"""Score strategies on tasks, with the dense model beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from sparse_prefill import tasks
from sparse_prefill.core.option_checks import check_tokens
from sparse_prefill.evaluation.results import Results
from sparse_prefill.evaluation.steps import Failures, OnStep, Steps, Strategies, reported_failures, with_dense
from sparse_prefill.models.eval_model import EvalModel
from sparse_prefill.plan import Plan
from sparse_prefill.strategy import Strategy


class Sample(NamedTuple):
    """One prompt of the grid: a task, a length, a depth (None if it is drawn) and a number."""

    task: str
    length: int
    depth: float | None
    number: int

    @property
    def label(self) -> str:
        """The sample in lines of progress."""
        return f"{self.task} of {self.length}" + ("" if self.depth is None else f" at {self.depth:.0%}")


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
    """Score strategies on tasks, with the dense model beside them.

    Args:
        subject (EvalModel): the model.
        strategies (Mapping[str, Strategy | Plan]): strategies by the names of their rows. "dense" is always scored.
        names (Sequence[str]): names of tasks, see :func:`~sparse_prefill.tasks.list_tasks`.
        results (Results): gets, under "tasks", the "results" of each sample, as :func:`~sparse_prefill.tasks.score`
            yields them without the text, and their "summary".
        lengths (Sequence[int]): tokens of prompt and answer together.
        samples (int): samples of each task, length and depth. Default: 1.
        depths (Sequence[float]): depths of the answer's place in the text, from 0 to 1. Default: none, i.e. drawn.
        generate (bool): also let the model write answers. Default: True.
        chat (bool): ask in the model's chat template, if it has one, and not in plain text. Default: True.
        seed (int): seed of the tasks. Default: 42.
        haystack (str | Path | None): text file to hide things in. Default: the language reference of Python.
        on_step (Callable | None): called as ``on_step(done, total, text)`` before each step. Default: nothing.

    Returns:
        dict[str, str]: the errors of strategies that failed, by name. They are left out of the remaining samples, and
        the errors are also in the report, under "failures".

    Raises:
        ValueError: if there is no task, length or sample, a task can't be made, or a length exceeds the model's.
        RuntimeError: if all strategies fail with the same one, as where the attention kernel can't run.
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
    every_depth: Sequence[float | None] = depths or [None]
    grid = [Sample(*sample) for sample in product(names, lengths, every_depth, range(samples))]
    known = {_key(one) for one in found if "accuracy" in one or not generate}
    steps = Steps(on_step, sum((name, *sample) not in known for name in strategies for sample in grid))
    errors: dict[str, Exception] = {}
    for sample in grid:
        missing = [name for name in strategies if (name, *sample) not in known]
        if not missing:
            continue
        task = tasks.make(
            sample.task,
            length=sample.length,
            encode=subject.encode,
            chat=subject.chat if chat else None,
            index=sample.number,
            depth=sample.depth,
            seed=seed,
            haystack=haystack,
        )
        for name in missing:
            steps(f"{name}, {sample.label}")
            if name in errors:
                continue
            try:
                result = _result(subject, name, strategies[name], task, sample, generate=generate)
            except (ValueError, RuntimeError) as error:
                errors[name] = error
                continue
            found[:] = [one for one in found if _key(one) != (name, *sample)]
            found.append(result)
            results.write()
    complete = {(one["task"], one["length"]) for one in found if one["strategy"] == "dense"}
    results.content["tasks"]["summary"] = tasks.summary([x for x in found if (x["task"], x["length"]) in complete])
    results.write()
    return reported_failures(strategies, errors, results)


def _result(
    subject: EvalModel, name: str, strategy: Strategy | Plan, task: tasks.Task, sample: Sample, *, generate: bool
) -> dict[str, Any]:
    """The scores of one strategy on one sample."""
    (result,) = tasks.score(subject, strategy, [task], generate=generate)
    result.pop("text", None)
    # Labels leave options out, so rows have the names that their strategies were given.
    return {**result, "strategy": name, "grid": sample.depth is not None}


def _key(result: Mapping[str, Any]) -> tuple:
    depth = result["depth"] if result["grid"] else None
    return result["strategy"], result["task"], result["length"], depth, result["index"]
