"""What a dense run shows of each layer to a strategy that isn't used in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_prefill.core.inputs import AttentionInputs
from sparse_prefill.core.layer import Layer
from sparse_prefill.core.prompt import Prompt
from sparse_prefill.kernel.segments import Segment
from sparse_prefill.models.subject import EvalModel
from sparse_prefill.strategy import Strategy

OnProgress = Callable[[int, int], None]
Texts = Sequence[Sequence[int] | Tensor]


class LayerInputs(NamedTuple):
    """One layer of a dense run.

    Shapes: q [1, Hq, s, D], queries as strategies score them; k [1, Hkv, s, D]; v [1, Hkv, s, Dv].
    """

    layer: int
    strategy: Strategy  # bound to the layer
    q: Tensor
    k: Tensor
    v: Tensor
    prompt: Prompt


Look = Callable[[LayerInputs], None]


def observe(
    subject: EvalModel,
    strategy: Strategy,
    texts: Sequence[Sequence[int] | Tensor],
    look: Callable[[int, LayerInputs], None],
    on_progress: OnProgress | None = None,
) -> None:
    """Run texts through a model densely, and show each layer of each.

    Args:
        subject (EvalModel): the model.
        strategy (Strategy): what is bound to each layer, to be asked there; the run doesn't use it.
        texts (Sequence): token ids of each text.
        look (Callable): called as ``look(index of the text, sight)``, one layer after the other.
        on_progress (Callable | None): called as ``on_progress(done, total)`` after each layer. Default: nothing.

    Raises:
        ValueError: if there is no text, or one that the strategy runs dense.
    """
    prompts = as_tokens(texts)
    check_lengths(strategy, prompts, subject.device)
    done, total = 0, len(prompts) * subject.layers
    for index, tokens in enumerate(prompts):

        def seen(sight: LayerInputs, index: int = index) -> None:
            nonlocal done
            look(index, sight)
            done += 1
            if on_progress is not None:
                on_progress(done, total)

        subject.prefill(_Observer(inner=strategy, look=seen, block_size=strategy.block_size), tokens)


def part_of(on_progress: OnProgress | None, run: int, runs: int) -> OnProgress | None:
    """Progress of one of several runs as a part of the whole."""
    if on_progress is None:
        return None
    return lambda done, total: on_progress(run * total + done, runs * total)


def as_tokens(texts: Sequence[Sequence[int] | Tensor]) -> list[Tensor]:
    """Texts as int64 [1, s] each; ValueError where there is none or one is no list of token ids."""
    prompts = [_as_tensor(text) for text in texts]
    prompts = [tokens[None] if tokens.ndim == 1 else tokens for tokens in prompts]
    wrong = [p for p in prompts if p.ndim != 2 or p.shape[0] != 1 or p.is_floating_point() or p.shape[1] == 0]
    if not prompts or wrong:
        found = f"one of {wrong[0].dtype} {list(wrong[0].shape)}" if wrong else "none"
        raise ValueError(f"texts must be one or more lists of token ids, got {found}: see EvalModel.encode.")
    return [tokens.long() for tokens in prompts]


def _as_tensor(text: Sequence[int] | Tensor) -> Tensor:
    try:
        return torch.as_tensor(text)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(
            f"texts must be lists of token ids, got a {type(text).__name__}: see EvalModel.encode."
        ) from None


def check_lengths(strategy: Strategy, prompts: Sequence[Tensor], device: torch.device) -> None:
    """Raise ValueError if the strategy runs one of the prompts dense on a device."""
    for index, tokens in enumerate(prompts):
        prompt = Prompt(q_len=tokens.shape[1], block_size=strategy.block_size)
        reason = strategy.dense_reason(prompt, device)
        if reason is not None:
            raise ValueError(
                f"{strategy.label} runs text {index} of {tokens.shape[1]} tokens dense ({reason}): give longer texts, "
                "or set its min_length."
            )


@dataclass(frozen=True, kw_only=True)
class _Observer(Strategy):
    """Dense attention that shows what another strategy would have been given."""

    inner: Strategy
    look: Look
    index: int = 0

    def for_layer(self, layer: Layer) -> Strategy:
        return replace(self, inner=self.inner.for_layer(layer), index=layer.index)

    def dense_reason(self, prompt: Prompt, device: str | torch.device = "cpu") -> str | None:
        return None

    def keep(self, q: Tensor, k: Tensor, prompt: Prompt | None = None) -> Tensor:
        return self.prompt_for(q, k, prompt).visible(q.device)

    def attend(self, inputs: AttentionInputs, keep: Tensor, segments: Sequence[Segment] = ()) -> Tensor:
        sight = (self.index, self.inner, inputs.scored_q, inputs.scored_k, inputs.v, inputs.prompt)
        self.look(LayerInputs(*sight))
        return self.attend_dense(inputs)
