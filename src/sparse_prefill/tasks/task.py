"""A task: a prompt of an exact length, and its answers."""

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
        name (str): name of the task, see :func:`list_tasks`.
        length (int): tokens of the prompt and of the answer to generate, ``len(prompt) + max_new_tokens``.
        index (int): number of the sample.
        seed (int): seed of the sample.
        depth (float | None): depth of the answer's place in the context (of the first that was placed if there are
            several): 0 is the beginning, 1 the end. None for tasks without such a place.
        text (str): the user's message.
        prefix (str): start of the answer; it is part of the prompt.
        prompt (tuple[int, ...]): token ids of message and prefix.
        answers (tuple[str, ...]): strings that the answer should contain.
        any_answer (bool): whether one of them is enough.
        answer (tuple[int, ...]): token ids of a right answer, to read after the prompt.
        spans (tuple[range, ...]): the range in ``answer`` of each of its strings.
        max_new_tokens (int): number of tokens to generate.
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
    """Names of all tasks, sorted, including those of installed packages."""
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
        name (str): name of the task, see :func:`list_tasks`.
        length (int): tokens of the prompt and of the answer to generate together, exactly.
        encode (Callable[[str], Sequence[int]]): text to token ids, without tokens that begin or end a text.
        chat (Callable[[str], Sequence[int]] | None): a user's message to token ids, up to the start of the answer.
            Default: ``encode``, i.e. the plain text and a line break.
        index (int): number of the sample. Default: 0.
        depth (float | None): depth of the answer's place in the text, from 0 (beginning) to 1 (end). Default: one of 40
            evenly spaced depths, drawn by seed and index.
        seed (int): seed of everything random. Default: 42.
        haystack (str | Path | Sequence[str | Path] | None): text files for tasks that hide something in prose. Default:
            the language reference that comes with Python.

    Returns:
        Task: the sample.

    Raises:
        ValueError: if the task is unknown or has no answers, the length is too short for it, the depth is out of range
            or the task has none, or a file can't be read.

    Example:
        >>> task = make("niah_single_2", length=4096, encode=model.encode, chat=model.chat, depth=0.5)
        >>> len(task.prompt) + task.max_new_tokens
        4096
    """
    check_tokens("length", length, least=1)
    check_tokens("index", index)
    template = _draw(name, index=index, depth=depth, seed=seed, haystack=haystack)
    # The assistant's tag or a line break separates the message from the start of the answer.
    message, between = (encode, "\n") if chat is None else (chat, "")
    prefix = list(encode(f"{between}{template.prefix}"))
    answer, spans = _answer_ids(template, encode)
    new = max(template.max_new_tokens, len(answer))  # tokenizers with few characters per token need more
    text = fit(name, template, lambda text: len(message(text)) + len(prefix) + new, length)
    return Task(
        name=name,
        length=length,
        index=index,
        seed=seed,
        depth=template.depth,
        text=text,
        prefix=template.prefix,
        prompt=(*message(text), *prefix),
        answers=tuple(template.answers),
        any_answer=template.any_answer,
        answer=answer,
        spans=spans,
        max_new_tokens=new,
    )


def _draw(name: str, *, index: int, depth: float | None, seed: int, haystack: Haystack) -> PromptTemplate:
    """Draw a task's prompt, whose length is still open."""
    if depth is not None and not 0 <= depth <= 1:
        raise ValueError(f"depth must be in [0, 1], got {depth}.")
    sampler = TaskSampler(Random(f"{seed} {name} {index}"), depth, haystack)
    template: PromptTemplate = registry.factory(name)(sampler)
    if not template.answers:
        raise ValueError(f"The task {name} was drawn without answers: give its PromptTemplate at least one.")
    if depth is not None and template.depth is None:
        raise ValueError(f"{name} has nothing to put at a depth: leave depth out.")
    return template


def _answer_ids(template: PromptTemplate, encode: Encode) -> tuple[tuple[int, ...], tuple[range, ...]]:
    """Token ids of a right answer, and where in them each of its strings is."""
    ids: list[int] = []
    spans = []
    for text in template.answers[:1] if template.any_answer else template.answers:
        ids += encode(",") if ids else []
        found = encode(f" {text}")
        spans.append(range(len(ids), len(ids) + len(found)))
        ids += found
    return tuple(ids), tuple(spans)
