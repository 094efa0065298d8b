"""Measures of every layer and head, collected while a model runs."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparse_prefill.core.option_checks import check_tokens
from sparse_prefill.core.prompt import Prompt
from sparse_prefill.estimators.true_mass import true_mass
from sparse_prefill.evaluation.blocks import (
    density,
    oracle_density,
    oracle_density_by_head,
    overlap,
    overlap_by_head,
    recall,
    spread_blocks,
    worst,
)
from sparse_prefill.evaluation.outputs import squared_error
from sparse_prefill.record import Call, SparseCallTensors

MEASURES = ("density", "recall", "worst_recall", "oracle_density", "oracle_gap", "overlap", "output_error")


@dataclass
class _Layer:
    """The measures of one call: by head, fp32 [heads], and of the whole layer."""

    by_head: dict[str, Tensor]
    recalls: Tensor  # fp32 [heads, query blocks]
    whole: dict[str, float]
    lengths: tuple[int, int]
    window: int | None
    dense: str | None = None


class Collector:
    """An inspector for :func:`~sparse_prefill.record` that measures each layer and head of each prompt.

    Run a model over one prompt at a time: every ``layers`` calls are one prompt, and chunks count as prompts.
    :attr:`dense_reasons` gives the calls that ran dense, and :attr:`windows` the sliding windows of layers. Dense calls
    have a density, recall, oracle's density, gap and overlap of 1 and an error of 0. Decoding steps aren't counted.

    Args:
        layers (int): number of layers of the model that attend through the library.
        heads (int): query heads of a layer.
        query_blocks (int): number of query blocks of each prompt in which recall, oracle, overlap and output error are
            measured; they are spread evenly and include the last one. Density is that of the whole table. Default: 6.

    Raises:
        ValueError: if a number is under 1, or later if the calls aren't those of such a model, one prompt at a time.

    Example:
        >>> collector = Collector(layers=30, heads=9)
        >>> with sp.record(inspect=collector):
        ...     prefill(sparsify(model, "flex_prefill"), tokens)
        >>> collector.summary()["recall"], collector.arrays()["recall"].shape
    """

    def __init__(self, layers: int, heads: int, *, query_blocks: int = 6) -> None:
        for name, number in (("layers", layers), ("heads", heads), ("query_blocks", query_blocks)):
            check_tokens(name, number, least=1)
        self.layers, self.heads, self.query_blocks = layers, heads, query_blocks
        self._found: list[_Layer] = []

    def __call__(self, call: Call, seen: SparseCallTensors, prompt: Prompt) -> None:
        """Measure a sparse call."""
        if seen.q.shape[:2] != (1, self.heads):
            raise ValueError(
                f"A Collector of {self.heads} heads measures one prompt at a time, got a call of queries "
                f"[batch, heads, ...] = {list(seen.q.shape)}."
            )
        self._add(_measured(call, seen, prompt, spread_blocks(prompt.n_q, self.query_blocks)))

    def dense(self, call: Call, prompt: Prompt) -> None:
        """Count a call that ran dense."""
        # Strategies that always run dense give another reason for a decoding step.
        if call.q_len == 1 or call.dense == "decode":
            return
        full = torch.ones(self.heads)
        by_head = {name: torch.zeros(self.heads) if name == "output_error" else full for name in MEASURES}
        recalls = full[:, None].expand(-1, len(spread_blocks(prompt.n_q, self.query_blocks)))
        whole = {"oracle_density": 1.0, "measured_density": 1.0, "overlap": 1.0, "output_error": 0.0}
        self._add(_Layer(by_head, recalls, whole, (call.q_len, call.kv_len), prompt.window, call.dense))

    @property
    def dense_reasons(self) -> list[list[str | None]]:
        """The reasons of dense calls, None for sparse calls: [prompts][layers]."""
        return [[layer.dense for layer in layers] for layers in self._prompts()]

    @property
    def windows(self) -> list[list[int | None]]:
        """Sliding windows in tokens, None for layers that see the whole prompt: [prompts][layers]."""
        return [[layer.window for layer in layers] for layers in self._prompts()]

    def arrays(self) -> dict[str, Tensor]:
        """The measures of every head.

        Returns:
            dict[str, Tensor]: "density", "recall" (mean over query blocks), "worst_recall" (mean over the worst 1 % of
            query blocks, i.e. the worst of up to 100), "oracle_density", "oracle_gap", "overlap" and "output_error",
            each fp32 [prompts, layers, heads] on the CPU.

        Raises:
            ValueError: if no calls were collected, or the last prompt isn't complete.
        """
        prompts = self._prompts()
        return {
            name: torch.stack([torch.stack([layer.by_head[name] for layer in layers]) for layers in prompts])
            for name in MEASURES
        }

    def summary(self) -> dict[str, Any]:
        """The measures of the model as a whole.

        Returns:
            dict[str, Any]: numbers under the names of :meth:`arrays`; "prompts", their number; and "dense_calls", the
            number of dense calls by reason. Density and recall are means over all heads. "worst_recall" is the mean
            over the worst 1 % of all query blocks, heads, layers and prompts. The oracle of "oracle_density",
            "oracle_gap" and "overlap" spreads its blocks over the heads of a layer. "output_error" is that of all heads
            of a layer together.

        Raises:
            ValueError: as :meth:`arrays`.
        """
        prompts = self._prompts()
        arrays, calls = self.arrays(), [layer for layers in prompts for layer in layers]
        whole = {name: sum(call.whole[name] for call in calls) / len(calls) for name in calls[0].whole}
        return {
            "prompts": len(prompts),
            "density": float(arrays["density"].double().mean()),
            "recall": float(arrays["recall"].double().mean()),
            "worst_recall": worst(torch.cat([call.recalls.flatten() for call in calls])),
            "oracle_density": whole["oracle_density"],
            "oracle_gap": whole["measured_density"] / whole["oracle_density"],
            "overlap": whole["overlap"],
            "output_error": whole["output_error"],
            "dense_calls": dict(Counter(call.dense for call in calls if call.dense is not None)),
        }

    def _add(self, layer: _Layer) -> None:
        begun = len(self._found) % self.layers
        if begun and layer.lengths != self._found[-1].lengths:
            raise ValueError(
                f"Layer {begun} of {self.layers} attends {layer.lengths} queries and keys, and the layer before it "
                f"{self._found[-1].lengths}: run one prompt at a time, without padding and packing."
            )
        self._found.append(layer)

    def _prompts(self) -> list[list[_Layer]]:
        if not self._found or len(self._found) % self.layers:
            raise ValueError(
                f"{len(self._found)} calls of attention were collected, not a multiple of {self.layers} layers: "
                "open sp.record(inspect=collector) around whole prefills of a sparsified model."
            )
        return [self._found[i : i + self.layers] for i in range(0, len(self._found), self.layers)]


def _measured(call: Call, seen: SparseCallTensors, prompt: Prompt, blocks: list[int]) -> _Layer:
    """The measures of one sparse call of one prompt."""
    mass = true_mass(seen.q, seen.k, prompt, blocks).double()
    mass = mass / mass.sum(-1, keepdim=True)  # exactly 1 in a row, so that means over rows are shares of the whole
    keep = seen.keep.expand(1, seen.q.shape[1], prompt.n_q, prompt.n_k)
    recalls = recall(mass, keep, blocks)  # [1, heads, blocks]
    # The call's density also counts dense rows and segments, spread over all query blocks.
    extra = call.density.to(keep.device) - density(keep, prompt)
    measured = density(keep, prompt, blocks) + extra
    needed = oracle_density_by_head(mass, recalls.mean(-1), prompt, blocks)
    difference, norm = squared_error(seen.q, seen.k, seen.v, seen.out, prompt, blocks, seen.logits)
    tiny = torch.finfo(norm.dtype).tiny
    by_head = {
        "density": call.density.expand(recalls.shape[:2]),
        "recall": recalls.mean(-1),
        "worst_recall": torch.tensor([[worst(head) for head in recalls[0]]]),
        "oracle_density": needed,
        "oracle_gap": measured / needed,
        "overlap": overlap_by_head(mass, keep, prompt, blocks),
        "output_error": (difference / norm.clamp(min=tiny)).sqrt(),
    }
    whole = {
        "oracle_density": oracle_density(mass, float(recalls.mean()), prompt, blocks),
        "measured_density": float(measured.mean()),
        "overlap": overlap(mass, keep, prompt, blocks),
        "output_error": float((difference.sum() / norm.sum().clamp(min=tiny)).sqrt()),
    }
    return _Layer(
        {name: values[0].float().cpu() for name, values in by_head.items()},
        recalls[0].float().cpu(),
        whole,
        (call.q_len, call.kv_len),
        prompt.window,
    )
