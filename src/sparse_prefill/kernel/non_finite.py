"""NaN and infinity in queries, keys and values reach all rows that may attend to their token, and no other rows.

The kernel itself would hide them where their block isn't kept, and would spread one value to all rows of its tile.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparse_prefill.core.inputs import AttentionInputs
from sparse_prefill.core.prompt import Prompt

KEYS_AT_ONCE = 64  # keys with infinite entries whose logits are held at once


def are_finite(*tensors: Tensor) -> bool:
    """Whether no entry is NaN or infinite, by the smallest and the largest entry, in one pass.

    Always True on a GPU, where the host would have to wait for the answer, and in a compiled function, which can't
    branch on it.
    """
    if torch.compiler.is_compiling() or any(x.device.type != "cpu" for x in tensors):
        return True
    return all(math.isfinite(bound.item()) for x in tensors for bound in _in_order(x.detach()).aminmax())


def _in_order(x: Tensor) -> Tensor:
    """x [B, H, N, D] in the order of its memory, [B, N, H, D] for some: a strided pass takes twice the time."""
    return x if x.is_contiguous() else x.transpose(1, 2)


def finite(x: Tensor) -> Tensor:
    """x with each NaN or infinite entry replaced by 0."""
    return torch.nan_to_num(x.detach(), nan=0.0, posinf=0.0, neginf=0.0)


def with_non_finite(out: Tensor, inputs: AttentionInputs) -> Tensor:
    """Propagate NaN and infinity of the inputs to ``out``.

    The result is that of attention over the inputs as they are, in which all visible keys count, kept or not.

    Args:
        out (Tensor): attention over :func:`finite` values [B, Hq, M, Dv], which is changed.
        inputs (AttentionInputs): the inputs, which aren't all finite. A soft cap makes infinite logits finite.

    Returns:
        Tensor: NaN in rows in which the query or a visible key makes a logit NaN or infinite; NaN or infinite where a
            visible value is; 0 in rows that see no key.
    """
    q, k, v = inputs.q, inputs.k, inputs.v
    visible = _VisibleKeys(inputs.prompt, q)
    groups = k.shape[1], q.shape[1] // k.shape[1]
    grouped = out.unflatten(1, groups)  # [B, Hkv, group, M, Dv]
    for value in (math.inf, -math.inf):
        grouped += torch.where(visible.any(v == value), value, 0.0)[:, :, None]
    grouped.masked_fill_(visible.any(v.isnan())[:, :, None], math.nan)

    bad = visible.any(k.isnan().any(-1, keepdim=True))[:, :, None] | _non_finite_logits(inputs)
    is_bad_query = q.isnan() if inputs.logits.softcap is not None else ~q.isfinite()
    bad = bad | is_bad_query.any(-1, keepdim=True).unflatten(1, groups)
    grouped.masked_fill_(bad, math.nan)
    return out.masked_fill_(visible.nothing, 0)


class _VisibleKeys:
    """The range of tokens that each row may attend to."""

    def __init__(self, prompt: Prompt, q: Tensor) -> None:
        _, start, begin = prompt.mask_tensors(q.device, q.shape[0])
        begin = start[:, None].expand(-1, prompt.q_len) if begin is None else begin[:, : prompt.q_len]
        self.begin = begin.long()[:, None, :, None]  # [B, 1, M, 1]
        self.end = prompt.query_positions(q.device)[None, None, :, None] + 1
        self.nothing = self.begin >= self.end

    def any(self, flags: Tensor) -> Tensor:
        """Whether the flag [B, H, N, any] of any visible token is set: [B, H, M, any]."""
        counts = pad(flags.cumsum(2, dtype=torch.int32), (0, 0, 1, 0))
        shape = (*flags.shape[:2], self.end.shape[2], flags.shape[3])
        before, until = (counts.gather(2, at.expand(shape)) for at in (self.begin, self.end))
        return until > before


def _non_finite_logits(inputs: AttentionInputs) -> Tensor:
    """The rows in which an infinite key makes a logit NaN or, without a soft cap, infinite: bool [B, Hkv, group, M, 1].

    A logit of minus infinity is fine: its key has no weight.
    """
    q, k, prompt, softcap = inputs.q, inputs.k, inputs.prompt, inputs.logits.softcap
    rows = prompt.query_positions(q.device)
    q = q.unflatten(1, (k.shape[1], -1)).float()
    found = torch.zeros(*q.shape[:-1], 1, dtype=torch.bool, device=q.device)
    for keys in k.isinf().any(-1).flatten(0, 1).any(0).nonzero().flatten().split(KEYS_AT_ONCE):
        some = k[:, :, keys].float()  # [B, Hkv, keys, D]
        products = q @ some.transpose(2, 3)[:, :, None]  # [B, Hkv, group, M, keys]
        bad = products.isnan() if softcap is not None else products.isnan() | (products == math.inf)
        bad = bad & some.isinf().any(-1)[:, :, None, None] & prompt.may_attend(rows, keys)[:, :, None]
        found |= bad.any(-1, keepdim=True)
    return found
