"""Texts with hidden facts, and with questions and answers at their ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from sparse_prefill.core.files import read_text
from sparse_prefill.core.option_checks import check_tokens

PLACES = ("lighthouse", "observatory", "bakery", "harbour", "museum", "quarry")
FACT = " The secret access code of the {place} is {code}. "
QUESTION = "\n\nQuestion: What is the secret access code of the {place} mentioned in the text above?\nAnswer:"
ANSWER = " The secret access code of the {place} is"


@dataclass(frozen=True, eq=False)
class FactText:
    """A text with facts in its first half, and questions about them with their answers at its end.

    Args:
        name (str): name of the text in results.
        tokens (Tensor): token ids, int64 [1, s].
        answers (tuple[range, ...]): the range of tokens of each answer's code.
        body (range): the range of the text with its facts, without questions and answers.
    """

    name: str
    tokens: Tensor
    answers: tuple[range, ...]
    body: range


def hide_facts(
    name: str,
    text: Sequence[int],
    encode: Callable[[str], list[int]],
    *,
    tokens: int,
    facts: int = 1,
    skip: int = 0,
    seed: int = 0,
) -> FactText:
    """Hide facts in a text, and ask for them.

    Args:
        name (str): name of the text in results.
        text (Sequence[int]): token ids of the text.
        encode (Callable[[str], list[int]]): text to token ids, without tokens that begin or end a text.
        tokens (int): number of tokens of the result, including questions and answers.
        facts (int): facts to hide at even depths in the first half, at most six. Default: 1.
        skip (int): number of tokens to skip at the beginning of the text. Default: 0.
        seed (int): the codes depend on it, and on ``skip``. Default: 0.

    Returns:
        FactText: of exactly that many tokens.

    Raises:
        ValueError: if the text is too short, or a number is out of range.
    """
    check_tokens("tokens", tokens, least=1)
    check_tokens("facts", facts, least=1)
    check_tokens("skip", skip)
    check_tokens("seed", seed)
    if facts > len(PLACES):
        raise ValueError(f"facts must be at most {len(PLACES)}, got {facts}.")
    text = text[skip:]
    codes = [10**6 + (7919 * (i + 1) * (skip + 104_729) + 15_485_863 * seed) % (9 * 10**6) for i in range(facts)]
    asked = list(zip(PLACES, map(str, codes), strict=False))
    hidden = [encode(FACT.format(place=place, code=code)) for place, code in asked]
    end: list[int] = []
    answers = []
    for place, code in asked:
        end += encode(QUESTION.format(place=place)) + encode(ANSWER.format(place=place))
        answer = encode(f" {code}")
        answers.append(range(len(end), len(end) + len(answer)))
        end += answer
    room = tokens - len(end) - sum(map(len, hidden))
    if len(text) < room:
        raise ValueError(f"The text {name} has {len(text)} tokens; tokens={tokens} needs {room} of them.")
    if room < 2 * facts:
        raise ValueError(f"tokens={tokens} leaves no room for a text beside {facts} facts: take more tokens.")
    ids: list[int] = []
    begin = 0
    for i, fact in enumerate(hidden):
        depth = int((i + 0.5) / facts * room / 2)
        ids += [*text[begin:depth], *fact]
        begin = depth
    ids += text[begin:room]
    shifted = tuple(range(a.start + len(ids), a.stop + len(ids)) for a in answers)
    return FactText(name, torch.tensor([ids + end]), shifted, range(len(ids)))


def read_source(source: str | Path) -> str:
    """Text of a file, or of a source that comes with Python.

    Args:
        source (str | Path): "pydoc" for the language reference, "stdlib:NAME" for a module's source, else a file.

    Returns:
        str: the text.

    Raises:
        ValueError: if there is no such file or module, or it isn't text in UTF-8.
    """
    if source == "pydoc":
        from pydoc_data import topics

        return " ".join("\n".join(map(str, topics.topics.values())).split())
    path = Path(source)
    if str(source).startswith("stdlib:"):
        found = find_spec(str(source).removeprefix("stdlib:").partition(".")[0])
        path = Path(found.origin) if found is not None and found.origin else path
    try:
        return read_text(path, "text")
    except ValueError as error:
        raise ValueError(f"{source} can't be read as text ({error}): give a file, pydoc or stdlib:NAME.") from None
