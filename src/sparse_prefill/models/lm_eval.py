"""Tasks of lm-evaluation-harness on a transformers model with sparse prefill."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from transformers import PreTrainedModel

from sparse_prefill.models.transformers.bindings import Choice
from sparse_prefill.models.transformers.stats import Stats
from sparse_prefill.models.transformers.switch import sparse


class SparseLM(HFLM):
    """The harness's transformers model with sparse prefill.

    To compute a likelihood, prompt and continuation run in one sparse prefill. Generated answers are decoded densely.
    Likelihoods are computed one by one for any batch size, since the harness pads their batches without an attention
    mask.

    Args:
        pretrained (str | PreTrainedModel): a model, or the path of one.
        strategy (Strategy | Plan | str | Mapping): the strategy, as for
            :func:`~sparse_prefill.models.transformers.sparse`. Default: "flex_prefill".
        **options: those of the harness's ``HFLM``: ``tokenizer``, ``batch_size``, ``max_length``, …

    Attributes:
        stats (Stats): what prefill did so far; the results have a summary under "config".

    Raises:
        ValueError: if the strategy is unknown, or the model can't be given sparse prefill.

    Example:
        >>> model = SparseLM(model, "flex_prefill", tokenizer=tokenizer)
        >>> results = lm_eval.simple_evaluate(model, tasks=["longbench_qasper"])
        >>> results["config"]["sparse_prefill"]["density"], results["results"]
    """

    def __init__(self, pretrained: str | PreTrainedModel, strategy: Choice = "flex_prefill", **options: Any) -> None:
        super().__init__(pretrained, **options)
        self.strategy = strategy
        self.stats = Stats()
        self._last = 0  # positions to compute logits of, 0 for all
        with sparse(self.model, strategy):  # raises for a bad strategy or model before any task runs
            pass

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        """Generate answers."""
        with self._sparse():
            return super().generate_until(requests, disable_tqdm)

    def get_model_info(self) -> dict[str, Any]:
        """The harness's information about the model, with the strategy, its density and its dense calls."""
        found = {"strategy": str(self.strategy), "density": self.stats.density, "dense": _dense(self.stats)}
        return {**super().get_model_info(), "sparse_prefill": found}

    def _loglikelihood_tokens(
        self, requests: list, disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        usual: int = self.batch_size_per_gpu  # type: ignore[has-type]
        self.batch_size_per_gpu = 1
        self._last = max((len(continuation) for _, _, continuation in requests), default=0)
        try:
            with self._sparse():
                return super()._loglikelihood_tokens(requests, disable_tqdm)
        finally:
            self.batch_size_per_gpu, self._last = usual, 0

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        # Logits of continuations only: those of a long prompt may be larger than the model.
        precision = self.mixed_precision_dtype
        with torch.no_grad(), torch.autocast(self.device.type, precision, enabled=precision is not None):
            return self.model(inps, use_cache=False, logits_to_keep=self._last).logits

    @contextmanager
    def _sparse(self) -> Iterator[None]:
        with sparse(self.model, self.strategy) as stats:
            yield
        calls = 0
        for index, layer in stats.layers.items():
            self.stats.add(index, layer.heads, layer.calls)
            calls += len(layer.calls)
        dense = _dense(stats)
        if calls and sum(dense.values()) == calls and dense.keys() != {"strategy"}:
            warnings.warn(
                f"All prompts ran dense ({', '.join(dense)}): if they are short, give the strategy min_length=0.",
                stacklevel=3,
            )


def _dense(stats: Stats) -> dict[str, int]:
    """The number of dense calls in all layers, by reason."""
    return dict(sum((Counter(layer.dense) for layer in stats.layers.values()), Counter()))
