"""The option that sets how many blocks a strategy keeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Scale = Literal["linear", "log", "tokens", "blocks"]
STEPS = 2**14  # values to try on the scales "linear" and "log"


@dataclass(frozen=True)
class TunableOption:
    """The option of a strategy that calibration sets.

    From ``least`` to ``most``, the strategy only adds blocks. Its scores must not depend on the option.

    Args:
        option (str): name of the option.
        least (float): value with the fewest blocks.
        most (float | None): value with the most blocks. Default: the whole prompt, for options in tokens or blocks.
        scale (str): "linear"; "log" for thresholds of scores, which differ by orders of magnitude; "tokens" and
            "blocks" for whole numbers of them. Default: "linear".
        also (tuple[str, ...]): other options that get the same value. Default: none.
        per_head (bool): whether the option also takes a tuple with a value for each query head. Default: False.
        whole_layer (bool): whether heads of a layer are scored together, so that they can't have different values.
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
        """Number of values to try for prompts of this many tokens."""
        if self.scale == "tokens":
            return -(-tokens // block_size) + 1
        return -(-tokens // block_size) if self.scale == "blocks" else STEPS

    def value(self, step: int, *, tokens: int, block_size: int) -> float:
        """The value of a step; step 0 is ``least``."""
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
        """The keyword options that set this option, and those in ``also``, to a value."""
        return dict.fromkeys((self.option, *self.also), value)
