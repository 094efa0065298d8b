"""Files of queries, keys and values of a model's prefill, as benchmarks/capture.py writes them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_prefill.core.tensor_checks import check_attention_inputs

Layer = tuple[Tensor, Tensor, Tensor]


def read_captured(path: Path) -> tuple[dict[str, Layer], dict[str, Any]]:
    """Read captured layers and their origin.

    Args:
        path (Path): a file that benchmarks/capture.py wrote.

    Returns:
        tuple[dict[str, Layer], dict[str, Any]]: q [B, Hq, N, D], k and v [B, Hkv, N, D] by the layer's number; and
        "model", "text" and "seed", each None if the file lacks it.

    Raises:
        ValueError: if there is no such file, or it holds something else.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        layers = {layer: _qkv(tensors) for layer, tensors in content["layers"].items()}
        of = {key: content.get(key) for key in ("model", "text", "seed")}
    except FileNotFoundError:
        raise ValueError(f"There is no file of queries, keys and values at {path}.") from None
    except Exception as error:  # the file system, pickle, zip files and other content raise errors of many kinds
        raise ValueError(f"{path} holds no queries, keys and values: write it with benchmarks/capture.py.") from error
    if not layers:
        raise ValueError(f"{path} holds no layers: write it with benchmarks/capture.py.")
    return layers, of


def _qkv(tensors: Sequence[Tensor]) -> Layer:
    q, k, v = tensors
    check_attention_inputs(q, k, v)
    return q, k, v
