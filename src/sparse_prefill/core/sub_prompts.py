"""Where a prompt divides: into the sequences of a padded or packed batch, or into chunks of rows."""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import NamedTuple

from sparse_prefill.core.prompt_shape import PromptShape
from sparse_prefill.core.token_mask import document_ids, end, start


class Span(NamedTuple):
    """A part of a prompt that is a prompt itself: keys [begin, end), with queries from ``first`` on.

    ``rows`` are its rows of the batch. All positions count from the first key of the whole prompt.
    """

    rows: slice
    first: int
    begin: int
    end: int


def sequence_spans(shape: PromptShape) -> list[Span]:
    """The prompts of a padded batch and the packed documents that have a query here."""
    spans = []
    for row in range(shape.batch):
        rows = slice(row, row + 1) if shape.batch > 1 else slice(None)
        for begin, stop in _sequences(shape, row):
            first = max(begin, shape.offset)
            if first < stop:
                spans.append(Span(rows, first, begin, stop))
    return spans


def _sequences(shape: PromptShape, row: int) -> list[tuple[int, int]]:
    """First token of each prompt or document in a row of the batch, and the token after its last one."""
    if shape.documents is None:
        return [(int(start(shape, "cpu")[row]), int(end(shape, "cpu")[row]))]
    lengths = document_ids(shape, "cpu")[row].unique_consecutive(return_counts=True)[1].tolist()
    ends = list(accumulate(lengths))
    return list(zip([0, *ends], ends, strict=False))


def chunk_spans(shape: PromptShape, blocks: int) -> list[Span]:
    """Chunks of ``blocks`` query blocks, each with the keys up to its end.

    The last chunk may have one block more, so that none is as short as a decode step.
    """
    last = max(shape.kv_len - shape.block_size, shape.offset + 1)
    edges = [*range(shape.offset, last, blocks * shape.block_size), shape.kv_len]
    return [Span(slice(None), first, 0, stop) for first, stop in pairwise(edges)]


def total_len_of(shape: PromptShape, span: Span) -> int | None:
    """``total_len`` of the prompt that a span is."""
    if shape.is_single:  # the tokens after it belong to the same prompt, whether total_len was given or not
        return shape.whole_len
    if shape.total_len is None:
        return None
    # A document that ends within the chunk is complete.
    return (shape.total_len if span.end == shape.kv_len else span.end) - span.begin
