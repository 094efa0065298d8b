"""The token-level rule of segments in the compiled kernel, and the tensors that the rule captures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparse_prefill.core.prompt import Prompt
from sparse_prefill.core.token_mask import MaskMod
from sparse_prefill.kernel.segments import Segment, segment_table

MIN_SEGMENT_TABLE = 1 << 20  # entries of a byte: 1 MB, enough for the sinks of 1M tokens
MIN_BIASES = 64  # entries


class SegmentTensors(NamedTuple):
    """The tensors that the rules of segments capture.

    Integers are int32, as are the positions in a GPU's kernel: int64 takes twice the registers.

    Shapes:
        first_slot: int32 [], the position of the first key after the prompt's blocks.
        size_log2: int32 [], of the block size.
        table: bool [entries], flat, padded to a power of two.
        strides: int32 [] each, of the table's batch, head and query block; int64 for tables of 2^31 entries or more.
        biases: for each segment, the position of its first key, int32 [], and its bias, fp32 [], or fp32 [Hq or more]
            if each head has its own.
    """

    first_slot: Tensor
    size_log2: Tensor  # torch 2.11 to 2.14 can't lower a division by a symbolic size for a GPU, but can lower a shift
    table: Tensor
    strides: tuple[Tensor, Tensor, Tensor]
    biases: tuple[tuple[Tensor, Tensor], ...]


def segment_tensors(segments: Sequence[Segment], prompt: Prompt) -> SegmentTensors:
    """The captured tensors of segments that follow the keys of a prompt."""
    size, device = prompt.block_size, segments[0].k.device

    def scalar(value: float, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.full((), value, dtype=dtype, device=device)  # torch.tensor would wait for a GPU

    table = segment_table(segments, size)  # [B or 1, Hq or 1, n_q, slots]
    batch_stride, head_stride, row_stride, _ = table.stride()
    index = torch.int32 if table.numel() < 2**31 else torch.int64
    strides = (
        scalar(batch_stride if table.shape[0] > 1 else 0, index),
        scalar(head_stride if table.shape[1] > 1 else 0, index),
        scalar(row_stride, index),
    )
    # A tile of the kernel may read rows after the last query block. On a CPU, torch 2.13 can't lower a look-up in a
    # table of symbolic size. So sizes are constants, as in Prompt: powers of two, to have few of them.
    tiles = max(1, 128 // size)
    length = max(MIN_SEGMENT_TABLE, 1 << (table.numel() + tiles * row_stride).bit_length())
    flat = pad(table.flatten(), (0, length - table.numel()))
    torch._dynamo.mark_static(flat)

    start, biases = prompt.n_k * size, []
    for segment in segments:
        biases.append((scalar(start), _bias(segment, scalar)))
        start += -(-segment.k.shape[2] // size) * size
    return SegmentTensors(biases[0][0], scalar(size.bit_length() - 1), flat, strides, tuple(biases))


def _bias(segment: Segment, scalar: Callable[[float, torch.dtype], Tensor]) -> Tensor:
    if not isinstance(segment.bias, Tensor):
        return scalar(segment.bias, torch.float32)
    bias = segment.bias.float()
    bias = pad(bias, (0, max(MIN_BIASES, 1 << (len(bias) - 1).bit_length()) - len(bias)))  # a constant size, as above
    torch._dynamo.mark_static(bias)
    return bias


def with_segments(prompt_rule: MaskMod, tensors: SegmentTensors) -> MaskMod:
    """The prompt's rule for the prompt's keys, and the table of the segments for the keys after them."""
    first_slot, size_log2, table, (batch_stride, head_stride, row_stride), _ = tensors

    def token_rule(b, h, q_idx, kv_idx):
        slot = (kv_idx - first_slot).clamp(min=0)
        row = q_idx >> size_log2
        kept = table[b * batch_stride + h * head_stride + row * row_stride + slot]
        return torch.where(kv_idx < first_slot, prompt_rule(b, h, q_idx, kv_idx), kept)

    return token_rule
