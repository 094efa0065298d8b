"""The door into torchtune: any decoder of its builders with sparse prefill, and a loop to generate with it.

A :class:`~sparse_prefill.Prompt` passed through torchtune's own ``mask`` argument means "attend through the library";
every other mask means what it always meant there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchtune.generation import sample
from torchtune.modules import TransformerDecoder, TransformerSelfAttentionLayer
from torchtune.modules.common_utils import local_kv_cache

from sparse_prefill.core.layer import Layer
from sparse_prefill.core.option_checks import check_nonnegative, check_tokens
from sparse_prefill.core.prompt import Prompt
from sparse_prefill.models.torchtune.attention import SPARSE, rope_of, to_sparse
from sparse_prefill.packing import Packed, pack
from sparse_prefill.plan import Plan
from sparse_prefill.strategy import Strategy, get_strategy

Padding = Tensor | Sequence[int]
POSITIONS = 256  # whose logits are held at once


class LastTokenDecoder(TransformerDecoder):
    """torchtune's decoder with logits of the last positions only.

    A prompt of 128K tokens would have 94 GiB of logits in a vocabulary of 128K, and only the last row is read.

    Attributes:
        last (int): how many positions to keep. Default: 1.
        at (tuple[Tensor, Tensor] | None): rows and positions to keep instead, one of each row made of them, int64 [p]
            each. Default: None.
        hidden (bool): return normalised hidden states in place of logits. Default: False.
    """

    last: int = 1
    at: tuple[Tensor, Tensor] | None = None
    hidden: bool = False

    def unembed(self, h: Tensor) -> Tensor:
        """Hidden states [b, s, d] to fp32 logits [b, min(s, last), v] or [p, 1, v]."""
        h = h[:, max(h.shape[1] - self.last, 0) :] if self.at is None else h[self.at][:, None]
        return self.norm(h) if self.hidden else super().unembed(h)


def sparsify(model: TransformerDecoder, strategy: Strategy | Plan | str) -> LastTokenDecoder:
    """Give every layer of a decoder sparse prefill.

    Each layer's attention is replaced in place, with the same projections: parameters, their names, adapters and
    caches stay. Use the decoder that is returned, over the same layers: it computes the last position's logits only,
    and :func:`prefill`, :func:`generate` and :func:`score` take it. A model can be sparsified again with another
    strategy. torchtune's own ``generate`` passes a mask of tensors, and so still runs dense.

    Args:
        model (TransformerDecoder): a decoder of any builder whose layers are torchtune's self-attention layers.
        strategy (Strategy | Plan | str): a strategy, the name of one for its defaults, or a plan of several. Each
            layer gets what :meth:`~sparse_prefill.Strategy.for_layer` returns for it.

    Returns:
        LastTokenDecoder: the decoder.

    Raises:
        ValueError: if the strategy is unknown, the model is no plain decoder, or a layer attends in a way of its own
            (cross-attention, no causality); the model is then unchanged.

    Example:
        >>> model = sparsify(llama3_2_1b(), get_strategy("flex_prefill", gamma=0.95))
    """
    if isinstance(strategy, str):
        strategy = get_strategy(strategy)
    if not isinstance(strategy, (Strategy, Plan)):
        raise ValueError(f"strategy must be a Strategy, the name of one or a Plan, got {type(strategy).__name__}.")
    if type(model) not in (TransformerDecoder, LastTokenDecoder):
        raise ValueError(f"sparsify takes a torchtune TransformerDecoder, got {type(model).__name__}.")
    for index, layer in enumerate(model.layers):
        _check_layer(index, layer)
    count = len(model.layers)
    places = [Layer(i, count, rope_of(layer.attn)) for i, layer in enumerate(model.layers)]
    strategies = [strategy.for_layer(place) for place in places]
    for layer, place, one in zip(model.layers, places, strategies, strict=True):
        layer.attn = to_sparse(layer.attn, one, place)
    decoder = LastTokenDecoder(
        tok_embeddings=model.tok_embeddings,
        layers=model.layers,
        max_seq_len=model.max_seq_len,
        num_heads=model.num_heads,
        head_dim=model.head_dim,
        norm=model.norm,
        output=model.output,
        output_hidden_states=model.output_hidden_states,
    )
    decoder.decoder_max_cache_seq_len = model.decoder_max_cache_seq_len
    decoder.training = model.training
    return decoder


def _check_layer(index: int, layer: torch.nn.Module) -> None:
    attn: Any = getattr(layer, "attn", None)
    if type(layer) is not TransformerSelfAttentionLayer:
        raise ValueError(
            f"Layer {index} is a {type(layer).__name__}; sparse prefill needs a TransformerSelfAttentionLayer."
        )
    if type(attn) not in SPARSE:
        raise ValueError(
            f"Layer {index} attends with {type(attn).__name__}, whose rules the library doesn't know; sparse prefill "
            "needs torchtune's MultiHeadAttention or Gemma2Attention."
        )
    if not attn.is_causal:
        raise ValueError(f"Layer {index} attends without causality; sparse prefill is causal.")


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
    """Run tokens through the model, behind those that its caches hold already.

    Without caches, or with empty ones, the tokens are a whole prompt; called again they are the next chunk of it. A
    single token, or up to a strategy's ``max_decode_queries`` without ``total_len``, is a decoding step, which attends
    densely: speculative decoding verifies its guesses so.

    Args:
        model (LastTokenDecoder): a model from :func:`sparsify`.
        tokens (Tensor): token ids [b, s].
        left_padding (Tensor | Sequence[int] | None): padding tokens in front of each whole prompt, [b]. Each prompt
            is then attended by itself, on a block grid from its own first token on. Default: None.
        last (int): positions to compute logits of, 1 or more. Default: 1.
        prefill_chunk_size (int | None): run the tokens in chunks of this many, 2 or more, which bounds the memory that
            activations take. It needs caches. A single token that is left over goes along with the chunk before it.
            Default: None, i.e. all at once.
        total_len (int | None): tokens of the whole prompt, where others follow in later calls. Default: those so far.

    Returns:
        Tensor: fp32 logits of the last positions [b, min(s, last), v].

    Raises:
        ValueError: if the model wasn't sparsified, the tokens or the padding don't fit it, or chunks are asked for
            without caches.

    Example:
        >>> next_token = prefill(model, tokens)[:, -1].argmax(-1)
    """
    check_tokens("last", last, least=1)
    _check(model, tokens)
    left_padding = _padding(left_padding, len(tokens))
    if prefill_chunk_size is None:
        return _run(model, tokens, left_padding, last, total_len=total_len)
    check_tokens("prefill_chunk_size", prefill_chunk_size, least=2)
    if not model.caches_are_enabled():
        raise ValueError(
            "Chunks read those before them from caches: call model.setup_caches(), or leave prefill_chunk_size out."
        )
    if total_len is None:
        total_len = _held(model) + tokens.shape[1]
    found, behind = [], tokens.shape[1]
    for chunk in _chunks(tokens, prefill_chunk_size):
        behind -= chunk.shape[1]
        found.append(_run(model, chunk, left_padding, max(last - behind, 0), total_len=total_len))
    return torch.cat(found, dim=1)


def _chunks(tokens: Tensor, size: int) -> list[Tensor]:
    chunks = list(tokens.split(size, dim=1))
    if len(chunks) > 1 and chunks[-1].shape[1] == 1:  # alone it would be a decoding step, and attend densely
        chunks[-2:] = [torch.cat(chunks[-2:], dim=1)]
    return chunks


def _held(model: LastTokenDecoder) -> int:
    """Tokens that the caches hold."""
    return model.layers[0].attn.kv_cache.size if model.caches_are_enabled() else 0


def _run(
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
    _check_length(model, so_far if total_len is None else total_len)
    if left_padding is not None:  # the first chunks of a row may be nothing but padding
        left_padding = left_padding.clamp(max=so_far)
    prompt = Prompt(
        tokens.shape[1], so_far, model.layers[0].attn.strategy.block_size, left_padding, total_len=total_len
    )
    first = prompt.start(tokens.device)[:, None]
    input_pos = (prompt.query_positions(tokens.device) - first).clamp(min=0)  # [b or 1, s]
    return _forward(model, tokens, prompt, input_pos, last=last, hidden=hidden)


def _forward(model: LastTokenDecoder, tokens: Tensor, prompt: Prompt, input_pos: Tensor, **wanted: Any) -> Tensor:
    """Run the model, with other attributes than usual for what it computes at its end."""
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

    Each prompt is attended as if it were alone. Caches then hold keys and values of the rows, which
    :meth:`~sparse_prefill.packing.Packed.unpack_cache` takes apart; :func:`generate_packed` does.

    Args:
        model (LastTokenDecoder): a model from :func:`sparsify`, whose caches are empty if it has any.
        packed (Packed): what :func:`~sparse_prefill.packing.pack` made of the prompts.

    Returns:
        Tensor: fp32 logits after each prompt [prompts, v], in the order of the prompts.

    Raises:
        ValueError: if the model wasn't sparsified, its caches hold tokens, or the rows are longer than it takes.

    Example:
        >>> next_tokens = prefill_packed(model, pack(prompts)).argmax(-1)
    """
    tokens = packed.tokens
    _check(model, tokens)
    _check_length(model, tokens.shape[1])
    if held := _held(model):
        raise ValueError(f"Packed prompts need empty caches, and these hold {held} tokens: call model.reset_caches().")
    at = tuple(x.to(tokens.device) for x in (packed.rows, packed.starts + packed.lengths - 1))
    prompt = packed.prompt(model.layers[0].attn.strategy.block_size)
    return _forward(model, tokens, prompt, packed.positions.to(tokens.device), at=at)[:, 0]


