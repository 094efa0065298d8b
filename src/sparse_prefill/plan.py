"""The strategies of a model's layers and heads, as a value that can be saved and loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar, cast

from sparse_prefill.core.files import read_json, read_yaml, with_numbers
from sparse_prefill.core.layer import Layer
from sparse_prefill.strategy import Strategy, as_strategy, to_config

Choice = TypeVar("Choice", bound="Strategy | Plan")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A strategy for each layer of a model.

    The wrapper ``by_head`` gives the heads of a layer different strategies.

    Args:
        default (Strategy | str | Mapping): strategy of the layers that aren't listed. Default: "flex_prefill".
        layers (Mapping[int, Strategy | str | Mapping]): strategies of some layers, by their index. Default: none.

    Raises:
        ValueError: if a layer's index is negative, or its value isn't a strategy.

    Example:
        >>> plan = Plan(default="flex_prefill", layers={0: "dense", 1: "dense"})
        >>> plan.save("plan.yaml")
        >>> Plan.load("plan.yaml") == plan
        True
    """

    default: Strategy = "flex_prefill"  # type: ignore[assignment]  # a Strategy once built
    layers: Mapping[int, Strategy] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "default", as_strategy(self.default))
        if not isinstance(self.layers, Mapping):
            raise ValueError(f"layers must be a mapping from layers to strategies, got {self.layers!r}.")
        for index in self.layers:
            if isinstance(index, bool) or not isinstance(index, int) or index < 0:
                raise ValueError(f"Layers must be numbered from 0, got {index!r}.")
        object.__setattr__(self, "layers", {index: as_strategy(one) for index, one in self.layers.items()})

    def for_layer(self, layer: Layer) -> Strategy:
        """The strategy for one layer.

        Raises:
            ValueError: if the plan names layers that the model doesn't have.
        """
        beyond = [index for index in self.layers if index >= layer.count]
        if beyond:
            raise ValueError(f"The plan has a strategy for layer {beyond[0]}, but the model has {layer.count} layers.")
        return self.layers.get(layer.index, self.default).for_layer(layer)

    def save(self, path: str | Path) -> None:
        """Write the plan as YAML. Needs the ``yaml`` extra.

        Raises:
            ValueError: if a strategy isn't of a registered class, or an option can't be written.
        """
        import yaml

        layers = {index: to_config(strategy) for index, strategy in self.layers.items()}
        content = {"default": to_config(self.default), "layers": layers}
        Path(path).write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan from a YAML file, which needs the ``yaml`` extra, or from a .json file.

        Raises:
            ValueError: if there is no such file, or it doesn't hold a plan.
        """
        as_json = Path(path).suffix == ".json"
        content: Any = with_numbers(read_json(path, "plan")) if as_json else read_yaml(path, "plan")
        if not isinstance(content, dict) or not content.keys() <= {"default", "layers"}:
            raise ValueError(f"{path} is no plan: it must hold a mapping of default and layers.")
        try:
            return cls(**content)
        except (ValueError, RecursionError) as error:  # YAML can name a mapping within itself
            raise ValueError(f"{path} is no plan: {error}") from None


def with_options(choice: Choice, **options: Any) -> Choice:
    """A strategy or a plan with other values of options.

    They are set in every strategy of a plan, and in every wrapped strategy, that has the option.
    """
    if isinstance(choice, Plan):
        layers = {index: with_options(one, **options) for index, one in choice.layers.items()}
        return cast(Choice, Plan(default=with_options(choice.default, **options), layers=layers))

    def inner(value: Any) -> Any:
        if isinstance(value, Strategy):
            return with_options(value, **options)
        return {key: inner(one) for key, one in value.items()} if isinstance(value, Mapping) else value

    known = [field.name for field in fields(choice) if field.init]
    return choice.with_fields(**{name: options.get(name, inner(getattr(choice, name))) for name in known})
