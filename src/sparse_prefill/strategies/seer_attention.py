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

    The gate is a small attention between blocks: queries pooled by their mean, keys by maximum, minimum and mean, all
    before the rotary embedding, a matrix for each head, and a rotary embedding of the block's place. It was trained
    to predict the highest token probability in each block. What it gives at least ``threshold`` is kept, or the
    highest of a row in equal number for all rows with ``ratio``.

    Without ``weights`` the gate is untrained and compares block means, which tells little: it is there to train from
    and to try things. Models bind each layer to its weights and its rotary embedding by ``for_layer``. The rotation of
    queries and keys is undone for the gate, exactly up to rounding; in a model that normalises queries and keys
    *after* rotating them, the result isn't what the projections gave. Unbound, or in a layer without a known rotary
    embedding, queries and keys are taken as not rotated.

    A row depends on its own queries and on keys up to its own block. So a prompt that is prefilled in chunks of whole
    blocks selects what it selects in one piece; with ``ratio``, which is a share of all blocks, only if the prompts of
    the chunks know their ``total_len``.

    Args:
        weights (str | None): file of the trained gates, safetensors or a state dict, as
            :func:`~sparse_prefill.estimators.gate_file.load_gate` says, e.g. the published
            ``attn_gate_weights.pth``. Read at the first call. Default: None, an untrained gate.
        threshold (float | None): probability that a block must be given, in [0, 1]; 0 keeps everything. Published
            values are 5e-4 to 5e-3. Default: 5e-4, unless there is a ``ratio``.
        ratio (float | None): share of the causal blocks to keep, in (0, 1], in place of the threshold. Each row keeps
            the same number, so short rows are dense. Default: None.
        block_size (int): tokens in a block. Gates are trained for one size, the published ones for 64. Default: 64.
        last (int): last query tokens that keep every key. Default: 65, which is two blocks of 64 at any length.
        **guards: see :class:`~sparse_prefill.Strategy`.

    Raises:
        ValueError: if an option is out of range, or both ``threshold`` and ``ratio`` are given; at a call, if the
            strategy has weights and wasn't bound to a layer, the file has none for the layer or they don't fit the
            heads; from ``keep``, if the prompt is of several documents.
    """

    paper = "SeerAttention, Gao et al. (arXiv 2410.13276)"
    reference = (
        "microsoft/SeerAttention@aba03e3: prefill_sparse/attn_gate.py; "
        "microsoft/SeerAttention@aba03e3: modules/common.py"
    )
    use = (
        "Take it for a model with published gates (Llama-3.1, Qwen2.5 and two distillations of DeepSeek-R1 at the time "
        "of writing), or if you can train some: the gate is a differentiable module. Without weights it is no method "
        "but a pooled baseline, and a poor one; take a training-free method then."
    )
    differs = (
        "The selection is that of the released prefill gate `Qavg_Kmaxminavg`, which also scores in the dtype of the "
        "model; ours scores in fp32. The released code keeps neither the own block nor any other, so a row whose "
        "probabilities all fall short of the threshold attends to nothing; ours always keeps its own block. It gives "
        "wrong results at lengths that are no multiple of the block, pools the padding of padded prompts along, and "
        "gates only whole prompts, not chunks behind a prefix. It ranks a block at exactly the threshold as too low, "
        "ours as enough. Gates of the decoding method SeerAttention-R have another layout and are refused."
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
                "seer_attention has weights for each layer and doesn't know which one it serves: give it to a model, "
                "or bind it by for_layer(Layer(index, count, rope))."
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
