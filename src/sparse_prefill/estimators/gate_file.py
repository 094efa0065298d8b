"""Reading the weights of trained gates from their published files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_prefill.core.layer import Rope
from sparse_prefill.estimators.attention_gate import AttentionGate

KEY = re.compile(r"(?:^|\.)layers\.(\d+)\.(?:.+\.)?attn_gate\.(mask_linear_[qk]\.weight)$")


def load_gate(path: str, layer: int, rope: Rope | None, device: torch.device) -> AttentionGate:
    """The gate of one layer, frozen, from a file of published gates. Each file is read once per process.

    Args:
        path (str): a ``.safetensors`` file, or one that ``torch.load`` reads. It must hold tensors named
            ``model.layers.{i}.self_attn.attn_gate.mask_linear_k.weight``, and ``...mask_linear_q.weight`` if
            queries are projected as well. Other tensors are ignored.
        layer (int): index of the layer.
        rope (Rope | None): rotary embedding of the layer.
        device (torch.device): the device of the gate.

    Raises:
        ValueError: if the file is missing or can't be read, or holds no gate for the layer.
    """
    return _gate(path, layer, rope, device)


@lru_cache(maxsize=256)
def _gate(path: str, layer: int, rope: Rope | None, device: torch.device) -> AttentionGate:
    gates = _gates(path)
    weights = gates.get(layer, {})
    if "mask_linear_k.weight" not in weights:
        raise ValueError(f"{path} has no gate for the keys of layer {layer}. It has gates for {sorted(gates)}.")
    with torch.inference_mode(False):  # cached weights must also serve later calls with gradients
        found = {name: weight.to(device, torch.float32) for name, weight in weights.items()}
        gate = AttentionGate(found["mask_linear_k.weight"], found.get("mask_linear_q.weight"), rope)
    return gate.requires_grad_(False)


@lru_cache(maxsize=2)
def _gates(path: str) -> dict[int, dict[str, Tensor]]:
    """The weights of each layer's gate."""
    gates: dict[int, dict[str, Tensor]] = {}
    tensors = _tensors(path)
    for key, tensor in tensors.items():
        if found := KEY.search(str(key)):
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
                raise ValueError(f"{path} must hold floating-point tensors, and {key} isn't one.")
            gates.setdefault(int(found[1]), {})[found[2]] = tensor
    if not gates:
        names = sorted(map(str, tensors))
        raise ValueError(
            f"{path} holds no prefill gates: their tensors are named "
            "model.layers.{i}.self_attn.attn_gate.mask_linear_k.weight. It holds "
            f"{', '.join(names[:8]) or 'nothing'}{', ...' if len(names) > 8 else ''}."
        )
    return gates


def _tensors(path: str) -> Mapping[str, Tensor]:
    if not Path(path).is_file():
        raise ValueError(f"weights must be a file of gates, and there is none at {path}.")
    try:
        with torch.inference_mode(False):
            tensors = _read(path)
    except ModuleNotFoundError:  # safetensors isn't installed
        raise
    except Exception as error:  # of pickle, of zip files, of safetensors, of the file system
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path} can't be read as a state dict: {reason or type(error).__name__}") from error
    if not isinstance(tensors, Mapping):
        raise ValueError(f"{path} holds a {type(tensors).__name__}, where a mapping of names to tensors was expected.")
    return tensors


def _read(path: str) -> Any:
    if Path(path).suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)
