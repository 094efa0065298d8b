"""A strategy for the layers from one number on, and another one for the rest."""

from __future__ import annotations

from dataclasses import dataclass

from sparse_prefill.core.layer import Layer
from sparse_prefill.core.option_checks import check_tokens
from sparse_prefill.registry import register_wrapper
from sparse_prefill.strategy import Strategy, as_strategy
from sparse_prefill.wrappers.base import Wrapper


@register_wrapper("layer_schedule")
@dataclass(frozen=True, kw_only=True)
class LayerSchedule(Wrapper):
    """Serve the layers from ``start`` on, up to ``stop``, with the wrapped strategy and the others with another one.

    Some methods are served with the first layers dense, and some patterns are for the upper layers only. A model's
    layers get the strategy itself, not this wrapper, and may have blocks of different sizes. Without a model
    it is the wrapped strategy.

    Args:
        of (Strategy | str | Mapping): strategy of the layers in the range.
        start (int): the first layer of ``of``, counted from 0. Default: 2.
        stop (int | None): the first layer behind those of ``of``. Default: None, i.e. up to the last.
        others (Strategy | str | Mapping): strategy of all other layers. Default: "dense".

    Raises:
        ValueError: if the range is empty or no range of numbers, or what is to serve is no strategy; for a model, if
            no layer of it is in the range.
    """

    paper = "no paper of its own: FlashPrefill V2, 2026 (arXiv 2608.19758) is served with its first layers dense"
    use = (
        "Take it where the loss comes from a few layers at one end of a model. Which layers differ by more than their "
        "place is for a `Plan`."
    )
    differs = "There is no released code of it by itself."

    start: int = 2
    stop: int | None = None
    others: Strategy = "dense"  # type: ignore[assignment]  # a Strategy once built

    def __post_init__(self) -> None:
        super().__post_init__()
        check_tokens("start", self.start)
        if self.stop is not None:
            check_tokens("stop", self.stop, least=self.start + 1)
        object.__setattr__(self, "others", as_strategy(self.others))

    def for_layer(self, layer: Layer) -> Strategy:
        if self.start >= layer.count:
            raise ValueError(f"The schedule starts at layer {self.start}, but the model has {layer.count} layers.")
        within = self.start <= layer.index and (self.stop is None or layer.index < self.stop)
        return (self.of if within else self.others).for_layer(layer)
