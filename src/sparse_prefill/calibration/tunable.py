"""The options that calibration sets."""

from __future__ import annotations

from sparse_prefill import registry
from sparse_prefill.strategy import Strategy
from sparse_prefill.tunable_option import TunableOption


def tunable_option_of(strategy: Strategy) -> TunableOption:
    """The tunable option of a strategy; ValueError, naming the strategies that have one, if it has none."""
    option = strategy.tunable_option()
    if option is None:
        raise ValueError(
            f"{strategy.label} with these options has no tunable option, so there is nothing to calibrate. Strategies "
            f"with one: {', '.join(tunable_options())}. Calibrate the strategy first, then wrap it."
        )
    return option


def tunable_options() -> dict[str, TunableOption]:
    """The tunable option of each strategy that has one, by the strategy's name."""
    names = registry.strategies.names()
    found = {name: getattr(registry.strategies.factory(name), "tunable", None) for name in names}
    return {name: option for name, option in found.items() if option is not None}
