"""A layer as strategies know it: its place in the model and its rotary embedding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

RopeLayout = Literal["half_split", "interleaved"]


@dataclass(frozen=True)
class Rope:
    """A rotary position embedding: which dimensions of a head rotate together, and at which frequency.

    Args:
        layout (str): "half_split" pairs dimension ``i`` with ``i + d / 2`` of the ``d`` rotated ones (transformers,
            Qwen, Phi), "interleaved" pairs ``2 i`` with ``2 i + 1`` (torchtune's Llama).
        frequencies (tuple[float, ...]): radians per position of each of the d / 2 pairs, the highest first. Dimensions
            of a head after the first d are not rotated.

    Raises:
        ValueError: if the layout is unknown or there are no frequencies.
    """

    layout: RopeLayout
    frequencies: tuple[float, ...]

    def __post_init__(self) -> None:
        if self.layout not in get_args(RopeLayout):
            raise ValueError(f"layout must be one of {', '.join(get_args(RopeLayout))}, got {self.layout!r}.")
        object.__setattr__(self, "frequencies", tuple(map(float, self.frequencies)))
        if not self.frequencies:
            raise ValueError("frequencies must hold one number for each pair of rotated dimensions, got none.")

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotate heads [..., n, D] as tokens at ``positions``, [n] or broadcastable to [..., n].

        Returns:
            Tensor: fp32 [..., n, D]. Negative positions undo the rotation of positive ones.

        Raises:
            ValueError: if heads have fewer dimensions than the embedding rotates.
        """
        pairs = len(self.frequencies)
        if x.shape[-1] < 2 * pairs:
            raise ValueError(f"The rotary embedding rotates {2 * pairs} dimensions, but heads have {x.shape[-1]}.")
        frequencies = torch.tensor(self.frequencies, dtype=torch.float32, device=x.device)
        angle = positions[..., None].float() * frequencies  # [..., n, d / 2]
        rotated, rest = x[..., : 2 * pairs], x[..., 2 * pairs :].float()
        if self.layout == "half_split":
            cos, sin = angle.cos(), angle.sin()
            a, b = rotated.float().chunk(2, dim=-1)
            rotated = torch.cat([torch.addcmul(a * cos, b, sin, value=-1), torch.addcmul(b * cos, a, sin)], dim=-1)
        else:  # neighbours are the parts of a complex number, whose rotation is several times as fast
            turn = torch.polar(torch.ones_like(angle), angle)
            copy = rotated.to(torch.float32, copy=True, memory_format=torch.contiguous_format)  # aligned in memory
            rotated = torch.view_as_real(torch.view_as_complex(copy.unflatten(-1, (-1, 2))) * turn).flatten(-2)
        return rotated if not rest.shape[-1] else torch.cat([rotated, rest], dim=-1)


@dataclass(frozen=True)
class Layer:
    """A layer of a model, for :meth:`~sparse_prefill.Strategy.for_layer`.

    Args:
        index (int): place of the layer, from 0.
        count (int): number of layers of the model.
        rope (Rope | None): rotary embedding of its queries and keys. Default: None, i.e. none or an unknown one.

    Raises:
        ValueError: if the index isn't in ``[0, count)``.
    """

    index: int
    count: int
    rope: Rope | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ValueError(f"index must be in [0, count), got index={self.index} and count={self.count}.")
