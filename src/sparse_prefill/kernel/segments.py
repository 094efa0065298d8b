"""Segments: keys and values that belong to no token and share the softmax with those of the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparse_prefill.core.inputs import AttentionInputs


@dataclass(frozen=True, eq=False, kw_only=True)
class Segment:
    """Further keys and values of the same softmax that belong to no token, such as means of blocks.

    Segments follow the prompt's keys. Each begins at the start of a block.

    Args:
        k (Tensor): keys [B, Hkv, S, D].
        v (Tensor): values [B, Hkv, S, Dv].
        keep (Tensor): the keys that the rows of each query block attend to, bool [B or 1, Hq or 1, n_q, S].
        bias (float | Tensor): added to the logits of these keys: one number for all query heads, or one for each,
            [Hq]. Default: 0.
    """

    k: Tensor
    v: Tensor
    keep: Tensor
    bias: float | Tensor = 0.0


def check_segment(segment: Segment, inputs: AttentionInputs) -> None:
    """Raise ValueError unless the keys, values and table of a segment fit the inputs of the call."""
    q, slots = inputs.q, segment.k.shape[2]
    for name, x, like in (("keys", segment.k, inputs.k), ("values", segment.v, inputs.v)):
        want = (*like.shape[:2], slots, like.shape[3])
        if x.shape != want or x.dtype != like.dtype or x.device != like.device:
            raise ValueError(
                f"The {name} of a segment must be {like.dtype} on {like.device} and of shape {list(want)}, got "
                f"{x.dtype} on {x.device} and {list(x.shape)}."
            )
    want = (q.shape[0], q.shape[1], inputs.prompt.n_q, slots)
    keep = segment.keep
    fits = (
        keep.ndim == 4
        and keep.shape[2:] == want[2:]
        and keep.shape[0] in (1, want[0])
        and keep.shape[1] in (1, want[1])
    )
    if keep.dtype != torch.bool or not fits or keep.device != q.device:
        raise ValueError(
            f"The table of a segment must be bool on {q.device} and [batch or 1, query heads or 1, query blocks, keys] "
            f"= {list(want)}, got {keep.dtype} on {keep.device} of shape {list(keep.shape)}."
        )


def segment_table(segments: Sequence[Segment], block_size: int) -> Tensor:
    """The slots that each query block attends to, bool [B or 1, Hq or 1, n_q, slots]; segments fill whole blocks."""
    table = segments[0].keep[..., :0]
    for segment in segments:
        table = concat_columns(table, pad(segment.keep, (0, -segment.keep.shape[-1] % block_size)))
    return table


def concat_columns(a: Tensor, b: Tensor) -> Tensor:
    """Two tables [B or 1, H or 1, n_q, any] side by side."""
    shape = torch.broadcast_shapes(a.shape[:3], b.shape[:3])
    return torch.cat([a.expand(*shape, -1), b.expand(*shape, -1)], dim=-1)


def append_segments(x: Tensor, parts: Sequence[Tensor], block_size: int) -> Tensor:
    """Keys or values x [B, H, N, D] followed by those of segments, [B, H, S, D] each.

    Zeros fill the last block of x and of each segment.
    """
    return torch.cat([pad(part, (0, 0, 0, -part.shape[2] % block_size)) for part in (x, *parts)], dim=2)


def sink_segments(inputs: AttentionInputs) -> tuple[Segment, ...]:
    """The sinks as a segment of one zero key and value, whose logit is its bias; nothing if there are no sinks."""
    k, v, sinks = inputs.k, inputs.v, inputs.logits.sinks
    if sinks is None:
        return ()
    keep = inputs.prompt.visible(inputs.q.device).any(-1, keepdim=True)
    shape = (*k.shape[:2], 1)
    return (Segment(k=k.new_zeros(*shape, k.shape[3]), v=v.new_zeros(*shape, v.shape[3]), keep=keep, bias=sinks),)
