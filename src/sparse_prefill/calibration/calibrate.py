"""Calibrate a strategy on a model: the smallest density for a recall, or the highest recall for a density."""

from __future__ import annotations

from typing import cast

from sparse_prefill.calibration.curves import By, measure
from sparse_prefill.calibration.result import Calibration
from sparse_prefill.core.option_checks import check_fraction
from sparse_prefill.models.eval_model import EvalModel
from sparse_prefill.models.observe import OnProgress, Texts
from sparse_prefill.strategy import Strategy


def calibrate(
    subject: EvalModel,
    strategy: Strategy | str,
    texts: Texts,
    *,
    recall: float | None = None,
    density: float | None = None,
    by: By | None = None,
    query_blocks: int = 16,
    on_progress: OnProgress | None = None,
) -> Calibration:
    """Find the value of a strategy's tunable option that each layer and group of heads needs for a target.

    Each text runs through the model once, densely, and is scored once in each layer. The option is then bisected over
    the measured recall; only the selection is repeated. For a recall, every group gets the least value that reaches
    it. For a density, all groups get the same recall: the highest whose mean density stays within the target. So heads
    with spread attention compute more than others. Layers that run dense in use, such as sliding windows under the
    strategy's ``min_length``, are left out: recall and density are means over all other layers.

    Args:
        subject (EvalModel): the model.
        strategy (Strategy | str): the strategy to calibrate. It must have a tunable option; its other options stay.
        texts (Sequence): token ids of sample texts, each as long as the prompts to come.
        recall (float | None): share of the attention mass to keep, in (0, 1]. Default: none.
        density (float | None): target instead of a recall: share of the visible blocks to compute, on average over the
            layers that run sparse, in (0, 1]. Default: none.
        by (str | None): which heads share a value: those of a "layer", of the "group" of a key head, or each "head" for
            itself. Default: "group", or "layer" for strategies that score the heads of a layer together.
        query_blocks (int): number of query blocks of each text in which recall is measured. Default: 16.
        on_progress (Callable | None): called as ``on_progress(done, total)``. Default: nothing.

    Returns:
        Calibration: its ``plan`` serves in torchtune and transformers models.

    Raises:
        ValueError: if the strategy has no tunable option, the targets aren't exactly one, a text or every layer runs
            dense, or the target is out of reach; the message names the layers and heads.

    Example:
        >>> found = calibrate(model, "flex_prefill", [model.encode(text)], recall=0.95)
        >>> found.plan.save("plan.yaml")
    """
    if (recall is None) == (density is None):
        raise ValueError(f"Give one target, recall or density, got recall={recall!r} and density={density!r}.")
    for name, target in (("recall", recall), ("density", density)):
        if target is not None:
            check_fraction(name, target)
    curves = measure(subject, strategy, texts, by=by, query_blocks=query_blocks, on_progress=on_progress)
    return curves.at_density(density) if density is not None else curves.at_recall(cast(float, recall))
