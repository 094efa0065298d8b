"""A learned gate: attention between projected pools of blocks."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_prefill.core.key_blocks import of_key_blocks
from sparse_prefill.core.layer import Rope
from sparse_prefill.core.prompt import Prompt
from sparse_prefill.core.tensor_checks import check_one_document
from sparse_prefill.estimators.pooled import group_product

MASKED_LOGIT = -1e9  # of invisible blocks. Its exp is 0, and 0 times it isn't NaN, as in the KL divergence
MAX_ELEMENTS = 2**21  # of queries or keys whose rotation is undone at once


class HeadLinear(nn.Module):
    """A linear layer for each head, without bias.

    Args:
        weight (Tensor): [H, in, out].
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, h, n, in], h dividing H: [B, H, n, out]."""
        weight = self.weight.unflatten(0, (x.shape[1], -1))  # [h, H / h, in, out]
        return torch.einsum("bhni,hgio->bhgno", x, weight.float()).flatten(1, 2)


class AttentionGate(nn.Module):
    """SeerAttention's gate "Qavg_Kmaxminavg": attention between pooled blocks, trained to predict that of tokens.

    With Q_i the queries of block i and K_j the keys of block j before the rotary embedding, pools taken dimension by
    dimension over real tokens, and R(x, p) the rotary embedding of x at position p:

        q_i = R(W_q mean(Q_i), first position of block i)
        k_j = R(W_k [max(K_j), min(K_j), mean(K_j)], first position of block j)
        log score[i, j] = log softmax over the visible j of q_i . k_j / sqrt(D)

    W_q and W_k are matrices of each head. This is the prefill gate of SeerAttention (arXiv 2410.13276) as in its
    released code. Inputs are rotated queries and keys, whose rotation is undone before pooling. Without a rotary
    embedding they are pooled as they are.

    Weights order the dimensions of a head as transformers does, with halves that rotate together; ``rope`` says how
    the model orders them. Names and shapes of the state dict are those of the published gates, so that gates trained
    here run there and the other way round.

    Scratch memory is the pools, a second table of scores, and a few fp32 copies of 2^21 elements of queries or keys, or
    of one block of them if it has more.

    Args:
        key_weight (Tensor): W_k, [Hq, 3 d, D] for heads of dimension d and a gate of dimension D, inputs in the order
            maximum, minimum, mean; [Hkv, 3 d, D] if ``query_weight`` is given.
        query_weight (Tensor | None): W_q, [Hq, d, D]. Default: None, mean queries without a projection, with D = d.
        rope (Rope | None): the rotary embedding of the model's queries and keys. Default: None.

    Raises:
        ValueError: if the weights' shapes don't fit each other or the rotary embedding; at a call, if they don't fit
            the queries and keys, or if the prompt has several documents.
    """

    def __init__(self, key_weight: Tensor, query_weight: Tensor | None = None, rope: Rope | None = None) -> None:
        super().__init__()
        dim, width = _sizes(key_weight, query_weight)
        self.mask_linear_k = HeadLinear(key_weight)
        self.mask_linear_q = None if query_weight is None else HeadLinear(query_weight)
        self.rope = rope
        self.gate_rope = None if rope is None else _gate_rope(rope, dim, width)

    @classmethod
    def untrained(cls, heads: int, dim: int, rope: Rope | None = None, device: Any = None) -> AttentionGate:
        """A gate to start training from, for ``heads`` query heads of dimension ``dim``: it compares only the means."""
        weight = torch.zeros(heads, 3 * dim, dim, device=device)
        weight[:, 2 * dim :] = torch.eye(dim, device=device)
        return cls(weight, rope=rope)

    def forward(self, q: Tensor, k: Tensor, prompt: Prompt) -> Tensor:
        """Log-probabilities of key blocks, differentiable in the weights.

        Args:
            q (Tensor): queries [B, Hq, M, d].
            k (Tensor): keys [B, Hkv, N, d].
            prompt (Prompt): lengths and padding of the tokens.

        Returns:
            Tensor: fp32 [B, Hq, n_q, n_k]; about -1e9 for invisible blocks, so that their exp is 0. Rows of padding are
            undefined.
        """
        check_one_document("The attention gate", "a block may hold tokens of two of them", prompt)
        self._check(q, k)
        device, size = q.device, prompt.block_size
        start = prompt.start(device)[:, None]  # [B, 1]
        row, key = prompt.query_positions(device) - start, torch.arange(prompt.kv_len, device=device) - start

        q = self._pooled(q, prompt.real_queries(device), row, prompt, ("mean",))
        k = self._pooled_keys(k, key, prompt)
        q = q if self.mask_linear_q is None else self.mask_linear_q(q)
        k = self.mask_linear_k(k)
        if self.gate_rope is not None:
            q = self.gate_rope.rotate(q, row[:, None, ::size].clamp(min=0))
            k = self.gate_rope.rotate(k, key[:, None, ::size].clamp(min=0))
        logits = group_product(q * q.shape[-1] ** -0.5, k)
        return logits.masked_fill_(~prompt.visible(device), MASKED_LOGIT).log_softmax(-1)

    def _check(self, q: Tensor, k: Tensor) -> None:
        keys, queries = self.mask_linear_k.weight.shape, self.mask_linear_q
        heads = (q.shape[1], q.shape[1]) if queries is None else (queries.weight.shape[0], k.shape[1])
        if (q.shape[1], keys[0], keys[1]) != (heads[0], heads[1], 3 * q.shape[3]):
            shapes = [list(p.shape) for p in self.parameters()]
            raise ValueError(
                f"The gate was made for other heads: its weights are {' and '.join(map(str, shapes))}, q and k are "
                f"{list(q.shape)} and {list(k.shape)}. Take the weights of this model, and all heads of a layer."
            )

    def _pooled_keys(self, k: Tensor, positions: Tensor, prompt: Prompt) -> Tensor:
        """Pools of the key blocks; those of earlier chunks are read from the prompt's state if it has one."""
        real = prompt.real_keys(k.device)

        def pooled(part: Tensor) -> Tensor:
            begin = prompt.kv_len - part.shape[2]
            return self._pooled(part, real[:, begin:], positions[:, begin:], prompt, ("max", "min", "mean"))

        return pooled(k) if prompt.left_padding is not None else of_key_blocks("gate pools", k, prompt, pooled)

    def _pooled(self, x: Tensor, real: Tensor, positions: Tensor, prompt: Prompt, pools: tuple[str, ...]) -> Tensor:
        """Pools of each block before its rotary embedding, concatenated: [B, H, blocks, pools * d].

        Args:
            x (Tensor): rotated queries or keys [B, H, n, d].
            real (Tensor): which slots hold a real token, bool [B or 1, slots].
            positions (Tensor): positions of the tokens, int64 [B or 1, n].
            prompt (Prompt): the block size and whether there is left padding.
            pools (tuple[str, ...]): "mean", "max" or "min".
        """
        size = prompt.block_size
        blocks = max(1, MAX_ELEMENTS // (x.shape[0] * x.shape[1] * size * x.shape[3]))
        parts = []
        for begin in range(0, x.shape[2], blocks * size):
            part = slice(begin, begin + blocks * size)
            tokens = x[:, :, part]
            if self.rope is not None:
                tokens = self.rope.rotate(tokens, -positions[:, None, part].clamp(min=0))
            whole = prompt.left_padding is None and tokens.shape[2] % size == 0
            parts.append(_pool(tokens.float(), None if whole else real[:, part], size, pools))
        pooled = torch.cat(parts, dim=2)  # [B, H, blocks, pools, d]
        return (pooled if self.rope is None else _halves(pooled, self.rope)).flatten(3)


def _sizes(key_weight: Tensor, query_weight: Tensor | None) -> tuple[int, int]:
    """Dimensions of a head of the model and of the gate. Raise ValueError if the weights don't fit each other."""
    weights = [key_weight] if query_weight is None else [key_weight, query_weight]
    if all(weight.ndim == 3 for weight in weights):
        dim, width = (key_weight.shape[2],) * 2 if query_weight is None else query_weight.shape[1:]
        if key_weight.shape[1:] == (3 * dim, width):
            return dim, width
    raise ValueError(
        "The weights of a gate must be [Hq, 3 d, d] for keys only, or [Hkv, 3 d, D] for keys and [Hq, d, D] for "
        f"queries, got {' and '.join(str(list(weight.shape)) for weight in weights)}."
    )


def _pool(x: Tensor, real: Tensor | None, size: int, pools: tuple[str, ...]) -> Tensor:
    """Pools of x [B, H, n, d] over its ``real`` slots, None for all: [B, H, blocks, pools, d], 0 without tokens."""
    x = F.pad(x, (0, 0, 0, -x.shape[2] % size)).unflatten(2, (-1, size))
    if real is None:
        found = {"mean": lambda: x.mean(3), "max": lambda: x.amax(3), "min": lambda: x.amin(3)}
        return torch.stack([found[pool]() for pool in pools], dim=3)
    missing = ~real.unflatten(1, (-1, size))[:, None, ..., None]  # [B, 1, blocks, size, 1]
    count = (~missing).sum(3)
    found = {
        "mean": lambda: x.masked_fill(missing, 0).sum(3) / count.clamp(min=1),
        "max": lambda: x.masked_fill(missing, -torch.inf).amax(3),
        "min": lambda: x.masked_fill(missing, torch.inf).amin(3),
    }
    return torch.stack([found[pool]().masked_fill(count == 0, 0) for pool in pools], dim=3)


def _halves(x: Tensor, rope: Rope) -> Tensor:
    """Heads [..., d] with their dimensions in the half-split order."""
    if rope.layout == "half_split":
        return x
    width = 2 * len(rope.frequencies)
    return torch.cat([x[..., 0:width:2], x[..., 1:width:2], x[..., width:]], dim=-1)


def _gate_rope(rope: Rope, dim: int, width: int) -> Rope:
    """The rotary embedding of a gate of dimension ``width`` for a model with heads of dimension ``dim``."""
    if width == dim:
        return Rope("half_split", rope.frequencies)
    ratio = rope.frequencies[1] / rope.frequencies[0] if len(rope.frequencies) > 1 else 1.0
    plain = all(math.isclose(b / a, ratio, rel_tol=1e-3) for a, b in pairwise(rope.frequencies))
    if dim != 2 * len(rope.frequencies) or not plain:
        raise ValueError(
            f"A gate of dimension {width} for heads of {dim} needs a plain rotary embedding of the whole head, with "
            "one base for all frequencies: take a gate as wide as the heads."
        )
    return Rope("half_split", tuple(ratio ** (i * dim / width) for i in range(width // 2)))
