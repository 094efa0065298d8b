"""A task: a prompt of an exact length, and what a model should answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random

from sparse_prefill.core.option_checks import check_tokens
from sparse_prefill.tasks.fitting import fit
from sparse_prefill.tasks.prompt_template import PromptTemplate, TaskSampler, registry
from sparse_prefill.tasks.texts import Haystack

Encode = Callable[[str], Sequence[int]]


@dataclass(frozen=True)
class Task:
    """A prompt and its answer, as token ids.

    Args:
        name (str): the task, one of :func:`list_tasks`.
        length (int): tokens of the prompt and of the answer to generate, ``len(prompt) + max_new_tokens``.
        index (int): which sample of the task it is.
        seed (int): what it was drawn with.
        depth (float | None): where in the context the thing asked for stands (of several, the first that was placed):
            0 for its beginning, 1 for its end. None for tasks that have no such place.
        text (str): the user's message.
        prefix (str): how the answer begins; it belongs to the prompt.
        prompt (tuple[int, ...]): token ids of message and prefix.
        answers (tuple[str, ...]): strings that the answer should contain.
        any_answer (bool): whether one of them is enough.
        answer (tuple[int, ...]): token ids of a right answer, to read behind the prompt.
        spans (tuple[range, ...]): where in ``answer`` each of its strings stands.
        max_new_tokens (int): tokens to generate.
    """

    name: str
    length: int
    index: int
    seed: int
    depth: float | None
    text: str = field(repr=False)
    prefix: str
    prompt: tuple[int, ...] = field(repr=False)
    answers: tuple[str, ...]
    any_answer: bool
    answer: tuple[int, ...] = field(repr=False)
    spans: tuple[range, ...] = field(repr=False)
    max_new_tokens: int


def list_tasks() -> list[str]:
    """Names of all tasks, sorted, those of installed third-party packages included."""
    return registry.names()


def make(
    name: str,
    *,
    length: int,
    encode: Encode,
    chat: Encode | None = None,
    index: int = 0,
    depth: float | None = None,
    seed: int = 42,
    haystack: Haystack = None,
) -> Task:
    """Make one sample of a task. The same arguments make the same sample.

    Args:
        name (str): one of :func:`list_tasks`.
        length (int): tokens of the prompt and of the answer to generate together; the prompt is exactly as long.
        encode (Callable[[str], Sequence[int]]): text to token ids, without tokens that begin or end a text.
        chat (Callable[[str], Sequence[int]] | None): a user's message to token ids, up to where the answer begins.
            Default: ``encode``, i.e. the plain text and a line break.
        index (int): which sample. Default: 0.
        depth (float | None): where to put what is asked for, from 0 for the beginning to 1 for the end. Default: one of
            40 evenly spaced depths, by seed and index.
        seed (int): what all else is drawn with. Default: 42.
        haystack (str | Path | Sequence[str | Path] | None): text files, for the tasks that hide something in prose.
            Default: the language reference that comes with Python.

    Returns:
        Task: the sample.

    Raises:
        ValueError: if the task is unknown or has no answers, the length is shorter than it takes, the depth is out of
            range or the task has none, or a file can't be read.

    Example:
        >>> task = make("niah_single_2", length=4096, encode=subject.encode, chat=subject.chat, depth=0.5)
        >>> len(task.prompt) + task.max_new_tokens
        4096
    """
    check_tokens("length", length, least=1)
    check_tokens("index", index)
    if depth is not None and not 0 <= depth <= 1:
        raise ValueError(f"depth must be in [0, 1], got {depth}.")
    draw = TaskSampler(Random(f"{seed} {name} {index}"), depth, haystack)
    draft: PromptTemplate = registry.factory(name)(draw)
    if not draft.answers:
        raise ValueError(f"The task {name} was drawn without answers: give its PromptTemplate at least one.")
    if depth is not None and draft.depth is None:
        raise ValueError(f"{name} has nothing to put at a depth: leave depth out.")

    # The tag of the assistant or a line break stands between the message and the answer.
    message, between = (encode, "\n") if chat is None else (chat, "")
    behind = list(encode(f"{between}{draft.prefix}"))
    answer: list[int] = []
    spans = []
    for text in draft.answers[:1] if draft.any_answer else draft.answers:
        answer += encode(",") if answer else []
        ids = encode(f" {text}")
        spans.append(range(len(answer), len(answer) + len(ids)))
        answer += ids
    new = max(draft.max_new_tokens, len(answer))  # tokenizers of few characters need more
    text = fit(name, draft, lambda text: len(message(text)) + len(behind) + new, length)
    return Task(
        name=name,
        length=length,
        index=index,
        seed=seed,
        depth=draft.depth,
        text=text,
        prefix=draft.prefix,
        prompt=(*message(text), *behind),
        answers=tuple(draft.answers),
        any_answer=draft.any_answer,
        answer=tuple(answer),
        spans=tuple(spans),
        max_new_tokens=new,
    )
