"""Generation: one sparse prefill, then dense decoding token by token."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torchtune.generation import sample
from torchtune.modules.common_utils import local_kv_cache

from sparse_prefill.core.option_checks import check_nonnegative
from sparse_prefill.models.torchtune.checks import Padding, check_inputs, check_new_tokens, padding_tensor
from sparse_prefill.models.torchtune.decoder import LastTokenDecoder
from sparse_prefill.models.torchtune.prefilling import prefill, prefill_packed
from sparse_prefill.packing import Packed, pack


@dataclass(frozen=True, eq=False)
class Generation:
    """New tokens and times of :func:`generate`.

    Args:
        tokens (Tensor): new token ids [b, new]. A stopped row repeats its stop token.
        prompt_logits (Tensor): fp32 logits after the prompt [b, v].
        prefill_seconds (float): time to the first new token. In the first call of a process, it includes compilation
            of the kernel.
        decode_seconds (float): time for all other new tokens.
    """

    tokens: Tensor
    prompt_logits: Tensor
    prefill_seconds: float
    decode_seconds: float


@torch.inference_mode()
def generate(
    model: LastTokenDecoder,
    tokens: Tensor,
    *,
    max_new_tokens: int,
    stop_tokens: Sequence[int] = (),
    left_padding: Padding | None = None,
    prefill_chunk_size: int | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    on_token: Callable[[Tensor], None] | None = None,
) -> Generation:
    """Continue prompts: one sparse prefill, then dense decoding token by token over the whole cache.

    Args:
        model (LastTokenDecoder): a model from :func:`sparsify`, without caches.
        tokens (Tensor): token ids [b, s].
        max_new_tokens (int): the most tokens to add, 1 or more.
        stop_tokens (Sequence[int]): ids that end a row. The call ends when all rows have. Default: none.
        left_padding (Tensor | Sequence[int] | None): padding tokens before each prompt, [b]. Default: None.
        prefill_chunk_size (int | None): run the prompts in chunks of this many tokens, 2 or more. Default: None, i.e.
            all at once.
        temperature (float): divides the logits before sampling; 0 selects the likeliest token. Default: 0.
        top_k (int | None): sample from this many of the likeliest tokens. Default: all.
        on_token (Callable[[Tensor], None] | None): called with new ids [b] as soon as they are known. Default: None.

    Returns:
        Generation: the new tokens, the logits after the prompt, and the seconds of both phases.

    Raises:
        ValueError: if the model wasn't sparsified or has caches, or the tokens, the padding or the number of new
            tokens don't fit it.

    Example:
        >>> generate(model, tokens, max_new_tokens=32, stop_tokens=tokenizer.stop_tokens).tokens
    """
    check_inputs(model, tokens)
    batch, length = tokens.shape
    check_new_tokens(model, length, max_new_tokens)
    left_padding = padding_tensor(left_padding, batch, length)
    choose = _chooser(temperature, top_k)
    begin = time.perf_counter()
    with _caches(model, batch, length + max_new_tokens):
        logits = prefill(model, tokens, left_padding=left_padding, prefill_chunk_size=prefill_chunk_size)
        return _decode(model, logits[:, -1], left_padding, choose, max_new_tokens, stop_tokens, on_token, begin)


@torch.inference_mode()
def generate_packed(
    model: LastTokenDecoder,
    prompts: Sequence[Tensor | Sequence[int]],
    *,
    max_new_tokens: int,
    capacity: int | None = None,
    stop_tokens: Sequence[int] = (),
    temperature: float = 0.0,
    top_k: int | None = None,
    on_token: Callable[[Tensor], None] | None = None,
) -> Generation:
    """Continue prompts of many lengths: one sparse prefill of packed rows, then decoding in one batch.

    The prefill computes almost no padding. Then keys and values move into a left-padded cache with a row for each
    prompt, and new tokens are decoded as in :func:`generate`.

    Args:
        model (LastTokenDecoder): a model from :func:`sparsify`, without caches.
        prompts (Sequence[Tensor | Sequence[int]]): token ids of each prompt, on the model's device if they are
            tensors.
        max_new_tokens (int): the most tokens to add, 1 or more.
        capacity (int | None): the most tokens in a packed row, at most the model's limit. Default: the tokens of the
            longest prompt.
        stop_tokens, temperature, top_k, on_token: see :func:`generate`.

    Returns:
        Generation: as for :func:`generate`, in the order of the prompts.

    Raises:
        ValueError: as in :func:`generate` and :func:`~sparse_prefill.packing.pack`.

    Example:
        >>> generate_packed(model, prompts, max_new_tokens=32, stop_tokens=tokenizer.stop_tokens).tokens
    """
    packed = pack(prompts, capacity=capacity)
    check_inputs(model, packed.tokens)
    packed = replace(packed, tokens=packed.tokens.to(model.tok_embeddings.weight.device))
    check_new_tokens(model, int(packed.lengths.max()), max_new_tokens)
    choose = _chooser(temperature, top_k)
    begin = time.perf_counter()
    with _caches(model, *packed.tokens.shape):
        logits = prefill_packed(model, packed)  # [prompts, v]
        _unpack_caches(model, packed, max_new_tokens)
        return _decode(model, logits, packed.left_padding, choose, max_new_tokens, stop_tokens, on_token, begin)


def _caches(model: LastTokenDecoder, batch: int, slots: int) -> AbstractContextManager[None]:
    weight = model.tok_embeddings.weight
    return local_kv_cache(model, batch_size=batch, device=weight.device, dtype=weight.dtype, decoder_max_seq_len=slots)


def _unpack_caches(model: LastTokenDecoder, packed: Packed, room: int) -> None:
    """Replace caches of packed rows by left-padded ones with ``room`` for new tokens, layer by layer."""
    slots = int(packed.lengths.max()) + room
    for layer in model.layers:
        rows, layer.attn.kv_cache = layer.attn.kv_cache, None
        with rows.k_cache.device:
            layer.attn.setup_cache(len(packed), rows.k_cache.dtype, slots)
        layer.attn.kv_cache.update(packed.unpack_cache(rows.k_cache), packed.unpack_cache(rows.v_cache))


def _chooser(temperature: float, top_k: int | None) -> Callable[[Tensor], Tensor]:
    """The function that selects new ids [b] by logits [b, v]."""
    check_nonnegative("temperature", temperature)
    if temperature == 0:
        return lambda logits: logits.argmax(-1)
    return lambda logits: sample(logits, temperature=temperature, top_k=top_k)[:, 0]


def _decode(
    model: LastTokenDecoder,
    prompt_logits: Tensor,
    left_padding: Padding | None,
    choose: Callable[[Tensor], Tensor],
    max_new_tokens: int,
    stop_tokens: Sequence[int],
    on_token: Callable[[Tensor], None] | None,
    begin: float,
) -> Generation:
    """Decode token by token after a prefill that began at time ``begin``."""
    device = prompt_logits.device
    stops = torch.tensor(list(stop_tokens), dtype=torch.int64, device=device)
    stopped = torch.zeros(len(prompt_logits), dtype=torch.bool, device=device)
    logits = prompt_logits
    new: list[Tensor] = []
    for step in range(max_new_tokens):
        if step:
            logits = prefill(model, new[-1][:, None], left_padding=left_padding)[:, -1]  # [b, v]
        ids = choose(logits)
        new.append(torch.where(stopped, new[-1], ids) if step else ids)
        stopped = stopped | torch.isin(new[-1], stops)
        done = bool(stopped.all())  # waits for the device
        if step == 0:
            prefill_seconds = time.perf_counter() - begin
        if on_token is not None:
            on_token(new[-1])
        if done:
            break
    return Generation(
        torch.stack(new, 1), prompt_logits, prefill_seconds, time.perf_counter() - begin - prefill_seconds
    )
