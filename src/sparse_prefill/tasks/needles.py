"""Needles in a haystack: entries of a register, hidden in other text."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from random import Random

from sparse_prefill.tasks.prompt_template import PromptTemplate, TaskSampler, place, register_task
from sparse_prefill.tasks.texts import NOISE, words

Make = Callable[[Random], str]


def name(rng: Random) -> str:
    """An adjective and a noun."""
    return f"{rng.choice(words('adjective'))}-{rng.choice(words('noun'))}"


def number(rng: Random) -> str:
    """Seven digits."""
    return str(rng.randrange(10**6, 10**7))


def code(rng: Random) -> str:
    """A UUID."""
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


@register_task("niah_single_1")
def single_1(draw: TaskSampler) -> PromptTemplate:
    """One number in noise lines."""
    return _needles(draw, haystack="noise")


@register_task("niah_single_2")
def single_2(draw: TaskSampler) -> PromptTemplate:
    """One number in prose."""
    return _needles(draw)


@register_task("niah_single_3")
def single_3(draw: TaskSampler) -> PromptTemplate:
    """One UUID in prose."""
    return _needles(draw, value=code)


@register_task("niah_multikey_1")
def multikey_1(draw: TaskSampler) -> PromptTemplate:
    """Four entries in prose; the question is about one of them."""
    return _needles(draw, others=3)


@register_task("niah_multikey_2")
def multikey_2(draw: TaskSampler) -> PromptTemplate:
    """One number, in lines that are all entries."""
    return _needles(draw, haystack="entries")


@register_task("niah_multikey_3")
def multikey_3(draw: TaskSampler) -> PromptTemplate:
    """One UUID under a UUID, in lines that are all entries."""
    return _needles(draw, haystack="entries", key=code, value=code)


@register_task("niah_multivalue")
def multivalue(draw: TaskSampler) -> PromptTemplate:
    """One name with four entries; the question is about all of them."""
    return _needles(draw, values=4)


@register_task("niah_multiquery")
def multiquery(draw: TaskSampler) -> PromptTemplate:
    """Four names with an entry each; the question is about all of them."""
    return _needles(draw, queries=4)


def _needles(
    draw: TaskSampler,
    *,
    haystack: str = "prose",
    key: Make = name,
    value: Make = number,
    queries: int = 1,
    values: int = 1,
    others: int = 0,
) -> PromptTemplate:
    """The question is about ``queries`` names with ``values`` entries each; ``others`` are further entries."""
    keys, codes = draw.endless(key), draw.endless(value)
    asked = queries * values
    kind = "The register entry" if values == 1 else "One register entry"

    def owners(count: int) -> list[str]:
        return keys.first(queries) * values + keys.first(queries + count - asked)[queries:]

    def lines(count: int) -> list[str]:
        pairs = zip(owners(count), codes.first(count), strict=True)
        return [f"{kind} for {who} is {what}." for who, what in pairs]

    depths = draw.depths(asked + others)  # those of the question come first
    needles = list(zip(depths, lines(asked + others), strict=True))
    joint = " " if haystack == "prose" else "\n"
    if haystack == "prose":
        units = draw.prose()
    elif haystack == "noise":
        units = lambda count: [NOISE] * count  # noqa: E731
    else:
        units = lambda count: lines(len(needles) + count)[len(needles) :]  # noqa: E731

    # The question asks for the order of the text.
    order = sorted(range(asked), key=lambda i: depths[i])
    names = list(dict.fromkeys(owners(asked)[i] for i in order))
    who = " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
    what = f"the register entry for {who}" if asked == 1 else f"the {asked} register entries for {who}"
    verb, wish = ("is", "") if asked == 1 else ("are", ", in the order of the text")
    return PromptTemplate(
        before="The text below contains entries of a register. Remember them: a question about them follows.\n\n",
        context=lambda count: joint.join(place(units(count), needles)),
        after=f"\n\nQuestion: What {verb} {what}{wish}?",
        prefix=f"T{what[1:]} {verb}",
        answers=[codes.first(asked)[i] for i in order],
        max_new_tokens=128,
        depth=depths[0],
    )
