"""Variable tracking: a value that is copied from variable to variable."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from random import Random
from string import ascii_uppercase

from sparse_prefill.tasks.prompt_template import DEPTHS, PromptTemplate, TaskSampler, place, register_task
from sparse_prefill.tasks.texts import NOISE

CHAIN = 5


@register_task("vt")
def vt(draw: TaskSampler) -> PromptTemplate:
    """A chain of five variables with one value, in noise lines that follow a worked example."""
    names = draw.endless(_name).first(2 * CHAIN)
    values = draw.endless(lambda rng: str(rng.randrange(10**4, 10**5))).first(2)
    depths = sorted(draw.rng.sample(DEPTHS, CHAIN))
    shown = zip(sorted(draw.rng.sample(DEPTHS, CHAIN)), _steps(names[CHAIN:], values[1]), strict=True)
    example = "\n".join(place([NOISE] * 2, list(shown)))
    steps = list(zip(depths, _steps(names[:CHAIN], values[0]), strict=True))
    return PromptTemplate(
        before=(
            "Follow how variables get their values in the text, and name all that hold a given value.\n\n"
            f"Example:\n\n{example}\n\n{_question(values[1])}\n{_prefix(values[1])} {', '.join(names[CHAIN:])}.\n\n"
            "Now the text in question:\n\n"
        ),
        context=lambda count: "\n".join(place([NOISE] * count, steps)),
        after=f"\n\n{_question(values[0])}",
        prefix=_prefix(values[0]),
        answers=names[:CHAIN],
        max_new_tokens=30,
    )


def _name(rng: Random) -> str:
    return "".join(rng.choices(ascii_uppercase, k=5))


def _steps(names: Sequence[str], value: str) -> list[str]:
    first = f"LET {names[0]} = {value}"
    return [first, *(f"LET {b} = {a}" for a, b in pairwise(names))]


def _question(value: str) -> str:
    return (
        f"Question: Which {CHAIN} variables hold the value {value}, given to them or copied, in the order of the text?"
    )


def _prefix(value: str) -> str:
    return f"The variables that hold the value {value} are"
