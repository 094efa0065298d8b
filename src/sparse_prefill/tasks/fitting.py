"""Fit a prompt template to an exact number of tokens."""

from __future__ import annotations

from collections.abc import Callable

from sparse_prefill.tasks.prompt_template import PromptTemplate

# Texts that add a single token after a word, in one tokenizer or another.
SINGLE_TOKENS = (" .", "\n", ".", " a", "!", " -", "-", " I", "x", "0")


def fit(name: str, template: PromptTemplate, size: Callable[[str], int], length: int) -> str:
    """The text of a template: as many units as fit, then words, then single tokens.

    Args:
        name (str): name of the task, for messages.
        template (PromptTemplate): the prompt.
        size (Callable[[str], int]): number of tokens of the whole task with a text.
        length (int): number of tokens to reach.

    Returns:
        str: the text.

    Raises:
        ValueError: if its smallest number of units exceeds the length, or the tokenizer has no single tokens to fill
            the rest.
    """

    def text(units: int, filler: str = "") -> str:
        return template.before + template.context(units) + filler + template.after

    def words(count: int) -> str:
        return "".join(f" {template.filler[i % len(template.filler)]}" for i in range(count))

    least = size(text(template.least))
    if least > length:
        raise ValueError(f"{name} takes at least {least} tokens with this tokenizer, got length={length}.")
    units = _most(lambda count: size(text(count)), length, template.least)
    filler = ""
    if template.filler:
        filler = words(_most(lambda count: size(text(units, words(count))), length, 0))
    while (now := size(text(units, filler))) < length:
        for more in SINGLE_TOKENS:
            if now < size(text(units, filler + more)) <= length:
                filler += more
                break
        else:
            raise ValueError(f"{name} can't be filled up to length={length} with this tokenizer: take another length.")
    return text(units, filler)


def _most(size: Callable[[int], int], room: int, least: int) -> int:
    """The largest number of units that fits into the room, by interpolation search; ``least`` fits.

    Interpolation needs fewer guesses than bisection, and each guess encodes a whole prompt.
    """
    low, high = least, max(2 * least, 1)
    low_size = size(low)
    while (high_size := size(high)) <= room:
        low, low_size = high, high_size
        high *= 2
    while high - low > 1:
        guess = low + (high - low) * (room - low_size) // (high_size - low_size)
        guess = min(max(guess, low + 1), high - 1)
        if (guess_size := size(guess)) <= room:
            low, low_size = guess, guess_size
        else:
            high, high_size = guess, guess_size
    return low
