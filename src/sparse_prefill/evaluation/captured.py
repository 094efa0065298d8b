"""Queries, keys and values of a model's prefill on disk, as benchmarks/capture.py writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Layer = tuple[Tensor, Tensor, Tensor]


def read_captured(path: Path) -> tuple[dict[str, Layer], dict[str, Any]]:
    """Read captured layers, and what they are of.

    Args:
        path (Path): a file of benchmarks/capture.py.

    Returns:
        tuple[dict[str, Layer], dict[str, Any]]: q [B, Hq, N, D], k and v [B, Hkv, N, D] by the layer's number; and
        "model", "text" and "seed", each None where the file doesn't tell.

    Raises:
        OSError: if the file can't be read.
        ValueError: if it holds something else.
    """
    try:
        content = torch.load(path, weights_only=True)
        return dict(content["layers"]), {key: content.get(key) for key in ("model", "text", "seed")}
    except OSError:
        raise
    except Exception as error:  # of pickle, of zip files, of other content
        raise ValueError(f"{path} holds no queries, keys and values: write it with benchmarks/capture.py.") from error
