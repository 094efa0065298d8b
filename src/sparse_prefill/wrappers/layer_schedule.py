"""One strategy for a range of layers, and another one for the rest."""

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
    """Use the wrapped strategy in the layers from ``start`` to ``stop``, and another one in all other layers.

    Some methods keep the first layers dense, and some patterns are for the upper layers only. A model's layers get the
    strategy itself, not this wrapper, and may have different block sizes. Without a model it does what the wrapped
    strategy does.

    Args:
        of (Strategy | str | Mapping): strategy of the layers in the range.
        start (int): the first layer of ``of``, counted from 0. Default: 2.
        stop (int | None): the first layer after those of ``of``. Default: None, i.e. up to the last.
        others (Strategy | str | Mapping): strategy of all other layers. Default: "dense".

    Raises:
        ValueError: if the range is empty or not of whole numbers, or ``of`` or ``others`` is not a strategy; for a
            model, if none of its layers is in the range.
    """

    paper = "no paper: FlashPrefill V2, 2026 (arXiv 2608.19758) keeps the first layers dense"
    use = (
        "Take it if most of the loss comes from a few layers at one end of a model. For any other choice of layers, "
        "make a `Plan`."
    )
    differs = "There is no released code of it as a separate step."

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
