"""Recall and density of a strategy or a plan in sparse prefills."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_prefill import evaluation
from sparse_prefill.core.option_checks import check_tokens
from sparse_prefill.core.prompt import Prompt
from sparse_prefill.models.at_length import LayersRun, too_short
from sparse_prefill.models.eval_model import EvalModel
from sparse_prefill.models.observe import OnProgress, Texts, as_tokens
from sparse_prefill.plan import Plan
from sparse_prefill.record import Call, SparseCallTensors, record
from sparse_prefill.strategy import Strategy


@dataclass(frozen=True, eq=False)
class Verification:
    """Recall and density of sparse prefills.

    Args:
        recalls (Tensor): share of the attention mass in kept blocks, mean over query blocks, fp32 [texts, layers, Hq].
        densities (Tensor): share of the visible blocks that is computed, fp32 [texts, layers, Hq].
        windows (tuple[int, ...]): layers whose sliding windows are so short that they ran dense; 1 in both tensors.
            Default: none.
    """

    recalls: Tensor
    densities: Tensor
    windows: tuple[int, ...] = ()

    @property
    def recall(self) -> float:
        """Mean over texts, layers and heads without dense windows, as in a calibration."""
        return self._mean(self.recalls)

    @property
    def density(self) -> float:
        """Mean over texts, layers and heads without dense windows, as in a calibration."""
        return self._mean(self.densities)

    def _mean(self, values: Tensor) -> float:
        others = [layer for layer in range(values.shape[1]) if layer not in self.windows]
        return float(values[:, others].mean()) if others else 1.0


def verify(
    subject: EvalModel,
    plan: Plan | Strategy | str,
    texts: Texts,
    *,
    query_blocks: int = 16,
    on_progress: OnProgress | None = None,
) -> Verification:
    """Measure recall and density of a plan in sparse prefills; take texts that it wasn't calibrated on.

    Each layer gets the outputs of the sparse layers below it, as in use. Recall is relative to dense attention over the
    same queries and keys.

    Args:
        subject (EvalModel): the model.
        plan (Plan | Strategy | str): the attention of the prefills.
        texts (Sequence): token ids of texts.
        query_blocks (int): number of query blocks of each text in which recall is measured. Default: 16.
        on_progress (Callable | None): called as ``on_progress(done, total)`` after each text. Default: nothing.

    Returns:
        Verification: recall and density.

    Raises:
        ValueError: if there is no text, or one runs dense although neither the plan nor a short sliding window is the
            reason.

    Example:
        >>> round(verify(model, Plan.load("plan.yaml"), [other]).recall, 2)
        0.95
    """
    check_tokens("query_blocks", query_blocks, least=1)
    prompts = as_tokens(texts)
    recalls, densities = [], []
    windows: set[int] = set(range(subject.layers))
    for done, tokens in enumerate(prompts, start=1):
        recall, density, dense = _measure(subject, plan, tokens, query_blocks)
        windows &= dense
        recalls.append(recall)
        densities.append(density)
        if on_progress is not None:
            on_progress(done, len(prompts))
    return Verification(torch.stack(recalls), torch.stack(densities), tuple(sorted(windows)))


class _Recalls(LayersRun):
    """Also measures the recall of sparse calls."""

    def __init__(self, query_blocks: int) -> None:
        super().__init__()
        self.query_blocks = query_blocks
        self.found: list[Tensor] = []

    def __call__(self, call: Call, seen: SparseCallTensors, prompt: Prompt) -> None:
        super().__call__(call, seen, prompt)
        blocks = evaluation.spread_blocks(prompt.n_q, self.query_blocks)
        mass = evaluation.true_mass(seen.q, seen.k, prompt, blocks)
        self.found.append(evaluation.recall(mass, seen.keep, blocks).mean((0, 2)).float().cpu())


def _measure(
    subject: EvalModel, plan: Plan | Strategy | str, tokens: Tensor, count: int
) -> tuple[Tensor, Tensor, set[int]]:
    """Recall and density of one text, fp32 [layers, Hq] each, and the layers whose windows ran dense."""
    layers = _Recalls(count)
    with torch.inference_mode(), record(inspect=layers) as calls:
        subject.prefill(plan, tokens)
    if short := too_short(layers.reasons, layers.windows):
        raise ValueError(f"A text of {tokens.shape[1]} tokens ran dense ({', '.join(short)}): give longer texts.")
    dense = torch.ones(subject.heads)
    sparse = iter(layers.found)
    recall = [dense if call.dense else next(sparse) for call in calls]
    density = [dense if call.dense else call.density.mean(0).expand(subject.heads) for call in calls]
    windows = {
        layer
        for layer, (reason, window) in enumerate(zip(layers.reasons, layers.windows, strict=True))
        if window is not None and reason not in (None, "strategy")
    }
    return torch.stack(recall), torch.stack(density), windows
