"""Strategies as they serve long prompts, measured on shorter ones; and which layers ran dense, and why."""

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
    """A strategy or a plan that runs prompts of so many tokens sparse, and does all else as in use.

    No ``min_length`` is more than the tokens, also not in a plan or within a wrapper. A ``min_length`` of 0 would run
    sliding windows sparse, too, which run dense in use where they are shorter than the ``min_length``.

    Args:
        choice (Strategy | Plan): what is measured.
        tokens (int): tokens of the prompt.
        device (str | torch.device): where it runs, for the default of ``min_length``. Default: "cpu".

    Returns:
        Strategy | Plan: of the same kind.
    """
    if isinstance(choice, Plan):
        layers = {index: sparse_at_length(one, tokens, device) for index, one in choice.layers.items()}
        return cast(Choice, Plan(default=sparse_at_length(choice.default, tokens, device), layers=layers))

    def inner(value: Any) -> Any:
        if isinstance(value, Strategy):
            return sparse_at_length(value, tokens, device)
        return {key: inner(one) for key, one in value.items()} if isinstance(value, Mapping) else value

    values = {field.name: inner(getattr(choice, field.name)) for field in fields(choice) if field.init}
    if "min_length" in values:  # wrappers take that of what they wrap
        crossover = choice.crossover_of_gpu if torch.device(device).type == "cuda" else choice.crossover
        least = crossover if choice.min_length is None else choice.min_length
        values["min_length"] = min(least, tokens)
    return choice.with_fields(**values)


class LayersRun:
    """An inspector for :func:`~sparse_prefill.record`: which calls of a prefill ran dense, and which had a window.

    Attributes:
        reasons (list[str | None]): why a call ran dense, None where it ran sparse.
        windows (list[int | None]): its sliding window in tokens, None without one.
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
    """Why layers ran dense that would run sparse in a longer prompt: neither by the strategy nor for a window."""
    found = {reason for reason, window in zip(reasons, windows, strict=True) if reason is not None and window is None}
    return sorted(found - {"strategy"})


def layers_by(values: Sequence[object] | Mapping[int, object]) -> dict[str, list[int]]:
    """Layers by what is said of them, those of which nothing is (None) left out: {"min_length": [0, 2]}."""
    found: dict[str, list[int]] = {}
    for layer, value in values.items() if isinstance(values, Mapping) else enumerate(values):
        if value is not None:
            found.setdefault(str(value), []).append(layer)
    return found
