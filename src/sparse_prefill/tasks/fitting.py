"""Text of exactly as many tokens as wanted."""

from __future__ import annotations

from collections.abc import Callable

from sparse_prefill.tasks.prompt_template import PromptTemplate

# What adds a token behind a word, in one tokenizer or another.
TOKENS = (" .", "\n", ".", " a", "!", " -", "-", " I", "x", "0")


def fit(name: str, draft: PromptTemplate, size: Callable[[str], int], length: int) -> str:
    """The text of a draft: as many units as fit, then words, then single tokens.

    Args:
        name (str): of the task, for messages.
        draft (PromptTemplate): the prompt.
        size (Callable[[str], int]): tokens of the whole task with this text.
        length (int): tokens that it has to have.

    Returns:
        str: the text.

    Raises:
        ValueError: if its fewest units are more than that, or the tokenizer has no single tokens to fill up with.
    """

    def text(units: int, filler: str = "") -> str:
        return draft.before + draft.context(units) + filler + draft.after

    def words(count: int) -> str:
        return "".join(f" {draft.filler[i % len(draft.filler)]}" for i in range(count))

    least = size(text(draft.least))
    if least > length:
        raise ValueError(f"{name} takes at least {least} tokens with this tokenizer, got length={length}.")
    units = _most(lambda count: size(text(count)), length, draft.least)
    filler = ""
    if draft.filler:
        filler = words(_most(lambda count: size(text(units, words(count))), length, 0))
    while (now := size(text(units, filler))) < length:
        for more in TOKENS:
            if now < size(text(units, filler + more)) <= length:
                filler += more
                break
        else:
            raise ValueError(f"{name} can't be filled up to length={length} with this tokenizer: take another length.")
    return text(units, filler)


def _most(size: Callable[[int], int], room: int, least: int) -> int:
    """The most units whose size is within the room; those of ``least`` are, and more of them are larger.

    Guesses by proportion between too few and too many, since each guess encodes a whole prompt.
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
