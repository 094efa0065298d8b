"""Questions about numbered documents, all of them made up: answered by one of them, or by two together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import NamedTuple

from sparse_prefill.tasks.draft import Draft, Draw, Endless, distinct, place, register_task
from sparse_prefill.tasks.texts import words

FIRST = (
    *("Ada", "Anton", "Bela", "Bruno", "Clara", "Cyril", "Dora", "Edgar", "Elsa", "Felix", "Flora", "Georg", "Greta"),
    *("Hugo", "Ida", "Ivo", "Jana", "Jonas", "Karla", "Konrad", "Lena", "Leo", "Mara", "Milan", "Nadia", "Nils"),
    *("Olga", "Oskar", "Paula", "Pavel", "Rosa", "Rufus", "Selma", "Simon", "Tilda", "Tomas", "Ulla", "Viktor"),
    *("Wanda", "Xaver", "Yara", "Zeno"),
)
ENDINGS = ("ford", "ham", "wick", "stead", "mouth", "bury", "field", "brook")
BUILT = ("Bridge", "Tower", "Theatre", "Library", "Lighthouse", "Market", "Station", "Chapel")
TRADES = ("clockmaker", "baker", "printer", "surveyor", "teacher", "gardener", "mason", "weaver", "doctor", "pilot")
MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)


class Person(NamedTuple):
    """Somebody who never was; no two of them share a name, a town, a birthday or a work."""

    name: str
    town: str
    day: int
    month: str
    year: int
    trade: str
    work: str

    def document(self) -> str:
        """What there is to know of the person, the work aside."""
        first = self.name.split()[0]
        return (
            f"{self.name} was born in the town of {self.town} on {self.day} {self.month} {self.year}. "
            f"{first} learned the trade of a {self.trade} from an uncle, and kept a diary for most of a long life."
        )

    def work_document(self) -> str:
        """What there is to know of the work."""
        return (
            f"The {self.work} was designed by {self.name}. It took {2 + self.day % 7} years to build, "
            "was closed for repairs twice, and is open to visitors in summer."
        )


def people(rng: Random) -> Iterator[Person]:
    """Persons that share nothing."""

    def noun(rng: Random) -> str:
        return rng.choice(words("noun")).capitalize()

    names = distinct(lambda rng: f"{rng.choice(FIRST)} {noun(rng)}", rng)
    towns = distinct(lambda rng: noun(rng) + rng.choice(ENDINGS), rng)
    dates = distinct(lambda rng: (rng.randint(1, 28), rng.choice(MONTHS), rng.randint(1700, 1999)), rng)
    works = distinct(lambda rng: f"{noun(rng)} {rng.choice(BUILT)}", rng)
    while True:
        yield Person(next(names), next(towns), *next(dates), rng.choice(TRADES), next(works))


@register_task("qa_1")
def qa_1(draw: Draw) -> Draft:
    """A question that one document answers: where or when somebody was born."""
    known = Endless(people(Random(draw.rng.getrandbits(64))))
    asked = known.first(1)[0]
    question, prefix, answers = draw.rng.choice(
        [
            (f"In which town was {asked.name} born?", "in the town of", [asked.town]),
            (
                f"When was {asked.name} born?",
                "on",
                [f"{asked.day} {asked.month} {asked.year}", f"{asked.month} {asked.day}, {asked.year}"],
            ),
        ]
    )
    depth = draw.depths(1)[0]
    return _about(
        lambda count: place([p.document() for p in known.first(1 + count)[1:]], [(depth, asked.document())]),
        question,
        f"{asked.name} was born {prefix}",
        answers,
        depth,
    )


@register_task("qa_2")
def qa_2(draw: Draw) -> Draft:
    """A question that takes two documents: in which town the designer of a building was born."""
    known = Endless(people(Random(draw.rng.getrandbits(64))))
    asked = known.first(1)[0]
    depth, other = draw.depths(2)

    def documents(count: int) -> list[str]:
        # Of every two distractors, one is a person and one is a building, of somebody else.
        found = [p.document() if i % 2 else p.work_document() for i, p in enumerate(known.first(1 + count)[1:])]
        return place(found, [(depth, asked.document()), (other, asked.work_document())])

    return _about(
        documents,
        f"In which town was the designer of the {asked.work} born?",
        f"The designer of the {asked.work} was born in the town of",
        [asked.town],
        depth,
    )


def _about(
    documents: Callable[[int], list[str]], question: str, prefix: str, answers: Sequence[str], depth: float
) -> Draft:
    def context(count: int) -> str:
        return "\n\n".join(f"Document {i}: {text}" for i, text in enumerate(documents(count), start=1))

    return Draft(
        before="Answer the question at the end by means of these documents.\n\n",
        context=context,
        after=f"\n\nQuestion: {question}",
        prefix=prefix,
        answers=answers,
        max_new_tokens=32,
        any_answer=True,
        depth=depth,
    )
