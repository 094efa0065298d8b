"""Prefill of prompts: whole, in chunks, and packed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparse_prefill.core.option_checks import check_tokens
from sparse_prefill.core.prompt import Prompt
from sparse_prefill.models.torchtune.checks import Padding, check_inputs, check_length, padding_tensor
from sparse_prefill.models.torchtune.decoder import LastTokenDecoder
from sparse_prefill.packing import Packed


@torch.inference_mode()
def prefill(
    model: LastTokenDecoder,
    tokens: Tensor,
    *,
    left_padding: Padding | None = None,
    last: int = 1,
    prefill_chunk_size: int | None = None,
    total_len: int | None = None,
) -> Tensor:
    """Run tokens through the model, after those in its caches.

    Without caches, or with empty ones, the tokens are a whole prompt. In later calls they are the next chunk. A single
    token is a decoding step, which runs dense. So are up to ``max_decode_queries`` tokens of a call without
    ``total_len``, such as the guesses of speculative decoding.

    Args:
        model (LastTokenDecoder): a model from :func:`sparsify`.
        tokens (Tensor): token ids [b, s].
        left_padding (Tensor | Sequence[int] | None): padding tokens before each whole prompt, [b]. Each prompt is
            then attended separately, on a block grid from its first token on. Default: None.
        last (int): number of last positions to compute logits of, 1 or more. Default: 1.
        prefill_chunk_size (int | None): run the tokens in chunks of this many, 2 or more, which limits the memory for
            activations. This needs caches. A single token that is left over joins the chunk before it. Default: None,
            i.e. all at once.
        total_len (int | None): tokens of the whole prompt, if later calls bring more. Default: the tokens so far.

    Returns:
        Tensor: fp32 logits of the last positions [b, min(s, last), v].

    Raises:
        ValueError: if the model wasn't sparsified, the tokens or the padding don't fit it, or there are chunks but no
            caches.

    Example:
        >>> next_token = prefill(model, tokens)[:, -1].argmax(-1)
    """
    check_tokens("last", last, least=1)
    check_inputs(model, tokens)
    left_padding = padding_tensor(left_padding, len(tokens))
    if prefill_chunk_size is None:
        return run_tokens(model, tokens, left_padding, last, total_len=total_len)
    check_tokens("prefill_chunk_size", prefill_chunk_size, least=2)
    if not model.caches_are_enabled():
        raise ValueError(
            "Chunks read earlier chunks from caches: call model.setup_caches(), or leave prefill_chunk_size out."
        )
    if total_len is None:
        total_len = _held(model) + tokens.shape[1]
    found, after = [], tokens.shape[1]
    for chunk in _chunks(tokens, prefill_chunk_size):
        after -= chunk.shape[1]
        found.append(run_tokens(model, chunk, left_padding, max(last - after, 0), total_len=total_len))
    return torch.cat(found, dim=1)


def _chunks(tokens: Tensor, size: int) -> list[Tensor]:
    chunks = list(tokens.split(size, dim=1))
    if len(chunks) > 1 and chunks[-1].shape[1] == 1:  # by itself it would be a decoding step, and dense
        chunks[-2:] = [torch.cat(chunks[-2:], dim=1)]
    return chunks


def _held(model: LastTokenDecoder) -> int:
    """Tokens in the caches."""
    return model.layers[0].attn.kv_cache.size if model.caches_are_enabled() else 0


def run_tokens(
    model: LastTokenDecoder,
    tokens: Tensor,
    left_padding: Tensor | None,
    last: int,
    *,
    total_len: int | None = None,
    hidden: bool = False,
) -> Tensor:
    """Logits [b, min(s, last), v] of the last positions, or their hidden states [b, min(s, last), d]."""
    so_far = _held(model) + tokens.shape[1]
    check_length(model, so_far if total_len is None else total_len)
    if left_padding is not None:  # the first chunks of a row may be all padding
        left_padding = left_padding.clamp(max=so_far)
    prompt = Prompt(
        tokens.shape[1], so_far, model.layers[0].attn.strategy.block_size, left_padding, total_len=total_len
    )
    first = prompt.start(tokens.device)[:, None]
    input_pos = (prompt.query_positions(tokens.device) - first).clamp(min=0)  # [b or 1, s]
    return _forward(model, tokens, prompt, input_pos, last=last, hidden=hidden)


def _forward(model: LastTokenDecoder, tokens: Tensor, prompt: Prompt, input_pos: Tensor, **wanted: Any) -> Tensor:
    """Run the model with ``wanted`` as its attributes, which select the output, and restore them."""
    usual = {name: getattr(model, name) for name in wanted}
    for name, value in wanted.items():
        setattr(model, name, value)
    try:
        return model(tokens, mask=prompt, input_pos=input_pos)
    finally:
        for name, value in usual.items():
            setattr(model, name, value)


@torch.inference_mode()
def prefill_packed(model: LastTokenDecoder, packed: Packed) -> Tensor:
    """Run prompts of many lengths through the model in few rows.

    Each prompt is attended as in a separate call. Afterwards, caches hold the keys and values of the rows;
    :meth:`~sparse_prefill.packing.Packed.unpack_cache` separates them by prompt, as ``generate_packed`` does.

    Args:
        model (LastTokenDecoder): a model from :func:`sparsify`, whose caches are empty if it has any.
        packed (Packed): the prompts, from :func:`~sparse_prefill.packing.pack`.

    Returns:
        Tensor: fp32 logits after each prompt [prompts, v], in the order of the prompts.

    Raises:
        ValueError: if the model wasn't sparsified, its caches hold tokens, or the rows are longer than it takes.

    Example:
        >>> next_tokens = prefill_packed(model, pack(prompts)).argmax(-1)
    """
    tokens = packed.tokens
    check_inputs(model, tokens)
    check_length(model, tokens.shape[1])
    if held := _held(model):
        raise ValueError(f"Packed prompts need empty caches, but these hold {held} tokens: call model.reset_caches().")
    at = tuple(x.to(tokens.device) for x in (packed.rows, packed.starts + packed.lengths - 1))
    prompt = packed.prompt(model.layers[0].attn.strategy.block_size)
    return _forward(model, tokens, prompt, packed.positions.to(tokens.device), at=at)[:, 0]
