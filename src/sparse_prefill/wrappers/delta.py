"""Delta correction: what every n-th row lacks is added to its neighbours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from sparse_prefill.core.inputs import AttentionInputs
from sparse_prefill.core.logits import attend_rows
from sparse_prefill.core.option_checks import check_tokens
from sparse_prefill.core.prompt import Prompt
from sparse_prefill.kernel.non_finite import are_finite, finite
from sparse_prefill.kernel.segments import Segment
from sparse_prefill.record import note_pairs, stage
from sparse_prefill.registry import register_wrapper
from sparse_prefill.wrappers.base import Wrapper

Mode = Literal["correct", "recompute"]
DENSE_TAIL = 128  # last rows that are dense in any case, and with them the rows of a window that isn't full
LOGITS = 2**26  # logits of dense rows that may exist at once
ROWS = 4096  # rows that are corrected at once


@register_wrapper("delta")
@dataclass(frozen=True, kw_only=True)
class Delta(Wrapper):
    """Attend densely in every ``every``-th row, and add what the sparse output lacks there to the rows that follow it.

    Neighbouring rows miss much the same keys, so what one of them lacks stands for all of its window. With
    ``mode="recompute"`` only the dense rows themselves are replaced. What the strategy selects stays as it is.

    Dense rows are exact, up to the rounding of the dtype: the first of each window, and the last N mod ``every`` +
    max(128, ``every``) rows of a prompt of N tokens. Windows count from the first real token of each prompt or packed
    document. A prompt that is prefilled in chunks of a multiple of ``every`` is corrected as in one piece if each chunk
    is told the whole prompt's length, ``Prompt(total_len=...)``; else each chunk has a dense end. In chunks at other
    offsets a window that begins in the chunk before starts at the chunk's first row. Dense rows cost about
    N² / (2 ``every``) products of queries and keys and the end's rows N each; at most 2^26 of their logits exist at
    once. Corrections are computed in fp32.

    Args:
        of (Strategy | str | Mapping): what to wrap: a strategy, its name, or a mapping of its name and options.
        every (int): rows in a window, 1 or more; 1 is dense attention. Default: 64.
        mode (str): "correct" corrects all rows, "recompute" replaces the dense ones only. Default: "correct".

    Raises:
        ValueError: if an option is out of range.
    """

    paper = (
        "Delta Attention: Fast and Accurate Sparse Attention Inference by Delta Correction, Willette, Lee, Hwang, "
        "NeurIPS 2025 (arXiv 2505.11254)"
    )
    reference = "jeffwillette/delta-attention: llama.py"
    use = (
        "Take it around static patterns such as `a_shape`, which miss the same keys in all rows of a window. Where "
        "rows of a window look at different places, one row's lack is noise to the others, and correcting adds error: "
        "measure it, take a smaller `every`, or spend the time on a larger budget. The dense rows of short prompts are "
        "no small share: with the default, 251 of 8,000."
    )
    differs = (
        "Rows and windows are those of the released code for whole unpadded prompts. Chunks and left padding are ours: "
        "windows count from each prompt's first token."
    )

    every: int = 64
    mode: Mode = "correct"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_tokens("every", self.every, least=1)
        if self.mode not in get_args(Mode):
            raise ValueError(f"mode must be one of {', '.join(get_args(Mode))}, got {self.mode!r}.")

    def attend(self, inputs: AttentionInputs, keep: Tensor, segments: Sequence[Segment] = ()) -> Tensor:
        # Dense rows see every key, so what segments stand for is in them already.
        out = self.of.attend(inputs, keep, segments)
        with stage("kernel", out.device):
            for rows, queries, keys, alone in inputs.prompt.split_sequences():  # each prompt has its own windows
                self._correct(out[rows, :, queries], inputs.of_tokens(rows, queries, keys, alone))
        return out

    def attend_dense(self, inputs: AttentionInputs) -> Tensor:
        return self.of.attend_dense(inputs)  # which lacks nothing

    def _correct(self, out: Tensor, inputs: AttentionInputs) -> None:
        """Correct the sparse output of a prompt without padding in place."""
        prompt, device = inputs.prompt, out.device
        starts, end = self._dense_rows(prompt)
        firsts = torch.arange(starts.start, starts.stop, starts.step, device=device).clamp(min=0)
        rows = torch.cat([firsts, torch.arange(end, prompt.q_len, device=device)])
        sparse = out[:, :, rows]  # has NaN and infinity where a row may attend to them
        dense = _dense(inputs, rows, [*starts, *range(end, prompt.q_len)])  # [B, Hq, m, Dv]
        dense = torch.where(sparse.isfinite(), dense, sparse)
        if self.mode == "correct":
            lacks = (dense.float() - sparse.float())[:, :, : len(firsts)]
            lacks = lacks.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)  # which belong to their own rows only
            for begin in range(0, end, ROWS):
                part = slice(begin, min(begin + ROWS, end))
                window = prompt.query_positions(device)[part] // self.every - prompt.offset // self.every
                out[:, :, part] += lacks[:, :, window]
        out[:, :, rows] = dense

    def _dense_rows(self, prompt: Prompt) -> tuple[range, int]:
        """The first row of each window, that of one which began in an earlier chunk under 0, and of the dense end."""
        whole = prompt.kv_len if prompt.total_len is None else prompt.total_len
        tail = whole % self.every + max(DENSE_TAIL, self.every)
        end = min(max(whole - tail - prompt.offset, 0), prompt.q_len)
        return range(-(prompt.offset % self.every), end, self.every) if end else range(0), end


def _dense(inputs: AttentionInputs, rows: Tensor, numbers: Sequence[int]) -> Tensor:
    """Attention of some rows, whose numbers the host knows, to everything that they may attend to: [B, Hq, m, Dv]."""
    q, k, v, prompt, logits = inputs.q, inputs.k, inputs.v, inputs.prompt, inputs.logits
    positions = prompt.query_positions(q.device)[rows]
    keys = torch.arange(prompt.kv_len, device=q.device)
    count = max(1, LOGITS // (q.shape[0] * q.shape[1] * prompt.kv_len))
    if not are_finite(q, k, v):
        # SDPA would spread them to rows that mustn't see them; with sinks, logits are masked after they are made.
        v = finite(v)
        if logits.sinks is None:
            logits = replace(logits, sinks=torch.full((q.shape[1],), -math.inf, device=q.device))
    parts = []
    for begin in range(0, len(rows), count):
        some = slice(begin, begin + count)
        seen = prompt.offset + max(numbers[some][-1], 0) + 1  # later keys are in no row's sight
        allowed = prompt.may_attend(positions[some], keys[:seen])
        note_pairs(allowed, prompt.block_size)
        parts.append(attend_rows(q[:, :, rows[some]], k[:, :, :seen], v[:, :, :seen], allowed, logits))
    return torch.cat(parts, dim=2)
