"""Run strategies sparse on texts of any length, as they run on long prompts; and list the layers that ran dense."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any, TypeVar, cast

import torch

from sparse_prefill.core.prompt import Prompt
from sparse_prefill.plan import Plan
from sparse_prefill.record import Call, SparseCallTensors
from sparse_prefill.strategy import Strategy

Choice = TypeVar("Choice", bound="Strategy | Plan")


def sparse_at_length(choice: Choice, tokens: int, device: str | torch.device = "cpu") -> Choice:
    """A strategy or a plan that runs prompts of a length sparse, and is unchanged otherwise.

    Every ``min_length``, also in a plan or a wrapper, becomes at most the length. It doesn't become 0: this would also
    run short sliding windows sparse, which run dense in use.

    Args:
        choice (Strategy | Plan): the strategy or plan.
        tokens (int): length of the prompt.
        device (str | torch.device): device of the prompt, for the default of ``min_length``. Default: "cpu".

    Returns:
        Strategy | Plan: the changed strategy or plan.
    """
    if isinstance(choice, Plan):
        layers = {index: sparse_at_length(one, tokens, device) for index, one in choice.layers.items()}
        return cast(Choice, Plan(default=sparse_at_length(choice.default, tokens, device), layers=layers))

    def inner(value: Any) -> Any:
        if isinstance(value, Strategy):
            return sparse_at_length(value, tokens, device)
        return {key: inner(one) for key, one in value.items()} if isinstance(value, Mapping) else value

    values = {field.name: inner(getattr(choice, field.name)) for field in fields(choice) if field.init}
    if "min_length" in values:  # wrappers take it from the wrapped strategy
        crossover = choice.crossover_of_gpu if torch.device(device).type == "cuda" else choice.crossover
        least = crossover if choice.min_length is None else choice.min_length
        values["min_length"] = min(least, tokens)
    return choice.with_fields(**values)


class LayersRun:
    """An inspector for :func:`~sparse_prefill.record` that lists dense calls and sliding windows of a prefill.

    Attributes:
        reasons (list[str | None]): the reason of each dense call, None for sparse calls.
        windows (list[int | None]): the sliding window of each call in tokens, None without one.
    """

    def __init__(self) -> None:
        self.reasons: list[str | None] = []
        self.windows: list[int | None] = []

    def __call__(self, call: Call, seen: SparseCallTensors, prompt: Prompt) -> None:
        self.dense(call, prompt)

    def dense(self, call: Call, prompt: Prompt) -> None:
        self.reasons.append(call.dense)
        self.windows.append(prompt.window)


def too_short(reasons: Iterable[str | None], windows: Iterable[int | None]) -> list[str]:
    """Reasons of dense layers that would run sparse in a longer prompt; the strategy and short windows are others."""
    found = {reason for reason, window in zip(reasons, windows, strict=True) if reason is not None and window is None}
    return sorted(found - {"strategy"})


def layers_by(values: Sequence[object] | Mapping[int, object]) -> dict[str, list[int]]:
    """Layers by their value, without those whose value is None: {"min_length": [0, 2]}."""
    found: dict[str, list[int]] = {}
    for layer, value in values.items() if isinstance(values, Mapping) else enumerate(values):
        if value is not None:
            found.setdefault(str(value), []).append(layer)
    return found
