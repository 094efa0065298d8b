"""Attention between tiles of queries and keys, scored along the antidiagonals of the tiles."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_prefill.core.autocast import own_precision
from sparse_prefill.core.option_checks import check_tokens
from sparse_prefill.core.prompt import Prompt
from sparse_prefill.core.tensor_checks import check_one_document
from sparse_prefill.estimators.attention_mass import attention_mass, center_keys, gpu_query_blocks
from sparse_prefill.registry import register_estimator

STRIDES = (4, 8, 16)
MAX_QUERY_BLOCKS_CPU = 8  # computed at once


@register_estimator("antidiagonal")
@dataclass(frozen=True, kw_only=True)
class Antidiagonal:
    """Softmax over tiles of ``stride`` x ``stride`` token pairs, each scored by the mean along its antidiagonal.

    With S the stride, tile t holds the tokens tS to tS + S - 1. For query tile I and key tile J:

        logit[I, J] = 1 / (S sqrt(D)) * sum over s = 0 to S - 1 of q[IS + S - 1 - s] . k[JS + s]
        P[I, J] = softmax of logit[I, J] over the tiles J that I sees
        score[i, j] = mean over the query tiles I of block i of the sum over the key tiles J of block j of P[I, J]

    An antidiagonal meets each query and each key of its tile once, and crosses all columns and diagonals of the
    attention map. This is the score of XAttention (arXiv 2503.16428). The paper sums over the query tiles instead of
    averaging, so its score is larger by the number of query tiles with a real token, ``block_size / stride`` in a full
    block. Here each query block's row sums to 1.

    A query tile sees a key tile if any of their token pairs may attend. So tiles on the diagonal also see up to
    ``stride - 1`` later keys. Key tiles start at key positions, query tiles at query rows, so that no tile lies in two
    blocks. If the offset of the queries isn't a multiple of ``stride``, query tiles are shifted against key tiles.
    Tokens that a tile lacks, left padding or beyond the end, count as zero vectors. A tile with no real token is left
    out.

    On CPUs that multiply bf16, the logits of bf16 inputs are rounded to bf16: see :func:`center_keys`. Scratch memory
    is one or two copies of the keys, the memory of :func:`attention_mass`, B x Hq x (chunk * block_size / stride) x n_k
    in fp32 and, while chunks are concatenated, a second copy of the scores.

    Args:
        stride (int): tokens in a tile, 4, 8 or 16. The number of products is that of dense attention divided by
            ``stride``. Default: 8.
        chunk (int | None): query blocks to compute at once, at least 1. Default: 8 on a CPU; elsewhere as many as have
            2^28 logits together, but at most the larger of 8 and a quarter of all.

    Raises:
        ValueError: if an option is out of range; at a call, if the prompt has several documents.
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
            prompt (Prompt): lengths and padding of the tokens.

        Returns:
            Tensor: fp32 [B, Hq, n_q, n_k].
        """
        check_one_document("The antidiagonal estimator", "a tile may hold tokens of two of them", prompt)
        # Either side may be reversed; keys have fewer heads.
        real = prompt.real_keys(k.device)[:, : -(-prompt.kv_len // self.stride) * self.stride]
        keys = self._tiles(k, real, prompt).flip(3).flatten(3)  # [B, Hkv, tiles, stride * D]
        keys, rounded = center_keys(q, keys, prompt, prompt.block_size // self.stride)
        slots = prompt.real_queries(q.device)
        real = slots.unflatten(1, (-1, self.stride)).any(-1)  # [B, query tiles]
        logits = q.shape[0] * q.shape[1] * prompt.kv_len * prompt.block_size // self.stride**2
        chunk = self.chunk or (MAX_QUERY_BLOCKS_CPU if q.device.type == "cpu" else gpu_query_blocks(logits, prompt.n_q))
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
        seen = min(-(-(prompt.offset + end) // size), prompt.n_k)  # no row sees later key blocks
        free = (prompt.offset + begin) // stride if prompt.left_padding is None else 0  # all rows see earlier ones

        last_query = torch.arange(begin + stride, end + 1, stride, device=device) + prompt.offset - 1  # [rows]
        stop = min(seen * size, keys.shape[2] * stride)
        first_key = torch.arange(free * stride, stop, stride, device=device)  # [columns]
        allowed = (first_key <= last_query.clamp(max=prompt.kv_len - 1)[:, None])[None, None]  # [1, 1, rows, columns]
        if prompt.left_padding is not None:
            has_real_token = first_key + stride > prompt.start(device)[:, None]  # [B, columns]
            allowed = allowed & has_real_token[:, None, None]

        scale = q.shape[-1] ** -0.5 / stride  # of the mean along an antidiagonal
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
