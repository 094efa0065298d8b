"""What the author of a task writes: a prompt whose length is still open."""

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
"""Depths in [0, 1] that tasks draw from: 40, evenly spaced, both ends included."""

registry = Registry("task", "sparse_prefill.tasks")
register_task = registry.register


@dataclass(frozen=True, kw_only=True)
class PromptTemplate:
    """A prompt that takes as many units of context (sentences, lines, words, documents) as fit.

    Args:
        before (str): what stands in front of the context.
        context (Callable[[int], str]): the context with so many units; more units are more text.
        after (str): what stands behind it, the question.
        prefix (str): how the answer begins; it belongs to the prompt, behind the assistant's tag.
        answers (Sequence[str]): strings that the answer should contain, in the order that the question asks for.
        max_new_tokens (int): tokens to generate.
        any_answer (bool): whether one of ``answers`` is enough. Default: False, all of them are wanted.
        depth (float | None): where what is asked for stands, 0 for the beginning and 1 for the end. Default: None, a
            task that has no such place.
        least (int): units below which the question has no answer. Default: 0.
        filler (Sequence[str]): words to fill up with where a whole unit doesn't fit. Default: those of noise lines.
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
    """What a task draws its prompt from.

    Args:
        rng (Random): source of all that is random in the prompt.
        depth (float | None): depth of what is asked for; drawn from ``DEPTHS`` where it is None.
        haystack (Haystack): where prose comes from.
    """

    def __init__(self, rng: Random, depth: float | None, haystack: Haystack) -> None:
        self.rng = rng
        self.depth = depth
        self.haystack = haystack

    def depths(self, count: int) -> list[float]:
        """Where to put ``count`` things, the one asked for (or the first of them) in front."""
        drawn = self.rng.sample(DEPTHS, count)
        return drawn if self.depth is None else [self.depth, *drawn[1:]]

    def prose(self) -> Callable[[int], list[str]]:
        """The first so many sentences of the haystack from a random one on; behind the last one, the first follows."""
        found = sentences(self.haystack)
        start = self.rng.randrange(len(found))
        return lambda count: [found[(start + i) % len(found)] for i in range(count)]

    def endless(self, draw: Callable[[Random], T]) -> Endless[T]:
        """Things that differ from each other, drawn one by one as they are wanted."""
        return Endless(distinct(draw, Random(self.rng.getrandbits(64))))


class Endless(Generic[T]):
    """The first items of a generator, kept, so that more of them begin with the same ones."""

    def __init__(self, items: Iterator[T]) -> None:
        self._items = items
        self._kept: list[T] = []

    def first(self, count: int) -> list[T]:
        """The first ``count`` items."""
        while len(self._kept) < count:
            self._kept.append(next(self._items))
        return self._kept[:count]


def distinct(draw: Callable[[Random], T], rng: Random) -> Iterator[T]:
    """What ``draw(rng)`` returns, again and again, without what was there before.

    Raises:
        ValueError: if there is nothing new in a thousand draws.
    """
    seen: set[T] = set()
    while True:
        for _ in range(1000):
            if (item := draw(rng)) not in seen:
                break
        else:
            raise ValueError(
                f"There are no more than about {len(seen)} different things to draw: take shorter prompts."
            )
        seen.add(item)
        yield item


def place(units: Sequence[str], things: Sequence[tuple[float, str]]) -> list[str]:
    """Units with things among them, each at its depth; of things at the same place, the first given comes first.

    The depth is the share of the units' characters in front, as near as the ends of units come to it: sentences are of
    many lengths.
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
    """Which of the ends, which don't fall, lies nearest to a share of the last one."""
    wanted = depth * ends[-1]
    before = bisect_right(ends, wanted) - 1
    if before == len(ends) - 1:
        return before
    return before + round((wanted - ends[before]) / (ends[before + 1] - ends[before]))
