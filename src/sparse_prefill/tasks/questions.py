"""Questions about made-up numbered documents, which one document or two together answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random
from typing import NamedTuple

from sparse_prefill.tasks.prompt_template import Endless, PromptTemplate, TaskSampler, distinct, place, register_task
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
    """A made-up person; no two share a name, a town, a birthday or a work."""

    name: str
    town: str
    day: int
    month: str
    year: int
    trade: str
    work: str

    def life(self) -> str:
        """A document about the person, without the work."""
        first = self.name.split()[0]
        return (
            f"{self.name} was born in the town of {self.town} on {self.day} {self.month} {self.year}. "
            f"{first} learned the trade of a {self.trade} from an uncle, and kept a diary for most of a long life."
        )

    def building(self) -> str:
        """A document about the work."""
        return (
            f"The {self.work} was designed by {self.name}. It took {2 + self.day % 7} years to build, "
            "was closed for repairs twice, and is open to visitors in summer."
        )

    def market(self) -> str:
        """A document about the town."""
        return (
            f"The market of {self.town} dates from {self.year - 200}, and is known for its {self.trade}s. "
            "A river runs past it, and the road to the coast begins at its northern gate."
        )


def people(rng: Random) -> Iterator[Person]:
    """Persons without common names, towns, birthdays and works."""

    def noun(rng: Random) -> str:
        return rng.choice(words("noun")).capitalize()

    names = distinct(lambda rng: f"{rng.choice(FIRST)} {noun(rng)}", rng)
    towns = distinct(lambda rng: noun(rng) + rng.choice(ENDINGS), rng)
    dates = distinct(lambda rng: (rng.randint(1, 28), rng.choice(MONTHS), rng.randint(1700, 1999)), rng)
    works = distinct(lambda rng: f"{noun(rng)} {rng.choice(BUILT)}", rng)
    while True:
        yield Person(next(names), next(towns), *next(dates), rng.choice(TRADES), next(works))


@register_task("qa_1")
def qa_1(draw: TaskSampler) -> PromptTemplate:
    """A question that one document answers: where or when a person was born."""
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
    needed = [(draw.depths(1)[0], asked.life())]
    return _about(known, needed, question, f"{asked.name} was born {prefix}", answers)


@register_task("qa_2")
def qa_2(draw: TaskSampler) -> PromptTemplate:
    """A question that needs two documents: in which town the designer of a building was born."""
    known = Endless(people(Random(draw.rng.getrandbits(64))))
    asked = known.first(1)[0]
    depth, other = draw.depths(2)
    needed = [(depth, asked.life()), (other, asked.building())]
    question = f"In which town was the designer of the {asked.work} born?"
    prefix = f"The designer of the {asked.work} was born in the town of"
    return _about(known, needed, question, prefix, [asked.town])


def _about(
    known: Endless[Person], needed: list[tuple[float, str]], question: str, prefix: str, answers: Sequence[str]
) -> PromptTemplate:
    """A question about the first person; that person's documents are at their depths among those about others."""

    def context(count: int) -> str:
        others = known.first(1 + count)[1:]
        texts = [(one.building, one.life, one.market)[i % 3]() for i, one in enumerate(others)]
        return "\n\n".join(f"Document {i}: {text}" for i, text in enumerate(place(texts, needed), start=1))

    return PromptTemplate(
        before="Answer the question at the end by means of these documents.\n\n",
        context=context,
        after=f"\n\nQuestion: {question}",
        prefix=prefix,
        answers=answers,
        max_new_tokens=32,
        any_answer=True,
        depth=needed[0][0],
    )
