"""SeerAttention: a small trained gate in each layer predicts which blocks hold the attention."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path

from torch import Tensor

from sparse_prefill.core.layer import Layer, Rope
from sparse_prefill.core.option_checks import check_fraction, check_nonnegative
from sparse_prefill.core.prompt import Prompt
from sparse_prefill.estimators.attention_gate import AttentionGate
from sparse_prefill.estimators.gate_file import load_gate
from sparse_prefill.registry import register_strategy
from sparse_prefill.selectors import top_k
from sparse_prefill.strategies._by_options import ByOptions
from sparse_prefill.strategy import Strategy
from sparse_prefill.tunable_option import TunableOption

THRESHOLD = 5e-4


@register_strategy("seer_attention")
@dataclass(frozen=True, kw_only=True)
class SeerAttention(Strategy):
    """SeerAttention: keep the blocks to which a trained gate gives enough probability.

    The gate is a small attention between blocks, trained to predict the highest token probability in each block. It
    takes queries and keys before their rotary embedding, a matrix W for each head, and a rotary embedding R at the
    position of each block's first token:

    ```text
    a(i) = R(W_q mean(q in block i))                                 W_q may be the identity
    b(j) = R(W_k concat(max, min, mean)(k in block j))
    P(i, j) = softmax over j of a(i) . b(j) / sqrt(gate width)       keep (i, j) if P(i, j) >= threshold
    ```

    With ``ratio``, each row keeps its highest blocks instead, the same number in all rows.

    Without ``weights`` the gate is untrained and compares block means, which finds little: it is there to train from
    and for experiments. Models bind each layer to its weights and its rotary embedding by ``for_layer``. The gate
    undoes the rotation of queries and keys, exactly up to rounding; in a model that normalises queries and keys *after*
    rotating them, this doesn't restore the projections. Unbound, or in a layer without a known rotary embedding,
    queries and keys are assumed not to be rotated.

    A row depends on its own queries and on keys up to its own block. So a prompt in chunks of whole blocks selects the
    same blocks as in one piece. With ``ratio``, which is a share of all blocks, this needs the ``total_len`` in the
    prompts of the chunks.

    Args:
        weights (str | None): file of the trained gates, safetensors or a state dict, as
            :func:`~sparse_prefill.estimators.gate_file.load_gate` says, e.g. the published
            ``attn_gate_weights.pth``. Read at the first call. Default: None, an untrained gate.
        threshold (float | None): least probability of a kept block, in [0, 1]; 0 keeps everything. Published values are
            5e-4 to 5e-3. Default: 5e-4, unless there is a ``ratio``.
        ratio (float | None): share of the causal blocks to keep, in (0, 1], in place of the threshold. Each row keeps
            the same number of blocks, so short rows are dense. Default: None.
        block_size (int): tokens in a block. Gates are trained for one size, the published ones for 64. Default: 64.
        last (int): last query tokens that keep every key. Default: 65, which is two blocks of 64 at any length.
        **guards: see :class:`~sparse_prefill.Strategy`.

    Raises:
        ValueError: if an option is out of range, or both ``threshold`` and ``ratio`` are given; at a call, if the
            strategy has weights and wasn't bound to a layer, the file has none for the layer or they don't fit the
            heads; from ``keep``, if the prompt has several documents.
    """

    paper = "SeerAttention, Gao et al. (arXiv 2410.13276)"
    reference = (
        "microsoft/SeerAttention@aba03e3: prefill_sparse/attn_gate.py; "
        "microsoft/SeerAttention@aba03e3: modules/common.py"
    )
    use = (
        "Take it for a model with published gates (Llama-3.1, Qwen2.5 and two distillations of DeepSeek-R1 at the time "
        "of writing), or if you can train some: the gate is a differentiable module. Without weights it is only a "
        "pooled baseline, and a poor one; take a training-free method then."
    )
    differs = (
        "The gate is the released prefill gate `Qavg_Kmaxminavg`. It scores in fp32 here, in the dtype of the model "
        "there. The released code forces no block, so a row whose probabilities are all under the threshold attends to "
        "nothing; here each row keeps its own block. The released code gives wrong results at lengths that are not a "
        "multiple of the block size, pools padding together with tokens, and gates only whole prompts, not chunks "
        "after a prefix. It drops a block at exactly the threshold, and ours keeps it. Gates of the decoding method "
        "SeerAttention-R have another layout and are refused."
    )
    chunk_invariant = ByOptions(True, lambda self: self.ratio is None)
    crossover = 2048
    tunable = TunableOption("threshold", 1.0, 1e-12, scale="log")

    weights: str | None = None
    threshold: float | None = None
    ratio: float | None = None
    block_size: int = 64
    last: int = 65

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.weights, Path):
            object.__setattr__(self, "weights", str(self.weights))
        if self.weights is not None and not isinstance(self.weights, str):
            raise ValueError(f"weights must be the path of a file or None, got {self.weights!r}.")
        if self.threshold is not None and self.ratio is not None:
            raise ValueError(
                f"Give threshold or ratio, not both, got threshold={self.threshold!r} and ratio={self.ratio!r}."
            )
        if self.threshold is not None:
            check_nonnegative("threshold", self.threshold)
            if self.threshold > 1:
                raise ValueError(f"threshold must be a number in [0, 1], got {self.threshold!r}.")
        if self.ratio is not None:
            check_fraction("ratio", self.ratio)

    def tunable_option(self) -> TunableOption | None:
        return self.tunable if self.ratio is None else None  # a ratio replaces the threshold

    def for_layer(self, layer: Layer) -> SeerAttention:
        options = {option.name: getattr(self, option.name) for option in fields(self) if option.init}
        return _GateOfLayer(**{**options, "layer": layer})

    def score(self, q: Tensor, k: Tensor, prompt: Prompt) -> Tensor:
        return self._gate(q)(q, k, prompt)

    def score_table(self, scores: Tensor, prompt: Prompt) -> Tensor:
        return scores.exp().masked_fill(~prompt.visible(scores.device), 0)

    def select(self, scores: Tensor, prompt: Prompt) -> Tensor:
        if self.ratio is None:
            threshold = THRESHOLD if self.threshold is None else self.threshold
            return scores >= (math.log(threshold) if threshold else -math.inf)
        tokens = prompt.kv_len if prompt.total_len is None else prompt.total_len
        blocks = -(-tokens // prompt.block_size) - prompt.start(scores.device) // prompt.block_size  # [B], no padding
        share = 1 - math.sqrt(1 - self.ratio)  # of the square of blocks, whose triangle then holds the ratio
        count = (share * blocks.double()).floor().clamp(min=1)
        return top_k(scores, count[:, None, None, None])

    def _gate(self, q: Tensor) -> AttentionGate:
        if self.weights is not None:
            raise ValueError(
                "seer_attention has weights for each layer, but isn't bound to a layer: give it to a model, or bind it "
                "by for_layer(Layer(index, count, rope))."
            )
        return _untrained(q, None)


@dataclass(frozen=True, kw_only=True)
class _GateOfLayer(SeerAttention):
    """:class:`SeerAttention` in one layer of a model, whose weights and rotary embedding it takes."""

    layer: Layer

    def _gate(self, q: Tensor) -> AttentionGate:
        if self.weights is None:
            return _untrained(q, self.layer.rope)
        return load_gate(self.weights, self.layer.index, self.layer.rope, q.device)


def _untrained(q: Tensor, rope: Rope | None) -> AttentionGate:
    return AttentionGate.untrained(q.shape[1], q.shape[3], rope, q.device).requires_grad_(False)
