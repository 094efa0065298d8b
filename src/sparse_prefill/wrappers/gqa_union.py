"""One block mask for all query heads of a key head."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sparse_prefill.core.prompt import Prompt
from sparse_prefill.registry import register_wrapper
from sparse_prefill.wrappers.base import Wrapper


@register_wrapper("gqa_union")
@dataclass(frozen=True, kw_only=True)
class GqaUnion(Wrapper):
    """Keep a block for all query heads that share a key head if any of them keeps it.

    Kernels that load keys and values once for a group of query heads need one block mask for each group. The mask only
    grows, so no head loses a block. With one query head for each key head, nothing changes.

    Args:
        of (Strategy | str | Mapping): what to wrap: a strategy, its name, or a mapping of its name and options.

    Raises:
        ValueError: if ``of`` is no strategy.
    """

    paper = "no paper: serving kernels with one block list for each key head do this to a selection"
    use = (
        "Take it to measure how much density sharing costs, or to give masks to a kernel that reads one for each key "
        "head. FlexAttention reads one for each query head and gains nothing. Around `by_head` it unites the "
        "strategies of a group; inside `by_head` it only unites groups whose heads all have that strategy."
    )
    differs = "There is no released code of it as a separate step."

    def keep(self, q: Tensor, k: Tensor, prompt: Prompt | None = None) -> Tensor:
        keep = super().keep(q, k, prompt)
        if keep.shape[1] == 1:
            return keep
        groups = keep.unflatten(1, (k.shape[1], -1))  # [B, Hkv, group, n_q, n_k]
        return groups.any(2, keepdim=True).expand_as(groups).flatten(1, 2)
