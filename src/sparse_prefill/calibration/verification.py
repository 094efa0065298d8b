"""What a strategy or a plan keeps when it serves."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_prefill import evaluation
from sparse_prefill.calibration.calibrate import Texts
from sparse_prefill.calibration.observe import OnProgress, as_tokens
from sparse_prefill.models.subject import Subject
from sparse_prefill.options import check_tokens
from sparse_prefill.plan import Plan
from sparse_prefill.prompt import Prompt
from sparse_prefill.record import Call, Seen, record
from sparse_prefill.strategy import Strategy


@dataclass(frozen=True, eq=False)
class Verification:
    """What was kept of some texts.

    Args:
        recalls (Tensor): share of the attention mass that is kept, mean over query blocks, fp32 [texts, layers, Hq].
        densities (Tensor): share of the visible blocks that is computed, fp32 [texts, layers, Hq].
    """

    recalls: Tensor
    densities: Tensor

    @property
    def recall(self) -> float:
        """Mean over texts, layers and heads."""
        return float(self.recalls.mean())

    @property
    def density(self) -> float:
        """Mean over texts, layers and heads."""
        return float(self.densities.mean())


def verify(
    subject: Subject,
    plan: Plan | Strategy | str,
    texts: Texts,
    *,
    query_blocks: int = 16,
    on_progress: OnProgress | None = None,
) -> Verification:
    """Measure what a plan keeps in sparse prefills of texts that it wasn't calibrated on.

    Layers see what the sparse layers below them give, as in use. Recall is that of the attention of these very queries
    and keys.

    Args:
        subject (Subject): the model.
        plan (Plan | Strategy | str): what attends.
        texts (Sequence): token ids of texts.
        query_blocks (int): query blocks of each text to measure recall on. Default: 16.
        on_progress (Callable | None): called as ``on_progress(done, total)`` after each text. Default: nothing.

    Returns:
        Verification: recall and density.

    Raises:
        ValueError: if there is no text, or one runs dense for another reason than that the plan says so.

    Example:
        >>> round(verify(subject, Plan.load("plan.yaml"), [other]).recall, 2)
        0.95
    """
    check_tokens("query_blocks", query_blocks, least=1)
    prompts = as_tokens(texts)
    recalls, densities = [], []
    for done, tokens in enumerate(prompts, start=1):
        recall, density = _kept(subject, plan, tokens, query_blocks)
        recalls.append(recall)
        densities.append(density)
        if on_progress is not None:
            on_progress(done, len(prompts))
    return Verification(torch.stack(recalls), torch.stack(densities))


def _kept(subject: Subject, plan: Plan | Strategy | str, tokens: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Recall and density of one text: fp32 [layers, Hq] each."""
    found: list[Tensor] = []

    def inspect(call: Call, seen: Seen, prompt: Prompt) -> None:
        blocks = evaluation.spread_blocks(prompt.n_q, count)
        mass = evaluation.true_mass(seen.q, seen.k, prompt, blocks)
        found.append(evaluation.recall(mass, seen.keep, blocks).mean((0, 2)).float().cpu())

    with torch.inference_mode(), record(inspect=inspect) as calls:
        subject.prefill(plan, tokens)
    reasons = {call.dense for call in calls} - {None, "strategy"}
    if reasons:
        raise ValueError(
            f"A text of {tokens.shape[1]} tokens ran dense ({', '.join(sorted(map(str, reasons)))}): give longer texts."
        )
    whole = torch.ones(subject.heads)  # of layers that the plan leaves dense
    sparse = iter(found)
    recall = [whole if call.dense else next(sparse) for call in calls]
    density = [whole if call.dense else call.density.mean(0).expand(subject.heads) for call in calls]
    return torch.stack(recall), torch.stack(density)
