"""MoBA: queries route to the blocks whose mean key they match best."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from sparse_prefill.core.prompt import Prompt
from sparse_prefill.core.tensor_checks import check_one_document
from sparse_prefill.estimators import TokenVotes, group_product, key_means, query_means
from sparse_prefill.registry import register_strategy
from sparse_prefill.selectors import TopK
from sparse_prefill.strategy import Strategy
from sparse_prefill.tunable_option import TunableOption

Gate = Literal["block", "token"]


@register_strategy("moba")
@dataclass(frozen=True, kw_only=True)
class MoBA(Strategy):
    """MoBA: keep the ``k`` blocks whose mean keys match the queries best, as routers choose experts.

    ```text
    gate(q, j) = q . (mean key of chunk j), for chunks that end before the query; infinite for its own chunk
    keep the k chunks of largest gate
    ```

    The chunks of the method are the blocks here. The method routes each *token* by itself, and models are trained with
    it. A block mask can only keep a block for a whole query block. With ``gate="block"``, the mean query of a block
    chooses for all its tokens; with ``gate="token"``, a query block keeps the choices of all its tokens. That is exact
    if the tokens of a block choose the same blocks. Otherwise each token also attends to the choices of the others.

    A row depends on its own queries and on earlier keys. So a prompt in chunks of whole blocks selects the same blocks
    as in one piece.

    Args:
        k (int): blocks that a query block chooses, or each query with ``gate="token"``, its own included. A query block
            at an offset that is not a multiple of the block size lies in two blocks and keeps both. The released code
            fixes no value. Default: 12, i.e. 1,536 tokens in blocks of 128.
        gate (str): "block": the mean query of a block chooses; or "token": every query chooses and the block keeps all
            choices, which keeps more blocks and takes far longer. Default: "block".
        sink (int): first tokens that every query keeps, besides the ``k`` blocks. The method has no sink, but models
            that weren't trained with it look at the first token far more than the mean of its block shows. Take 0 for
            models that were trained with MoBA. Default: 1, i.e. the first block.
        **guards: see :class:`~sparse_prefill.Strategy`; ``block_size`` is the chunk of the method.

    Raises:
        ValueError: if an option is out of range; from ``keep``, if the prompt has several documents.
    """

    paper = "MoBA: Mixture of Block Attention for Long-Context LLMs, Lu et al. (arXiv 2502.13189)"
    reference = "MoonshotAI/MoBA@61e456b: naive implementation"
    use = (
        "Take it for models that were trained with MoBA, with the chunk size and the number of chunks of their "
        "training, or if every row should cost the same: the density doesn't depend on the prompt. With other models "
        "it is a fixed budget over block means. Methods whose budget follows the prompt, such as `flash_prefill` and "
        "`xattention`, keep less in heads of concentrated attention."
    )
    differs = (
        "The released code routes single tokens: it masks token by token, or gathers the pairs of token and chunk and "
        "merges two attention calls. On the block grid, the tokens of a query block share one choice, see above. The "
        "gate is the same: fp32, chunk means of keys, own chunk first, and no chunk that ends after the query. Here "
        "the first block is kept as well, unless `sink` is 0."
    )
    chunk_invariant = True
    head_independent = True
    crossover = 2048
    tunable = TunableOption("k", 1, scale="blocks")

    k: int = 12
    gate: Gate = "block"
    sink: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        TopK(k=self.k)
        if self.gate not in get_args(Gate):
            raise ValueError(f"gate must be one of {', '.join(get_args(Gate))}, got {self.gate!r}.")

    def tunable_option(self) -> TunableOption | None:
        return None if self.gate == "token" else self.tunable  # whose votes depend on k

    def score(self, q: Tensor, k: Tensor, prompt: Prompt) -> Tensor:
        check_one_document("moba", "the mean of a chunk may be of two of them", prompt)
        if self.gate == "token":
            return TokenVotes(k=self.k)(q, k, prompt)
        return group_product(query_means(q, prompt), key_means(k, prompt))

    def select(self, scores: Tensor, prompt: Prompt) -> Tensor:
        if self.gate == "token":
            return scores > 0
        return TopK(k=self.k)(scores.masked_fill(prompt.diagonal(scores.device), torch.inf), prompt)
