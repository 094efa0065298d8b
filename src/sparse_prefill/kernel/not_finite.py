"""NaN and infinity among queries, keys and values: all rows that may attend to them get them, and no others.

A kernel by itself would hide them where their block isn't kept, and spread a value to all rows of its tile.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparse_prefill.core.logits import Logits
from sparse_prefill.core.prompt import Prompt

KEYS = 64  # with infinite entries, whose logits are looked at at once


def are_finite(*tensors: Tensor) -> bool:
    """Whether no entry is NaN or infinite: neither is the least or the largest then, which takes one pass.

    On a GPU the answer would have to be waited for, and a compiled function can't take two ways, so there it is always
    yes.
    """
    if torch.compiler.is_compiling() or any(x.device.type != "cpu" for x in tensors):
        return True
    return all(math.isfinite(bound.item()) for x in tensors for bound in _in_order(x.detach()).aminmax())


def _in_order(x: Tensor) -> Tensor:
    """x [B, H, N, D] as it lies in memory, where tokens come before heads, too: in strides it takes twice the time."""
    return x if x.is_contiguous() else x.transpose(1, 2)


def finite(x: Tensor) -> Tensor:
    """x with 0 for each entry that is NaN or infinite."""
    return torch.nan_to_num(x.detach(), nan=0.0, posinf=0.0, neginf=0.0)


def with_what_is_not_finite(out: Tensor, q: Tensor, k: Tensor, v: Tensor, prompt: Prompt, logits: Logits) -> Tensor:
    """Attention ``out`` over finite values, as if ``v`` were given, and keys that aren't kept were kept.

    Args:
        out (Tensor): attention over :func:`finite` values [B, Hq, M, Dv], which is changed.
        q (Tensor): queries [B, Hq, M, D].
        k (Tensor): keys [B, Hkv, N, D].
        v (Tensor): values [B, Hkv, N, Dv].
        prompt (Prompt): what the tokens are.
        logits (Logits): their soft cap makes infinite ones finite.

    Returns:
        Tensor: NaN where a row's query, or a key that it may attend to, makes a logit NaN or infinite; NaN or infinite
            where a value is that it may attend to; 0 in rows that may attend to nothing.
    """
    in_sight = _InSight(prompt, q)
    groups = k.shape[1], q.shape[1] // k.shape[1]
    grouped = out.unflatten(1, groups)  # [B, Hkv, group, M, Dv]
    for value in (math.inf, -math.inf):
        grouped += torch.where(in_sight.any(v == value), value, 0.0)[:, :, None]
    grouped.masked_fill_(in_sight.any(v.isnan())[:, :, None], math.nan)

    bad = in_sight.any(k.isnan().any(-1, keepdim=True))[:, :, None] | _logits_not_finite(q, k, prompt, logits)
    is_bad_query = q.isnan() if logits.softcap is not None else ~q.isfinite()
    bad = bad | is_bad_query.any(-1, keepdim=True).unflatten(1, groups)
    grouped.masked_fill_(bad, math.nan)
    return out.masked_fill_(in_sight.nothing, 0)


class _InSight:
    """Which tokens each row may attend to, a range for each."""

    def __init__(self, prompt: Prompt, q: Tensor) -> None:
        _, start, begin = prompt.mask_tensors(q.device, q.shape[0])
        begin = start[:, None].expand(-1, prompt.q_len) if begin is None else begin[:, : prompt.q_len]
        self.begin = begin.long()[:, None, :, None]  # [B, 1, M, 1]
        self.end = prompt.query_positions(q.device)[None, None, :, None] + 1
        self.nothing = self.begin >= self.end

    def any(self, flags: Tensor) -> Tensor:
        """Whether a flag [B, H, N, any] of a token in sight is set: [B, H, M, any]."""
        counts = pad(flags.cumsum(2, dtype=torch.int32), (0, 0, 1, 0))
        shape = (*flags.shape[:2], self.end.shape[2], flags.shape[3])
        before, until = (counts.gather(2, at.expand(shape)) for at in (self.begin, self.end))
        return until > before


def _logits_not_finite(q: Tensor, k: Tensor, prompt: Prompt, logits: Logits) -> Tensor:
    """Rows with a logit of NaN, or of infinity that no soft cap bends, from infinite keys: bool [B, Hkv, group, M, 1].

    A logit of minus infinity is that of a key without weight.
    """
    rows = prompt.query_positions(q.device)
    q = q.unflatten(1, (k.shape[1], -1)).float()
    found = torch.zeros(*q.shape[:-1], 1, dtype=torch.bool, device=q.device)
    for keys in k.isinf().any(-1).flatten(0, 1).any(0).nonzero().flatten().split(KEYS):
        some = k[:, :, keys].float()  # [B, Hkv, keys, D]
        products = q @ some.transpose(2, 3)[:, :, None]  # [B, Hkv, group, M, keys]
        bad = products.isnan() if logits.softcap is not None else products.isnan() | (products == math.inf)
        bad = bad & some.isinf().any(-1)[:, :, None, None] & prompt.may_attend(rows, keys)[:, :, None]
        found |= bad.any(-1, keepdim=True)
    return found
