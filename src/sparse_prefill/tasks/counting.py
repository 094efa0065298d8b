"""Counting words: the common words of a list, and the frequent words of a coded text."""

from __future__ import annotations

import math
from collections.abc import Mapping
from random import Random
from string import ascii_lowercase

from sparse_prefill.tasks.prompt_template import PromptTemplate, TaskSampler, register_task
from sparse_prefill.tasks.texts import words

COMMON = 10
DOTS = "..."
ZETA_2 = math.pi**2 / 6


@register_task("cwe")
def cwe(draw: TaskSampler) -> PromptTemplate:
    """The ten common words of a numbered list, which follows a worked example.

    Common words occur 30 times and others 3 times. In lists that are too short for that they occur 20 times and twice,
    or 10 times and once. In lists with more places than words they occur more often, in the same proportion.
    """
    known = sorted({*words("noun"), *words("adjective"), *words("verb")})
    draw.rng.shuffle(known)
    common = _apart(known, 2 * COMMON)
    others = [word for word in known if word not in common]
    shown, asked = sorted(common[:COMMON]), sorted(common[COMMON:])
    seed = draw.rng.getrandbits(64)
    example = _numbered(dict.fromkeys(shown, 3) | dict.fromkeys(others[:5], 1), seed)

    def context(count: int) -> str:
        rare = max(min(3, count // 120), math.ceil(count / (len(others) + 10 * COMMON)))
        times = dict.fromkeys(asked, 10 * rare)
        left = count - 10 * rare * COMMON
        for i in range(math.ceil(left / rare)):
            times[others[i]] = min(rare, left - i * rare)
        return _numbered(times, seed)

    question = f"Question: Which {COMMON} words occur most often in the list? Name them in alphabetical order."
    prefix = f"The {COMMON} words that occur most often in the list are"
    return PromptTemplate(
        before=(
            "Below is a numbered list of words, in which some words occur far more often than others.\n\n"
            f"Example:\n\n{example}\n\n{question}\n{prefix} {', '.join(shown)}.\n\n"
            "Now the list in question:\n\n"
        ),
        context=context,
        after=f"\n\n{question}",
        prefix=prefix,
        answers=asked,
        max_new_tokens=120,
        least=12 * COMMON,
        filler=(),
    )


@register_task("fwe")
def fwe(draw: TaskSampler) -> PromptTemplate:
    """The three most frequent coded words of a text; counts fall with the square of the rank.

    Dots have the first rank and don't count as a word.
    """
    codes = draw.endless(lambda rng: "".join(rng.choices(ascii_lowercase, k=6)))
    seed = draw.rng.getrandbits(64)

    def context(count: int) -> str:
        ranks = math.isqrt(int(count / ZETA_2))  # the last rank that occurs
        times = {code: int(count / ZETA_2 / rank**2) for rank, code in enumerate(codes.first(ranks - 1), start=2)}
        return " ".join(_shuffled(times | {DOTS: count - sum(times.values())}, seed))

    return PromptTemplate(
        before="The text below is in a code of words and dots. The dots mean nothing.\n\n",
        context=context,
        after="\n\nQuestion: Which three coded words occur most often in the text? Begin with the most frequent one.",
        prefix="The three coded words that occur most often are",
        answers=codes.first(3),
        max_new_tokens=50,
        least=60,  # from this length on, the counts of the first ranks differ
        filler=(DOTS,),
    )


def _apart(known: list[str], count: int) -> list[str]:
    """The first words that no other word contains, so that an answer with another word doesn't contain them."""
    found: list[str] = []
    for word in known:
        if sum(word in other for other in known) == 1:
            found.append(word)
        if len(found) == count:
            break
    return found


def _shuffled(times: Mapping[str, int], seed: int) -> list[str]:
    """Each word as often as given, in random order."""
    found = [word for word, count in times.items() for _ in range(count)]
    Random(seed).shuffle(found)
    return found


def _numbered(times: Mapping[str, int], seed: int) -> str:
    return " ".join(f"{i}. {word}" for i, word in enumerate(_shuffled(times, seed), start=1))
