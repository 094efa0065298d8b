"""DuoAttention's table of heads without training: the attention that each key head loses to a window."""

from __future__ import annotations

import torch

from sparse_prefill import evaluation
from sparse_prefill.core.option_checks import check_tokens
from sparse_prefill.head_table import HeadTable, window_loss
from sparse_prefill.models.eval_model import EvalModel, LayerInputs
from sparse_prefill.models.observe import OnProgress, Texts, observe
from sparse_prefill.strategy import get_strategy


def estimate_head_table(
    subject: EvalModel,
    texts: Texts,
    *,
    sink: int = 128,
    local: int = 256,
    query_blocks: int = 16,
    on_progress: OnProgress | None = None,
) -> HeadTable:
    """The share of its attention that each key head loses if it only sees the first and the nearest tokens.

    Layers with sliding windows are measured within their windows, and lose little or nothing. A strategy's option
    ``sparsity`` counts their heads even if their windows run dense in use: raise it by their share.

    Args:
        subject (EvalModel): the model.
        texts (Sequence): token ids of sample texts; long texts separate heads better.
        sink (int): number of first tokens in the window. Default: 128, as in ``duo_attention``.
        local (int): number of nearest keys in the window. Default: 256, as in ``duo_attention``.
        query_blocks (int): number of query blocks of each text to measure in. Default: 16.
        on_progress (Callable | None): called as ``on_progress(done, total)`` after each layer. Default: nothing.

    Returns:
        HeadTable: [layers][key heads], the lost share of the attention, mean over the texts;
        :func:`~sparse_prefill.head_table.save_table` writes it for ``duo_attention`` and ``lserve``.

    Raises:
        ValueError: if there is no text, or an option is out of range.

    Example:
        >>> save_table(estimate_head_table(model, [model.encode(text)]), "heads.tsv")
    """
    check_tokens("query_blocks", query_blocks, least=1)
    losses: dict[int, list[list[float]]] = {}

    def look(text: int, inputs: LayerInputs) -> None:
        blocks = evaluation.spread_blocks(inputs.prompt.n_q, query_blocks)
        row = window_loss(inputs.q, inputs.k, inputs.prompt, sink=sink, local=local, query_blocks=blocks)
        losses.setdefault(inputs.layer, []).append(row)

    with torch.inference_mode():
        observe(subject, get_strategy("a_shape", sink=sink, local=local, min_length=0), texts, look, on_progress)
    return tuple(tuple(sum(each) / len(each) for each in zip(*losses[i], strict=True)) for i in sorted(losses))
