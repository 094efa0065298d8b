"""Statistics of key blocks, computed once for all chunks of a prompt."""

from __future__ import annotations

from collections.abc import Callable, Hashable

from torch import Tensor

from sparse_prefill.core.prompt import Prompt


def of_key_blocks(name: Hashable, x: Tensor, prompt: Prompt, compute: Callable[[Tensor], Tensor]) -> Tensor:
    """A statistic of each key block, computed only for blocks that the prompt's state doesn't hold.

    Args:
        name (Hashable): name of the statistic.
        x (Tensor): keys, or values, of all tokens [B, Hkv, N, D].
        prompt (Prompt): what the tokens are, with neither padding nor documents if it has a state.
        compute (Callable[[Tensor], Tensor]): maps tokens [B, Hkv, n, D], the first of which begins a block, to the
            statistic of their blocks [B, Hkv, ceil(n / block_size), ...]. Each block's must depend on its tokens only.

    Returns:
        Tensor: [B, Hkv, n_k, ...].
    """
    if prompt.state is None:
        return compute(x)
    return prompt.state.of_blocks(name, x, prompt.block_size, prompt.offset, compute)
