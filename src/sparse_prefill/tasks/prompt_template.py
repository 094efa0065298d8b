"""Prompt templates, which leave the length open, and the random draws of tasks."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from random import Random
from typing import Generic, TypeVar

from sparse_prefill.registry import Registry
from sparse_prefill.tasks.texts import NOISE, Haystack, sentences

T = TypeVar("T")

DEPTHS = tuple(i / 39 for i in range(40))
"""The depths that tasks draw from: 40 evenly spaced numbers in [0, 1], both ends included."""

registry = Registry("task", "sparse_prefill.tasks")
register_task = registry.register


@dataclass(frozen=True, kw_only=True)
class PromptTemplate:
    """A prompt that takes as many units of context (sentences, lines, words, documents) as fit.

    Args:
        before (str): the text before the context.
        context (Callable[[int], str]): the context with a number of units; more units make more text.
        after (str): the text after the context, with the question.
        prefix (str): start of the answer; it is the end of the prompt, after the assistant's tag.
        answers (Sequence[str]): strings that the answer should contain, in the order that the question asks for.
        max_new_tokens (int): number of tokens to generate.
        any_answer (bool): whether one of ``answers`` is enough. Default: False, all of them are required.
        depth (float | None): depth of the answer's place in the context, 0 for the beginning and 1 for the end.
            Default: None, for tasks without such a place.
        least (int): the smallest number of units for which the question has an answer. Default: 0.
        filler (Sequence[str]): words to fill up with if no further unit fits. Default: those of noise lines.
    """

    before: str
    context: Callable[[int], str]
    after: str
    prefix: str
    answers: Sequence[str]
    max_new_tokens: int
    any_answer: bool = False
    depth: float | None = None
    least: int = 0
    filler: Sequence[str] = tuple(NOISE.split())


class TaskSampler:
    """The random draws of one prompt.

    Args:
        rng (Random): source of everything random in the prompt.
        depth (float | None): depth of the answer's place; drawn from ``DEPTHS`` if it is None.
        haystack (Haystack): source of the prose.
    """

    def __init__(self, rng: Random, depth: float | None, haystack: Haystack) -> None:
        self.rng = rng
        self.depth = depth
        self.haystack = haystack

    def depths(self, count: int) -> list[float]:
        """Depths of ``count`` things; the first is that of the answer."""
        drawn = self.rng.sample(DEPTHS, count)
        return drawn if self.depth is None else [self.depth, *drawn[1:]]

    def prose(self) -> Callable[[int], list[str]]:
        """A function of a count: so many sentences of the haystack from a random one on, starting over at its end."""
        found = sentences(self.haystack)
        start = self.rng.randrange(len(found))
        return lambda count: [found[(start + i) % len(found)] for i in range(count)]

    def endless(self, draw: Callable[[Random], T]) -> Endless[T]:
        """Distinct things, drawn one by one when they are needed."""
        return Endless(distinct(draw, Random(self.rng.getrandbits(64))))


class Endless(Generic[T]):
    """The first items of a generator; they are kept, so that longer lists begin with the same items."""

    def __init__(self, items: Iterator[T]) -> None:
        self._items = items
        self._kept: list[T] = []

    def first(self, count: int) -> list[T]:
        """The first ``count`` items."""
        while len(self._kept) < count:
            self._kept.append(next(self._items))
        return self._kept[:count]


def distinct(draw: Callable[[Random], T], rng: Random) -> Iterator[T]:
    """Results of ``draw(rng)`` without repetitions.

    Raises:
        ValueError: if a thousand draws give nothing new.
    """
    seen: set[T] = set()
    while True:
        for _ in range(1000):
            if (item := draw(rng)) not in seen:
                break
        else:
            raise ValueError(f"There are only about {len(seen)} different things to draw: take shorter prompts.")
        seen.add(item)
        yield item


def place(units: Sequence[str], things: Sequence[tuple[float, str]]) -> list[str]:
    """Insert things between units, each at its depth; things at the same place keep their order.

    The depth is the share of the units' characters before the thing. A thing goes to the nearest end of a unit.
    """
    ends = list(accumulate(map(len, units), initial=0))
    placed: list[str] = []
    begin = 0
    for depth, thing in sorted(things, key=lambda one: one[0]):
        end = _nearest(ends, depth)
        placed += [*units[begin:end], thing]
        begin = end
    return [*placed, *units[begin:]]


def _nearest(ends: Sequence[int], depth: float) -> int:
    """Index of the end that is nearest to a share of the last one; ends ascend."""
    wanted = depth * ends[-1]
    before = bisect_right(ends, wanted) - 1
    if before == len(ends) - 1:
        return before
    return before + round((wanted - ends[before]) / (ends[before + 1] - ends[before]))
