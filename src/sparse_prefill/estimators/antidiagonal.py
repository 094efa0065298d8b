"""Attention between strided tiles of queries and keys, by the sums along their antidiagonals."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_prefill.core.autocast import own_precision
from sparse_prefill.core.option_checks import check_tokens
from sparse_prefill.core.prompt import Prompt
from sparse_prefill.core.tensor_checks import check_one_document
from sparse_prefill.estimators.attention_mass import attention_mass, blocks_of_gpu, keys_to_multiply
from sparse_prefill.registry import register_estimator

STRIDES = (4, 8, 16)
BLOCKS = 8  # query blocks that a CPU computes at once


@register_estimator("antidiagonal")
@dataclass(frozen=True, kw_only=True)
class Antidiagonal:
    """Softmax over tiles of ``stride`` x ``stride`` token pairs, each scored by the mean along its antidiagonal.

    An antidiagonal meets every query and every key of its tile once, and crosses every column and every diagonal of
    the attention map. With the tokens of a tile side by side, those of the keys in reverse, it is attention of
    ``stride * D`` wide heads over ``stride`` times fewer tokens. Each query tile's softmax is summed over the tiles of
    each key block and averaged over the query tiles of its block, so that each query block's row sums to 1; the paper's
    block sum is this times the number of query tiles that hold a real token, ``block_size / stride`` in a full block.

    Key tiles lie on the grid of key positions, query tiles on that of query rows, so that none lies across two blocks.
    Both grids agree for offsets that are a multiple of ``stride``; for other offsets query tiles are shifted against
    key tiles, and so are the antidiagonals. A tile counts if any of its token pairs may attend, hence the tiles on the
    diagonal also see up to ``stride - 1`` later keys. Tokens that are missing in a tile, padding in front or behind the
    ragged end, count as zero vectors; tiles with none but such tokens don't count.

    On CPUs that multiply bf16, logits of bf16 inputs are rounded to it: see :func:`keys_to_multiply`. Besides one or
    two copies of the keys and what :func:`attention_mass` needs, scratch memory is
    B x Hq x (chunk * block_size / stride) x n_k in fp32 and, while chunks are put together, the scores once more.

    Args:
        stride (int): tokens in a tile, 4, 8 or 16: the work is a ``stride``-th of all products of queries and keys.
            Default: 8.
        chunk (int | None): query blocks to compute at once, at least 1. Default: 8 on a CPU; elsewhere as many as have
            2^28 logits, but no more than the larger of 8 and a quarter of all.

    Raises:
        ValueError: if an option is out of range; at a call, if the prompt is of several documents.
    """

    stride: int = 8
    chunk: int | None = None

    def __post_init__(self) -> None:
        check_tokens("stride", self.stride)
        if self.stride not in STRIDES:
            raise ValueError(f"stride must be one of {', '.join(map(str, STRIDES))}, got {self.stride!r}.")
        if self.chunk is not None:
            check_tokens("chunk", self.chunk, least=1)

    @own_precision
    def __call__(self, q: Tensor, k: Tensor, prompt: Prompt) -> Tensor:
        """Score.

        Args:
            q (Tensor): queries [B, Hq, M, D].
            k (Tensor): keys [B, Hkv, N, D].
            prompt (Prompt): what the tokens are.

        Returns:
            Tensor: fp32 [B, Hq, n_q, n_k].
        """
        check_one_document("The antidiagonal estimator", "a tile may lie across two of them", prompt)
        # Either side may be the reversed one; keys have fewer heads.
        real = prompt.real_keys(k.device)[:, : -(-prompt.kv_len // self.stride) * self.stride]
        keys = self._tiles(k, real, prompt).flip(3).flatten(3)  # [B, Hkv, tiles, stride * D]
        keys, rounded = keys_to_multiply(q, keys, prompt, prompt.block_size // self.stride)
        slots = prompt.real_queries(q.device)
        real = slots.unflatten(1, (-1, self.stride)).any(-1)  # [B, query tiles]
        held = q.shape[0] * q.shape[1] * prompt.kv_len * prompt.block_size // self.stride**2
        chunk = self.chunk or (BLOCKS if q.device.type == "cpu" else blocks_of_gpu(held, prompt.n_q))
        parts = [
            self._rows(q, keys, prompt, slots, real, (i, min(i + chunk, prompt.n_q)), rounded)
            for i in range(0, prompt.n_q, chunk)
        ]
        count = real.unflatten(1, (prompt.n_q, -1)).sum(-1).clamp(min=1)  # [B, n_q]
        return torch.cat(parts, dim=2).div_(count[:, None, :, None])

    def _rows(
        self, q: Tensor, keys: Tensor, prompt: Prompt, slots: Tensor, real: Tensor, part: tuple[int, int], rounded: bool
    ) -> Tensor:
        """Sums over the tiles of each query block from part[0] to before part[1]: fp32 [B, Hq, blocks, n_k]."""
        size, stride, device = prompt.block_size, self.stride, q.device
        tiles = size // stride
        begin, end = (block * size for block in part)
        queries = self._tiles(q[:, :, begin:end], slots[:, begin:end], prompt).flatten(3)  # [B, Hq, rows, stride * D]
        seen = min(-(-(prompt.offset + end) // size), prompt.n_k)  # later key blocks are in no row's sight
        free = (prompt.offset + begin) // stride if prompt.left_padding is None else 0  # earlier tiles in every row's

        last_query = torch.arange(begin + stride, end + 1, stride, device=device) + prompt.offset - 1  # [rows]
        behind = min(seen * size, keys.shape[2] * stride)
        first_key = torch.arange(free * stride, behind, stride, device=device)  # [columns]
        allowed = (first_key <= last_query.clamp(max=prompt.kv_len - 1)[:, None])[None, None]  # [1, 1, rows, columns]
        if prompt.left_padding is not None:
            behind_padding = first_key + stride > prompt.start(device)[:, None]  # [B, columns]
            allowed = allowed & behind_padding[:, None, None]

        # The mean along an antidiagonal, in place of the sum.
        scale = q.shape[-1] ** -0.5 / stride
        keys = keys[:, :, : seen * tiles]
        mass = attention_mass(queries, keys, allowed, tiles, scale, rounded=rounded)  # [B, Hq, rows, seen]
        if prompt.left_padding is not None or end > prompt.q_len:
            mass.masked_fill_(~real[:, None, begin // stride : end // stride, None], 0)
        return F.pad(mass.unflatten(2, (-1, tiles)).sum(3), (0, prompt.n_k - seen))

    def _tiles(self, x: Tensor, real: Tensor, prompt: Prompt) -> Tensor:
        """x [B, H, tokens, D] with zeros where no token is ``real``, bool [B, slots]: [B, H, tiles, stride, D]."""
        if x.shape[2] < real.shape[1]:
            x = F.pad(x, (0, 0, 0, real.shape[1] - x.shape[2]))
        if prompt.left_padding is not None:
            x = torch.where(real[:, None, :, None], x, 0)
        return x.unflatten(2, (-1, self.stride))
