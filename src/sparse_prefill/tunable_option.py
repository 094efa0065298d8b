"""The option that says how much a strategy keeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Scale = Literal["linear", "log", "tokens", "blocks"]
STEPS = 2**14  # of scales that aren't counted in tokens or blocks


@dataclass(frozen=True)
class TunableOption:
    """The option of a strategy that calibration turns.

    From ``least`` to ``most`` a strategy keeps all that it kept before, and more, and its scores don't depend on it.

    Args:
        option (str): name of the option.
        least (float): value that keeps least.
        most (float | None): value that keeps most. Default: the whole prompt, of options in tokens or blocks.
        scale (str): "linear"; "log" for thresholds of scores, which differ by orders of magnitude; "tokens" and
            "blocks" for whole numbers of them. Default: "linear".
        also (tuple[str, ...]): other options that have the same value. Default: none.
        per_head (bool): whether the option also takes a tuple of a value for each query head. Default: False.
        whole_layer (bool): whether heads of a layer are scored together, so that they can't have values of their own.
            Default: False.

    Example:
        >>> TunableOption("alpha", 1.0, 1e-12, scale="log").value(0, tokens=4096, block_size=128)
        1.0
    """

    option: str
    least: float
    most: float | None = None
    scale: Scale = "linear"
    also: tuple[str, ...] = ()
    per_head: bool = False
    whole_layer: bool = False

    def steps(self, *, tokens: int, block_size: int) -> int:
        """How many values there are to try, for prompts of so many tokens."""
        if self.scale == "tokens":
            return -(-tokens // block_size) + 1
        return -(-tokens // block_size) if self.scale == "blocks" else STEPS

    def value(self, step: int, *, tokens: int, block_size: int) -> float:
        """The value of a step, from 0 for ``least``."""
        if self.scale == "tokens":
            return max(int(self.least), min(step * block_size, tokens))
        if self.scale == "blocks":
            return int(self.least) + step
        assert self.most is not None, "only options in tokens or blocks may leave `most` to the prompt"
        way = step / (STEPS - 1)
        if self.scale == "linear":
            return float(f"{self.least + way * (self.most - self.least):.6g}")
        return float(f"{self.least * (self.most / self.least) ** way:.6g}")

    def options(self, value: Any) -> dict[str, Any]:
        """The options that set the knob to a value."""
        return dict.fromkeys((self.option, *self.also), value)
