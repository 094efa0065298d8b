"""The rotary embedding of a layer of a transformers model, found by running the model's own code."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from typing import Any, get_args

import torch
from torch import Tensor, nn

from sparse_prefill.core.layer import Rope, RopeLayout

POSITION = 3  # the position to compare embeddings at; any but 0


def is_rotary(module: nn.Module) -> bool:
    """Whether a module holds the frequencies of a rotary embedding."""
    return any(name.endswith("inv_freq") for name, _ in module.named_buffers(recurse=False))


def rope_of(attention: nn.Module, rotaries: list[nn.Module], layer_type: str | None) -> Rope | None:
    """The rotary embedding of an attention module's queries and keys; None if it isn't certain.

    Args:
        attention (nn.Module): the attention module.
        rotaries (list[nn.Module]): the model's modules with ``inv_freq`` buffers.
        layer_type (str | None): the layer's type, if each type has its own embedding.

    Returns:
        Rope | None: the embedding, with its present frequencies. Some models change them with the length.
    """
    apply = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
    if len(rotaries) != 1 or apply is None or not _rotates(attention):
        return None
    width = getattr(attention, "head_dim", None)
    for kwargs in ({}, {"layer_type": layer_type}):
        frequencies = _frequencies(rotaries[0], **kwargs)
        if frequencies is None or frequencies.is_meta or not isinstance(width, int):
            continue
        before = torch.linspace(-1, 1, width, device=frequencies.device).view(1, 1, 1, width)
        try:
            with torch.no_grad():
                position = torch.tensor([[POSITION]], device=frequencies.device)
                cos, sin = rotaries[0](before[0], position, **kwargs)
                after = apply(before, before, cos, sin)[0]
        except (RuntimeError, TypeError, ValueError):  # rotates something other than heads
            continue
        for rope in _candidates(frequencies, width):
            rotated = slice(2 * len(rope.frequencies))
            expected = rope.rotate(before, torch.tensor([POSITION], device=before.device))
            if after.shape == expected.shape and _parallel(after[..., rotated], expected[..., rotated]):
                return rope
    return None


def _rotates(attention: nn.Module) -> bool:
    """Whether a module always rotates its queries and keys. Some layers don't, by an attribute or inside an ``if``."""
    if (stated := getattr(attention, "use_rope", None)) is not None:
        return bool(stated)
    try:
        lines = inspect.getsource(type(attention).forward).splitlines()
    except (OSError, TypeError):
        return False
    body = min(len(line) - len(line.lstrip()) for line in lines if line.strip()) + 4
    calls = [len(line) - len(line.lstrip()) for line in lines if "apply_rotary_pos_emb(" in line]
    return calls == [body]


def _frequencies(rotary: nn.Module, layer_type: str | None = None) -> Tensor | None:
    frequencies: Any = getattr(rotary, "inv_freq" if layer_type is None else f"{layer_type}_inv_freq", None)
    return frequencies if isinstance(frequencies, Tensor) and frequencies.ndim == 1 else None


def _candidates(frequencies: Tensor, width: int) -> Iterator[Rope]:
    if 2 * len(frequencies) <= width:
        for layout in get_args(RopeLayout):
            yield Rope(layout, tuple(frequencies.tolist()))


def _parallel(a: Tensor, b: Tensor) -> bool:
    """Whether two rotated heads agree up to a factor, since some embeddings scale queries and keys."""
    return bool(torch.cosine_similarity(a.float(), b.float(), dim=-1).min() > 1 - 1e-5)