@dataclass(frozen=True, eq=False)
class Generation:
    """What :func:`generate` made.

    Args:
        tokens (Tensor): new token ids [b, new]; a row that stopped repeats its stop token.
        prompt_logits (Tensor): fp32 logits after the prompt [b, v].
        prefill_seconds (float): time to the first new token. The first call in a process compiles the kernel in it.
        decode_seconds (float): time of all others.
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
    """Continue prompts: one sparse prefill, then token by token over the whole cache.

    Args:
        model (LastTokenDecoder): a model from :func:`sparsify`, without caches of its own.
        tokens (Tensor): token ids [b, s].
        max_new_tokens (int): tokens to add at most, 1 or more.
        stop_tokens (Sequence[int]): ids that end a row; the last row to end ends the call. Default: none.
        left_padding (Tensor | Sequence[int] | None): padding tokens in front of each prompt, [b]. Default: None.
        prefill_chunk_size (int | None): run the prompts in chunks of this many tokens, 2 or more. Default: None, i.e.
            in one piece.
        temperature (float): divides the logits before sampling; 0 takes the likeliest token. Default: 0.
        top_k (int | None): sample among this many of the likeliest tokens. Default: all.
        on_token (Callable[[Tensor], None] | None): called with new ids [b] as soon as they are known. Default: None.

    Returns:
        Generation: the new tokens, the logits after the prompt, and the seconds of both phases.

    Raises:
        ValueError: if the model wasn't sparsified or has caches, or the tokens, the padding or the number of new
            tokens don't fit it.

    Example:
        >>> generate(model, tokens, max_new_tokens=32, stop_tokens=tokenizer.stop_tokens).tokens
    """
    _check(model, tokens)
    batch, length = tokens.shape
    _check_new(model, length, max_new_tokens)
    left_padding = _padding(left_padding, batch, length)
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
    """Continue prompts of many lengths: one sparse prefill of packed rows, then all of them together.

    The prefill computes next to no padding. Behind it, keys and values move into a left-padded cache with a row for
    each prompt, and new tokens are decoded as :func:`generate` does.

    Args:
        model (LastTokenDecoder): a model from :func:`sparsify`, without caches of its own.
        prompts (Sequence[Tensor | Sequence[int]]): token ids of each prompt, on the model's device if they are
            tensors.
        max_new_tokens (int): tokens to add at most, 1 or more.
        capacity (int | None): tokens that a packed row may hold, at most what the model takes. Default: those of the
            longest prompt.
        stop_tokens, temperature, top_k, on_token: see :func:`generate`.

    Returns:
        Generation: as of :func:`generate`, in the order of the prompts.

    Raises:
        ValueError: as :func:`generate` and :func:`~sparse_prefill.packing.pack`.

    Example:
        >>> generate_packed(model, prompts, max_new_tokens=32, stop_tokens=tokenizer.stop_tokens).tokens
    """
    packed = pack(prompts, capacity=capacity)
    _check(model, packed.tokens)
    packed = replace(packed, tokens=packed.tokens.to(model.tok_embeddings.weight.device))
    _check_new(model, int(packed.lengths.max()), max_new_tokens)
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
    """Replace the caches of packed rows by those of a left-padded batch, layer by layer, with room for new tokens."""
    slots = int(packed.lengths.max()) + room
    for layer in model.layers:
        rows, layer.attn.kv_cache = layer.attn.kv_cache, None
        with rows.k_cache.device:
            layer.attn.setup_cache(len(packed), rows.k_cache.dtype, slots)
        layer.attn.kv_cache.update(packed.unpack_cache(rows.k_cache), packed.unpack_cache(rows.v_cache))


def _chooser(temperature: float, top_k: int | None) -> Callable[[Tensor], Tensor]:
    """From logits [b, v] to new ids [b]."""
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
    """Token by token behind a prefill that began at ``begin``."""
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


@dataclass(frozen=True, eq=False)
class Score:
    """What :func:`score` found.

    Args:
        nll (Tensor): negative log-likelihood of each answer token in nats, fp32 [b, answer].
        exact (Tensor): whether each token of the answer was the likeliest, bool [b].
    """

    nll: Tensor
    exact: Tensor


@torch.inference_mode()
def score(model: LastTokenDecoder, tokens: Tensor, answer: Tensor, *, left_padding: Padding | None = None) -> Score:
    """How likely an answer is, with prompt and answer inside one sparse prefill.

    The answer's tokens look the prompt up through the same blocks as the rest of it, unlike in :func:`generate`, where
    new tokens attend densely. Logits are computed at the answer's positions only, some hundred at a time.

    Args:
        model (LastTokenDecoder): a model from :func:`sparsify`.
        tokens (Tensor): token ids of the prompts [b, s].
        answer (Tensor): token ids of the answers [b, answer].
        left_padding (Tensor | Sequence[int] | None): padding tokens in front of each prompt, [b]. Default: None.

    Returns:
        Score: the likelihood of each token, and whether greedy decoding would give the answer.

    Raises:
        ValueError: if the model wasn't sparsified, or the tokens, the answer or the padding don't fit it.

    Example:
        >>> score(model, tokens, answer).nll.mean()
    """
    _check(model, tokens)
    if answer.ndim != 2 or answer.shape[0] != tokens.shape[0] or answer.shape[1] == 0:
        raise ValueError(f"answer must be token ids [{tokens.shape[0]}, 1 or more], got shape {list(answer.shape)}.")
    found = likelihood(model, torch.cat([tokens, answer], dim=1), last=answer.shape[1], left_padding=left_padding)
    return Score(found.nll, (found.greedy == answer).all(-1))


@dataclass(frozen=True, eq=False)
class Likelihood:
    """What :func:`likelihood` found, for each of the last tokens.

    Args:
        nll (Tensor): negative log-likelihood of the token in nats, given all before it, fp32 [b, last].
        greedy (Tensor): the likeliest token in its place, int64 [b, last].
        hidden (Tensor): normalised hidden states that predict it [b, last, d]; ``model.output`` makes logits of them.
    """

    nll: Tensor
    greedy: Tensor
    hidden: Tensor


@torch.inference_mode()
def likelihood(
    model: LastTokenDecoder, tokens: Tensor, *, last: int, left_padding: Padding | None = None
) -> Likelihood:
    """How likely each of the last tokens is, all of them inside one sparse prefill.

    Args:
        model (LastTokenDecoder): a model from :func:`sparsify`.
        tokens (Tensor): token ids [b, s].
        last (int): tokens to predict, at least 1 and fewer than s.
        left_padding (Tensor | Sequence[int] | None): padding tokens in front of each row, [b]. Default: None.

    Returns:
        Likelihood: of each token. Logits are computed some hundred positions at a time.

    Raises:
        ValueError: if the model wasn't sparsified, or the tokens, their number or the padding don't fit it.

    Example:
        >>> perplexity = likelihood(model, tokens, last=tokens.shape[1] // 2).nll.mean().exp()
    """
    _check(model, tokens)
    check_tokens("last", last, least=1)
    if last >= tokens.shape[1]:
        raise ValueError(f"last must leave a token to predict from, got last={last} of {tokens.shape[1]} tokens.")
    left_padding = _padding(left_padding, len(tokens), tokens.shape[1] - last)
    read = tokens[:, :-1]  # the last token has no successor to predict
    hidden = _run(model, read, left_padding, last, hidden=True)
    nll, greedy = [], []
    for part, target in zip(hidden.split(POSITIONS, 1), tokens[:, -last:].split(POSITIONS, 1), strict=True):
        logits = model.output(part).float()  # [b, positions, v]
        flat = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")
        nll.append(flat.view(target.shape))
        greedy.append(logits.argmax(-1))
    return Likelihood(torch.cat(nll, 1), torch.cat(greedy, 1), hidden)


def _check(model: LastTokenDecoder, tokens: Tensor) -> None:
    if not isinstance(model, LastTokenDecoder):
        raise ValueError(f"The model is a {type(model).__name__}: give it sparse prefill with sparsify() first.")
    if tokens.ndim != 2 or tokens.is_floating_point() or 0 in tokens.shape:
        raise ValueError(f"tokens must be whole numbers [batch, tokens], got {tokens.dtype} {list(tokens.shape)}.")


def _check_length(model: LastTokenDecoder, length: int) -> None:
    if length > model.max_seq_len:
        raise ValueError(f"The model takes {model.max_seq_len} tokens, got {length}: shorten the prompt.")


def _check_new(model: LastTokenDecoder, length: int, max_new_tokens: int) -> None:
    check_tokens("max_new_tokens", max_new_tokens, least=1)
    if length + max_new_tokens > model.max_seq_len:
        raise ValueError(
            f"A prompt of {length} tokens and {max_new_tokens} new ones don't fit into the model's "
            f"{model.max_seq_len}: shorten the prompt or ask for fewer."
        )


def _padding(left_padding: Padding | None, batch: int, length: int | None = None) -> Tensor | None:
    """Padding of each row as a tensor, which leaves a token of the first ``length``; else ValueError."""
    if left_padding is None:
        return None
    padding = torch.as_tensor(left_padding).cpu()
    if padding.shape != (batch,) or padding.is_floating_point() or padding.dtype == torch.bool:
        raise ValueError(
            f"left_padding must be {batch} whole numbers, one for each row of tokens, got {padding.dtype} of shape "
            f"{list(padding.shape)}."
        )
    if bool((padding < 0).any()):
        raise ValueError(f"left_padding must be 0 or more in each row, got {padding.tolist()}.")
    if length is not None and bool((padding >= length).any()):
        raise ValueError(f"left_padding must leave each row a token of its {length}, got {padding.tolist()}.")
    return padding
