"""Delta correction: the error of every n-th row corrects its neighbours."""

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
DENSE_TAIL = 128  # last rows that are always dense, in addition to the rows of an incomplete window
LOGITS = 2**26  # most logits of dense rows that exist at once
ROWS = 4096  # rows that are corrected at once


@register_wrapper("delta")
@dataclass(frozen=True, kw_only=True)
class Delta(Wrapper):
    """Attend densely in every n-th row, and add the sparse output's error there to the rows that follow.

    Neighbouring rows miss similar keys, so the error of one row represents its window. With ``every`` = w and row r:

    ```text
    output(r) = sparse(r) + dense(f) - sparse(f),   f = w floor(r / w), the first row of the window
    output(r) = dense(r)                            in the last N mod w + max(128, w) rows of N
    ```

    With ``mode="recompute"``, only the dense rows themselves are replaced. The selection of the strategy doesn't
    change.

    Dense rows are exact up to the rounding of the dtype. Windows count from the first real token of each prompt or
    packed document. A prompt in chunks of a multiple of ``every`` is corrected as in one piece if each chunk knows the
    whole prompt's length, ``Prompt(total_len=...)``; otherwise each chunk has a dense end. In chunks at other offsets,
    a window that begins in the chunk before starts at the chunk's first row. Dense rows cost about
    N² / (2 ``every``) products of queries and keys, and those at the end N each. At most 2^26 of their logits exist at
    once. Corrections are computed in fp32. A row whose error isn't finite corrects no other row.

    Args:
        of (Strategy | str | Mapping): what to wrap: a strategy, its name, or a mapping of its name and options.
        every (int): rows in a window, 1 or more; 1 is dense attention. Default: 64.
        mode (str): "correct" corrects all rows, "recompute" only replaces the dense ones. Default: "correct".

    Raises:
        ValueError: if an option is out of range.
    """

    paper = (
        "Delta Attention: Fast and Accurate Sparse Attention Inference by Delta Correction, Willette, Lee, Hwang, "
        "NeurIPS 2025 (arXiv 2505.11254)"
    )
    reference = "jeffwillette/delta-attention: llama.py"
    use = (
        "Take it around static patterns such as `a_shape`, which miss the same keys in all rows of a window. If the "
        "rows of a window look at different places, the error of one row is noise to the others, and correcting adds "
        "error: measure it, take a smaller `every`, or spend the time on a larger budget. Short prompts have many "
        "dense rows: 251 of 8,000 with the default."
    )
    differs = (
        "Rows and windows equal the released code for whole unpadded prompts. Chunks and left padding are served in "
        "addition: windows count from each prompt's first token."
    )

    every: int = 64
    mode: Mode = "correct"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_tokens("every", self.every, least=1)
        if self.mode not in get_args(Mode):
            raise ValueError(f"mode must be one of {', '.join(get_args(Mode))}, got {self.mode!r}.")

    def attend(self, inputs: AttentionInputs, keep: Tensor, segments: Sequence[Segment] = ()) -> Tensor:
        # Dense rows attend to every key, so they need no segments.
        out = self.of.attend(inputs, keep, segments)
        with stage("kernel", out.device):
            for rows, queries, keys, sub_prompt in inputs.prompt.split_sequences():  # each prompt has its own windows
                self._correct(out[rows, :, queries], inputs.of_tokens(rows, queries, keys, sub_prompt))
        return out

    def attend_dense(self, inputs: AttentionInputs) -> Tensor:
        return self.of.attend_dense(inputs)  # which has no error

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
            errors = (dense.float() - sparse.float())[:, :, : len(firsts)]
            errors = errors.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)  # a NaN belongs to its own row only
            for begin in range(0, end, ROWS):
                part = slice(begin, min(begin + ROWS, end))
                window = prompt.query_positions(device)[part] // self.every - prompt.offset // self.every
                out[:, :, part] += errors[:, :, window]
        out[:, :, rows] = dense

    def _dense_rows(self, prompt: Prompt) -> tuple[range, int]:
        """The first rows of windows, negative for one that began in an earlier chunk, and that of the dense end."""
        whole = prompt.kv_len if prompt.total_len is None else prompt.total_len
        tail = whole % self.every + max(DENSE_TAIL, self.every)
        end = min(max(whole - tail - prompt.offset, 0), prompt.q_len)
        return range(-(prompt.offset % self.every), end, self.every) if end else range(0), end


def _dense(inputs: AttentionInputs, rows: Tensor, numbers: Sequence[int]) -> Tensor:
    """Dense attention of some rows, whose numbers the host knows: [B, Hq, m, Dv]."""
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
        seen = prompt.offset + max(numbers[some][-1], 0) + 1  # no row attends to later keys
        allowed = prompt.may_attend(positions[some], keys[:seen])
        note_pairs(allowed, prompt.block_size)
        parts.append(attend_rows(q[:, :, rows[some]], k[:, :, :seen], v[:, :, :seen], allowed, logits))
    return torch.cat(parts, dim=2)
